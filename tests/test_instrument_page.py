"""The page of gradients: what its builder computes, and what headless Chromium makes of it."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

import veerloss
from benchmarks.digitise import instrument_page
from benchmarks.digitise.snapshot import Snapshot

LOSSES = ("Dice", "Tversky", "Lovász", "Focal", "SCE")
CLAIMS = [
    SimpleNamespace(claim="easy pixels <b>vanish</b>", verdict="holds", measured="factor 1e-4", shown_by="a test"),
    SimpleNamespace(claim="unsure pixels keep their weight", verdict="false", measured="25 %", shown_by="figure"),
    SimpleNamespace(claim="continuity", verdict="open", measured="", shown_by="nothing yet"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arrays(height=96, width=128):
    """A snapshot: two curves of 1 to 3 px that cross, and logits that are their target, shifted and noisy. In a patch all
    logits are the same, curve 1 as likely as background, curve 2 impossible: errors of 1/2 tie, of pixels of either class."""
    rng = np.random.default_rng(0)
    row, column = np.arange(height)[:, None], np.arange(width)[None, :]
    target = np.zeros((height, width), dtype=np.uint8)
    for label, phase in ((2, 0.0), (1, 2.0)):
        centre = height / 2 + height / 3 * np.sin(column / 19 + phase)
        target[np.abs(row - centre) <= 1 + 0.5 * np.sin(column / 7)] = label
    hot = np.roll(target, 1, axis=0) == np.arange(3)[:, None, None]
    logits = 5 * hot + 1.5 * rng.standard_normal(hot.shape)
    logits[:, 30:60, 40:80] = np.array([0, 0, -6e4])[:, None, None]
    return {"image": 1 - 0.6 * (target > 0), "target": target, "logits": logits.astype(np.float16)}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot") / "snapshot.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="module")
def page(snapshot):
    path = snapshot.parent / "docs" / "instrument.html"
    instrument_page.build(snapshot, path, CLAIMS)
    return path


# ------------------------------------------------------------------ the builder


def drawing(text):
    return np.array([[int(pixel) for pixel in line] for line in text.split()], dtype=np.uint8)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (-1, "01000 00020 00020 00000 00000"),
        (0, "01000 01020 00020 00020 00000"),
        (1, "01100 01122 01122 00022 00022"),
        (2, "11122 11122 11122 00222 00222"),
        (3, "11112 11112 11112 01122 00222"),
    ],
)
def test_wider_and_narrower(width, expected):
    target = drawing("01000 01020 00020 00020 00000")
    np.testing.assert_array_equal(instrument_page.widen(target, width), drawing(expected))


def test_regions():
    found = instrument_page.regions(drawing("0000 0110 0120 0000"))
    np.testing.assert_array_equal(found["curve"], drawing("0000 0110 0110 0000"))
    np.testing.assert_array_equal(found["edge"], drawing("0110 1111 1111 0110"))
    np.testing.assert_array_equal(found["background"], ~found["curve"])


def test_every_rank_has_a_bin():
    edges = instrument_page.rank_edges(12288)
    assert edges[0] == 1 and edges[-1] == 12289
    assert (np.diff(edges) > 0).all()


def test_numbers_of_the_library(snapshot):
    found = instrument_page.numbers(Snapshot.read(snapshot), instrument_page.Setting(gamma=0.0, fp=0.5, fn=0.5))
    assert tuple(found) == LOSSES
    for loss in found.values():
        assert loss["curve"] + loss["background"] == pytest.approx(1)
        assert 0 < loss["edge"] < 1
    assert found["Tversky"]["curve"] == pytest.approx(found["Dice"]["curve"], rel=1e-6)  # but for where the smoothing is
    assert found["Dice"]["distinct"] == found["Tversky"]["distinct"] == [2, 2, 2]
    assert min(found["Lovász"]["distinct"]) > 100
    logits = torch.from_numpy(arrays()["logits"]).double()[None].requires_grad_()
    target = torch.from_numpy(arrays()["target"]).long()[None]
    loss = torch.nn.functional.cross_entropy(logits, target)
    size = torch.autograd.grad(loss, logits)[0].abs().sum(1)
    assert found["Focal"]["value"] == pytest.approx(loss.item())
    assert found["Focal"]["l1"] == pytest.approx(size.sum().item())
    assert found["Focal"]["curve"] == pytest.approx((size[target > 0].sum() / size.sum()).item())
    most = (1 - torch.softmax(logits, 1).gather(1, target[:, None])[:, 0]).flatten().argmax()
    assert found["Focal"]["by_rank"][0] == pytest.approx((size.flatten()[most] / size.mean()).item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": None}, "no logits"),
        ({"image": None, "target": None}, "no image and no target"),
        ({"image": np.zeros((3, 8, 8))}, r"image .* shape \[3, 8, 8\]"),
        ({"image": np.full((96, 128), 255.0)}, "image .* 255.0"),
        ({"target": np.ones((8, 8), dtype=np.uint8)}, r"target .* shape \[8, 8\], .* \[96, 128\]"),
        ({"target": np.full((96, 128), 3)}, r"target .* values \[3\]"),
        ({"target": np.zeros((96, 128), dtype=np.uint8)}, "a curve among them"),
        ({"logits": np.zeros((2, 96, 128), dtype=np.float16)}, r"logits .* shape \[2, 96, 128\], expected \[3, 96, 128\]"),
        ({"logits": np.zeros((3, 96, 128), dtype=int)}, "logits .* int64"),
        ({"logits": np.full((3, 96, 128), np.nan, dtype=np.float16)}, "logits .* float16, not all .* finite"),
        ({"logits": np.full((3, 96, 128), 1e6)}, "logits .* float64, not all .* range of float16"),
    ],
)
def test_bad_snapshots(tmp_path, change, message):
    path, out = tmp_path / "snapshot.npz", tmp_path / "page.html"
    np.savez(path, **{key: value for key, value in (arrays() | change).items() if value is not None})
    with pytest.raises(ValueError, match=message):
        instrument_page.build(path, out, None)
    assert not out.exists()


def test_the_page_is_one_small_file(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 300_000
    assert not re.search(r"https?:|//cdn|@import|\burl\((?!#)|<link(?! rel=\"icon\" href=\"data:,\")|\bsrc=", text)
    assert "default-src 'none'" in text
    assert "<b>vanish" not in text


def test_the_page_of_docs_is_of_this_template():
    """`make study`, or `python -m benchmarks.digitise.instrument_page`, builds it again."""
    before, after = instrument_page.TEMPLATE.read_text(encoding="utf-8").split(instrument_page.PLACEHOLDER)
    text = instrument_page.OUT.read_text(encoding="utf-8")
    assert text.startswith(before) and text.endswith(after)
    assert json.loads(text[len(before) : -len(after)])["version"] == veerloss.__version__


# ------------------------------------------------------------------ in the browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update",
                 "disable-sync", "no-first-run", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        opened.set_script_timeout(20)
        yield opened


def load(browser, path):
    browser.get(path.as_uri())
    until(browser, "return Boolean(document.getElementById('scope').textContent)")
    return browser


@pytest.fixture
def opened(browser, page):
    """The page, its sliders at their defaults."""
    if browser.current_url != page.as_uri():
        load(browser, page)
    moved = "Object.entries(instrument.setting()).some(([key, value]) => value !== instrument.data.defaults[key])"
    if browser.execute_script(f"return {moved}"):
        browser.find_element("id", "reset").click()
    return settled(browser)


def until(browser, script, *arguments):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 10, poll_frequency=0.05).until(lambda driver: driver.execute_script(script, *arguments))


def settled(browser):
    """Once the table is drawn, and the live region has told of it."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    until(
        browser,
        """
        const live = document.getElementById("live").textContent, rows = [...document.querySelectorAll("#numbers tbody tr")];
        return rows.every(({ cells }) => live.includes(`${cells[0].textContent} ${cells[2].textContent}`));
        """,
    )
    return browser


