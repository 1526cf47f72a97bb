"""Links to files of the repository, in pages and in what they include, as the site has them."""

import re
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
_INCLUDE = re.compile(r"^```{include} (\S+)$", re.MULTILINE)


@cache
def pages_of_files() -> dict[Path, str]:
    """From a file to the page that includes it or tells the same, from the root of the sources."""
    root = DOCS.parent
    found = {root / "README.md": "/index.md", root / "BLOCKS.md": "/generated/blocks/index.md"}
    for page in DOCS.rglob("*.md"):
        for path in _INCLUDE.findall(page.read_text()):
            found.setdefault((page.parent / path).resolve(), f"/{page.relative_to(DOCS)}")
    return found


def localise(text: str, file: Path) -> str:
    """The text of a file with links to files of the repository made to work on the site."""

    def link(match: re.Match[str]) -> str:
        target = (file.parent / match[1]).resolve()
        if not target.is_file():
            return match[1]  # an address, or no link at all
        if target.is_relative_to(DOCS):
            return f"/{target.relative_to(DOCS)}"
        return pages_of_files().get(target, f"/../{target.relative_to(DOCS.parent)}")

    return _LINK.sub(link, text)
