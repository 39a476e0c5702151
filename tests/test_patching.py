"""veerloss.patch, on peers made up for the test: none need be installed."""

import importlib
import logging
import subprocess
import sys
import threading

import pytest
import torch
from grid import labels, logits

import veerloss
from veerloss import patching
from veerloss.compat import lovasz_losses, torchsparse
from veerloss.compat import mmseg as compat_mmseg

BERMAN = """
def lovasz_softmax(probas, labels, classes="present", per_image=False, ignore=None):
    return "theirs"

def lovasz_hinge(logits, labels, per_image=True, ignore=None):
    return lovasz_hinge_flat(logits, labels)

def lovasz_hinge_flat(logits, labels):
    return "theirs"
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes modules, which the test can import."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(modules):
        for path, text in modules.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()

    yield write
    patching._patched.clear()
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def peer(files, monkeypatch):
    """ "project" holds a copy of Berman's file, and its losses under other names."""
    files(
        {
            "project/__init__.py": "",
            "project/losses/lovasz.py": BERMAN,
            "project/losses/__init__.py": "from .lovasz import lovasz_softmax as lovasz",
            "project/train.py": "from project.losses import lovasz\nfrom project.losses.lovasz import *",
            "project/late.py": "from project.losses.lovasz import lovasz_softmax",
            "other.py": "from project.losses.lovasz import lovasz_softmax",
        }
    )
    return {"peer": "lovasz_losses", "at": "project.losses.lovasz"}


NAMES = [
    "project.losses.lovasz",  # the function, which hides the module of that name
    "project.losses.lovasz.lovasz_hinge",
    "project.losses.lovasz.lovasz_hinge_flat",
    "project.losses.lovasz.lovasz_softmax",
    "project.train.lovasz",
    "project.train.lovasz_hinge",
    "project.train.lovasz_hinge_flat",
    "project.train.lovasz_softmax",
]


def state(*modules):
    return {m: dict(vars(sys.modules[m])) for m in modules}


def test_every_module_of_the_peer_that_holds_the_name(peer, caplog):
    train, other = importlib.import_module("project.train"), importlib.import_module("other")
    loaded = ["project.train", "project.losses", "project.losses.lovasz", "other"]
    before, theirs = state(*loaded), train.lovasz
    with caplog.at_level(logging.INFO, "veerloss"):
        replaced = veerloss.patch(**peer)
    assert sorted(replaced) == NAMES
    assert all(name in caplog.text for name in NAMES)
    assert train.lovasz is train.lovasz_softmax is lovasz_losses.lovasz_softmax
    assert train.lovasz_hinge is lovasz_losses.lovasz_hinge
    assert other.lovasz_softmax is theirs  # not of the peer
    late = importlib.import_module("project.late")
    assert late.lovasz_softmax is lovasz_losses.lovasz_softmax
    p, y = logits((2, 3, 40)).softmax(1), labels((2, 3, 40), 3)
    assert train.lovasz(p, y) == veerloss.lovasz_softmax_loss(p, y, from_logits=False)
    assert sorted(veerloss.unpatch(**peer)) == sorted([*NAMES, "project.late.lovasz_softmax"])
    assert state(*loaded) == before and late.lovasz_softmax is theirs


def test_context_manager(peer):
    train = importlib.import_module("project.train")
    with veerloss.patch(**peer) as names:
        assert sorted(names) == NAMES and train.lovasz(torch.ones(1, 1, 2), torch.ones(1, 2).long(), [1]) == 0
        with veerloss.patch(**peer) as again:  # nothing new, and not undone at its end
            assert again == []
        assert train.lovasz is lovasz_losses.lovasz_softmax
    assert train.lovasz(None, None) == "theirs"
    with pytest.raises(ZeroDivisionError), veerloss.patch(**peer):
        _ = 1 / 0
    assert train.lovasz(None, None) == "theirs"


def test_twice_is_once(peer):
    train = importlib.import_module("project.train")
    assert len(veerloss.patch(**peer)) == len(NAMES)
    importlib.import_module("project.late")
    assert veerloss.patch(**peer) == []
    veerloss.unpatch(**peer)
    assert train.lovasz(None, None) == "theirs"
    with pytest.raises(RuntimeError, match=r"peer 'project.losses.lovasz' is not patched"):
        veerloss.unpatch(**peer)