def row(browser, name):
    return browser.execute_script(
        "return [...document.querySelectorAll('#numbers tbody tr')].find((row) => row.cells[0].textContent === arguments[0])"
        ".textContent",
        name,
    )


def test_agrees_with_the_library(opened):
    assert opened.execute_script("return window.instrument.check()") < 1e-6
    said = opened.find_element("id", "checked").text
    assert re.fullmatch(r"Checked against veerloss \S+: largest difference \de-\d+\.", said)
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_page_of_docs_agrees_with_the_library(browser):
    load(browser, instrument_page.OUT)
    assert browser.execute_script("return instrument.check()") < 1e-6


def test_every_number_is_checked(opened):
    """One after another is made wrong by a percent, and is seen."""
    unseen = opened.execute_script("""
        const unseen = [], { data, check } = window.instrument;
        const all = data.checks;
        data.checks = [all[0]];
        for (const [name, loss] of Object.entries(all[0].losses))
          for (const [key, right] of Object.entries(loss)) {
            if (key === "pixel" || right === null) continue;
            loss[key] = Array.isArray(right) ? right.map((value) => value && 1.01 * value) : 1.01 * right;
            const seen = check();
            const small = key === "projection" ? 0.009 * Math.abs(right) / loss.l1 : 0.009;
            if (!(seen > small)) unseen.push([name, key, seen]);
            loss[key] = right;
          }
        data.checks = all;
        return [unseen, check()];
    """)
    assert unseen[0] == []
    assert unseen[1] < 1e-6


