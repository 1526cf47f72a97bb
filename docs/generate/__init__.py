"""A Sphinx extension that writes the pages that are made from the code, before any is read."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from generate import api, command, families, gallery
from generate.included import localise

ROOT = Path(__file__).parents[2]
FOLDER = "generated"
"""Where they go, in the folder of the sources."""


def pages() -> dict[str, str]:
    """Every generated page, Markdown by name without the end of it."""
    return {**gallery.pages(ROOT), **families.pages(), **api.pages(), **command.pages()}


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("builder-inited", _write)
    app.connect("autodoc-process-docstring", _tidy, priority=400)  # napoleon has 500
    app.connect("autodoc-process-bases", _show_public_bases)
    app.connect("source-read", _localise_page)
    app.connect("include-read", _localise_included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write(app: Sphinx) -> None:
    """Write the pages that changed, and remove those that are no more."""
    folder = Path(app.srcdir) / FOLDER
    made = {folder / f"{name}.md": text for name, text in pages().items()}
    for path in folder.rglob("*.md"):
        if path not in made:
            path.unlink()
    for path, text in made.items():
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


_SHARED = re.compile(r"^Args besides those of ``(\w+)``(.*):$")


def _tidy(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Spare docstrings what napoleon would read into them."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # or a colon in its first line would stand behind a type
    for index, line in enumerate(lines):
        if match := _SHARED.match(line):  # a sentence and a section, of which it knows "Args"
            more = f"Arguments besides those of ``{match[1]}``{match[2]}:"
            lines[index : index + 1] = [more, "", "Args:"]
            return


def _show_public_bases(app: Sphinx, name: str, value: Any, options: Any, bases: list[type]) -> None:
    """Show what a private base extends instead of it."""
    while private := next((base for base in bases if base.__name__.startswith("_")), None):
        at = bases.index(private)
        bases[at : at + 1] = private.__bases__


def _localise_page(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = localise(content[0], Path(app.env.doc2path(page)))


def _localise_included(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    content[0] = localise(content[0], (Path(app.srcdir) / path).resolve())
