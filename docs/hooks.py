"""What mkdocs is told of pages that stand outside of docs/: the README is the first page, the changelog another, and results of
benchmarks are pages too. Links to other files of the repository are code, for the site does not have these."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {"index.md": ROOT / "README.md", "changelog.md": ROOT / "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files, config):
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    for path in sorted((*RESULTS.glob("*.md"), *RESULTS.glob("*.png"))):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """As seen from the page's file, links go from docs/ to the repository; as pages, to what the site has."""
    folder = PAGES.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")

    def moved(link: re.Match) -> str:
        picture, text, target = link.groups()
        place, _, anchor = target.partition("#")
        if "://" in target or not place or folder.name == "results":
            return link[0]
        path = (folder / place).resolve()
        pages = {source.resolve(): name for name, source in PAGES.items()}
        if path in pages:
            place = pages[path]
        elif path.is_relative_to(RESULTS):
            place = f"results/{path.relative_to(RESULTS)}"
        elif path.is_relative_to(ROOT / "docs"):
            place = path.relative_to(ROOT / "docs").as_posix()
        elif path.exists():
            return text if "`" in text else f"{text} (`{path.relative_to(ROOT)}`)"
        return f"{picture}[{text}]({up}{place}{'#' if anchor else ''}{anchor})"

    return LINK.sub(moved, markdown)