@pytest.mark.parametrize(
    ("slider", "key", "said", "changed"),
    [
        ("gamma", "ARROW_RIGHT", "2.1", {"Focal"}),
        ("fp", "ARROW_LEFT", "0.25", {"Tversky"}),
        ("confidence", "ARROW_RIGHT", "logits × 1.25", set(LOSSES)),
        ("width", "ARROW_RIGHT", "+1 px", set(LOSSES)),
    ],
)
def test_sliders_by_keyboard(opened, slider, key, said, changed):
    from selenium.webdriver.common.keys import Keys

    def described():
        labels = "return [...document.querySelectorAll('canvas')].slice(-5).map((canvas) => canvas.getAttribute('aria-label'))"
        return {name: (row(opened, name), label) for name, label in zip(LOSSES, opened.execute_script(labels), strict=True)}

    before = described()
    opened.find_element("id", slider).send_keys(getattr(Keys, key))
    assert opened.execute_script("return document.querySelector(`output[for=${arguments[0]}]`).textContent", slider) == said
    settled(opened)
    after = described()
    for part in (0, 1):
        assert {name for name in LOSSES if before[name][part] != after[name][part]} == changed
    opened.find_element("id", "reset").send_keys(Keys.ENTER)
    settled(opened)
    assert described() == before


def test_no_gradient_anywhere(opened):
    """Tversky without weights is 0: a map that cannot be divided by its sum."""
    from selenium.webdriver.common.keys import Keys

    for slider in ("fp", "fn"):
        opened.find_element("id", slider).send_keys(Keys.HOME)
    assert "Tversky none" in settled(opened).find_element("id", "live").text
    assert row(opened, "Tversky").startswith("Tversky0.0000nonenonenone")
    assert opened.get_log("browser") == []


def test_labels(opened):
    problems = opened.execute_script("""
        const problems = [];
        for (const input of document.querySelectorAll("input"))
          if (!input.labels[0]?.textContent || !document.querySelector(`output[for=${input.id}]`)?.textContent)
            problems.push(input.id);
        for (const image of document.querySelectorAll("canvas, svg:not([aria-hidden])"))
          if (image.getAttribute("role") !== "img" || !/\\d/.test(image.getAttribute("aria-label")))
            problems.push(image.outerHTML);
        for (const button of document.querySelectorAll("button")) if (!button.textContent.trim()) problems.push(button.id);
        for (const part of document.querySelectorAll("[aria-labelledby]"))
          if (!document.getElementById(part.getAttribute("aria-labelledby"))) problems.push(part.outerHTML);
        return [problems, document.querySelectorAll("input").length, document.querySelectorAll("canvas").length,
          document.getElementById("live").getAttribute("aria-live")];
    """)
    assert problems == [[], 5, 8, "polite"]


def test_themes(opened):
    look = """
        const focal = document.querySelectorAll("canvas")[6], corner = focal.getContext("2d").getImageData(400, 20, 1, 1).data;
        const page = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
        return [page, corner].map((rgb) => (rgb[0] + rgb[1] + rgb[2] > 382 ? "light" : "dark")).join() === arguments[0];
    """
    for scheme in ("light", "dark"):
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        until(opened, look, f"{scheme},{scheme}")
    opened.find_element("id", "theme").click()
    until(opened, look, "light,light")
    assert opened.find_element("id", "theme").text == "Dark theme"
    opened.find_element("id", "theme").click()
    until(opened, look, "dark,dark")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    opened.execute_script("delete document.documentElement.dataset.theme")


@pytest.mark.parametrize("width", [400, 700, 1120, 1400])
def test_nothing_sticks_out(opened, width):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    sticking = opened.execute_script("""
        const wide = document.documentElement.clientWidth, table = document.querySelector(".table-scroll");
        const sticks = (part) => part.getBoundingClientRect().right > wide + 1 && !part.closest("svg");
        return [...document.querySelectorAll("body *")].filter(sticks).map((part) => part.outerHTML.slice(0, 80))
          .concat(table.scrollWidth > table.clientWidth ? ["the table scrolls"] : []);
    """)
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert sticking == []


def test_claims(opened, browser, snapshot, tmp_path):
    rows = opened.execute_script(
        "return [...document.querySelectorAll('#claims tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert [[claim, verdict[2:], *rest] for claim, verdict, *rest in rows] == [list(vars(claim).values()) for claim in CLAIMS]
    assert "Of 3 claims: holds 1, false 1, open 1." in opened.find_element("id", "verdicts").text
    path = tmp_path / "page.html"
    data = '"claims":null'
    text = re.sub(r'"claims":\[.*?\]', data, (snapshot.parent / "docs" / "instrument.html").read_text(encoding="utf-8"))
    assert data in text
    path.write_text(text, encoding="utf-8")
    assert not load(browser, path).find_element("id", "claims").is_displayed()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("error[j] - error[i] || i - j", "error[j] - error[i] || j - i"),
        ("(total - before) / (union * (union + 1))", "(total - before) / (union * (union + 2))"),
        ("SMOOTH = 1e-5", "SMOOTH = 1e-2"),
        ("q - gamma * p[t] * logP[t]", "q - gamma * logP[t]"),
        ("inside ? smoothing - share", "inside ? smoothing"),
        ("for (const label of [2, 1])", "for (const label of [1, 2])"),
        ("wrong[j] - wrong[i] ||", "wrong[i] - wrong[j] ||"),
    ],
)
def test_a_wrong_page_says_so(browser, page, tmp_path, right, wrong):
    text, path = page.read_text(encoding="utf-8"), tmp_path / "page.html"
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    assert "do not trust" in load(browser, path).find_element("id", "checked").text