def test_many_threads(peer):
    train = importlib.import_module("project.train")
    threads = [threading.Thread(target=veerloss.patch, kwargs=peer) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    veerloss.unpatch(**peer)
    assert train.lovasz(None, None) == "theirs"


REGISTRY = """
class Registry:
    def __init__(self):
        self.module_dict = {}

MODELS = Registry()
"""


@pytest.fixture
def mmseg(files, monkeypatch):
    """The part of it that matters here."""
    loss = "from mmseg.registry import MODELS\nclass LovaszLoss: pass\nMODELS.module_dict['LovaszLoss'] = LovaszLoss"
    empty = dict.fromkeys(("mmseg/__init__.py", "mmseg/models/__init__.py", "mmseg/models/losses/__init__.py"), "")
    files(empty | {"mmseg/registry.py": REGISTRY, "mmseg/models/losses/lovasz_loss.py": loss})
    monkeypatch.setattr(compat_mmseg, "DISTRIBUTION", None)
    monkeypatch.setattr(compat_mmseg, "VERSIONS", None)
    return importlib.import_module("mmseg.registry")


def test_a_registry(mmseg):
    with veerloss.patch("mmseg") as names:
        assert names == ["mmseg.models.losses.lovasz_loss.LovaszLoss", "mmseg.registry.MODELS.LovaszLoss"]
        assert mmseg.MODELS.module_dict == {"LovaszLoss": compat_mmseg.LovaszLoss}
    theirs = sys.modules["mmseg.models.losses.lovasz_loss"].LovaszLoss
    assert mmseg.MODELS.module_dict == {"LovaszLoss": theirs} and theirs is not compat_mmseg.LovaszLoss


def test_what_was_ours_before_stays(peer, files):
    files({"project/new.py": "from veerloss.compat.lovasz_losses import lovasz_softmax"})
    new, train = importlib.import_module("project.new"), importlib.import_module("project.train")
    with veerloss.patch(**peer) as names:
        assert sorted(names) == NAMES
    assert new.lovasz_softmax is lovasz_losses.lovasz_softmax and train.lovasz(None, None) == "theirs"


def test_blocks_that_overlap(peer):
    """As those of two threads do: the last to end restores."""
    train = importlib.import_module("project.train")
    first, second = veerloss.patch(**peer), veerloss.patch(**peer)
    for block in (first, first, second):
        assert train.lovasz is lovasz_losses.lovasz_softmax
        block.__exit__(None, None, None)
    assert train.lovasz(None, None) == "theirs"
    veerloss.patch(**peer)
    second.__exit__(None, None, None)  # of the patch before
    with veerloss.patch(**peer):
        pass
    assert train.lovasz is lovasz_losses.lovasz_softmax  # until it is undone
    with veerloss.patch(**peer):
        veerloss.unpatch(**peer)
        assert train.lovasz(None, None) == "theirs"
    assert train.lovasz(None, None) == "theirs"


def test_a_top_level_file(files):
    files({"lovasz_losses.py": BERMAN})
    with veerloss.patch("lovasz_losses") as names:
        assert "lovasz_losses.lovasz_hinge" in names


def test_a_peer_whose_losses_are_imported_under_another_name(files):
    loss = "class MixLovaszCrossEntropy: pass"
    files({"core/__init__.py": "", "core/criterions.py": loss, "core/builder.py": "from .criterions import *"})
    builder = importlib.import_module("core.builder")
    theirs = builder.MixLovaszCrossEntropy
    with veerloss.patch("torchsparse") as names:
        assert names == ["core.builder.MixLovaszCrossEntropy", "core.criterions.MixLovaszCrossEntropy"]
        assert builder.MixLovaszCrossEntropy is torchsparse.MixLovaszCrossEntropy
    assert builder.MixLovaszCrossEntropy is theirs
    with pytest.raises(RuntimeError, match="peer 'torchsparse' is not patched"):
        veerloss.unpatch("torchsparse")


def test_errors(files, monkeypatch):
    with pytest.raises(ValueError, match=r"peer must be one of \[.*'lovasz_losses'.*\], got 'tensorflow'"):
        veerloss.patch("tensorflow")
    with pytest.raises(ModuleNotFoundError, match="peer 'lovasz_losses' is not installed"):
        veerloss.patch("lovasz_losses")
    with pytest.raises(ModuleNotFoundError, match="at must be a module that can be imported, got 'no_such_module'"):
        veerloss.patch("lovasz_losses", at="no_such_module")
    with pytest.raises(TypeError, match="at must be the name of a module or None, got int"):
        veerloss.patch("lovasz_losses", at=3)
    with pytest.raises(RuntimeError, match="peer 'lovasz_losses' is not patched"):
        veerloss.unpatch("lovasz_losses")
    files({"empty.py": ""})
    with pytest.raises(RuntimeError, match="peer 'lovasz_losses' has none of"):
        veerloss.patch("lovasz_losses", at="empty")
    monkeypatch.setattr(lovasz_losses, "DISTRIBUTION", "torch")
    monkeypatch.setattr(lovasz_losses, "VERSIONS", ">=0.1,<0.2")
    version = torch.__version__.split("+")[0]
    with pytest.raises(RuntimeError, match=rf"peer 'lovasz_losses' is of version {version}.*; veerloss knows >=0.1,<0.2"):
        veerloss.patch("lovasz_losses")
    monkeypatch.setattr(lovasz_losses, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ModuleNotFoundError, match=r"is not installed \(pip install no-such-distribution\)"):
        veerloss.patch("lovasz_losses")


@pytest.mark.parametrize(
    ("version", "within"),
    [
        ("0.6", True),
        ("0.6.1rc2", True),
        ("0.9.9+cu130", True),
        ("0.10.0", False),
        ("0.10", False),
        ("0.5.99", False),
        ("1", False),
    ],
)
def test_versions(version, within):
    assert patching._within(version, ">=0.6,<0.10") is within
    assert patching._within("0.1.5.post20221221", "==0.1.5")


@pytest.mark.parametrize("peer", patching.peers())
def test_every_peer_is_declared(peer):
    module = importlib.import_module(f"veerloss.compat.{peer}")
    assert isinstance(module.PEER, str) and module.__doc__
    assert all(hasattr(module, name) for name in module.__all__)
    for place, name in module.REPLACES.items():
        path, _, original = place.partition(":")
        assert path.partition(".")[0] == module.PEER and original and callable(getattr(module, name))
    replaced = [getattr(module, name) for name in module.REPLACES.values()]
    assert len(set(replaced)) == len(replaced)  # for each to be restored as what it was
    if module.VERSIONS is not None:
        patching._within("1.0", module.VERSIONS)
    imported = f"import sys, veerloss.compat.{peer} as m; print(m.PEER in sys.modules)"
    result = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_report(capsys):
    from veerloss.__main__ import main

    main()
    report = capsys.readouterr().out
    assert "Peers:" in report
    for peer in patching.peers():
        version, reason = patching.status(peer)
        if version is not None:
            expected = "veerloss.patch can replace its losses" if reason is None else reason
            assert f"  {peer} {version}: {expected}" in report
