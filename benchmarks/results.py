"""Write the page of results, the README's table of them, and their figures, from the kept files.

    python benchmarks/results.py            # `make results`
    python benchmarks/results.py --check    # only says whether pages and files agree

``results/<version>/<kind>--<machine>--<device>.json`` are what benchmarks measured. Nothing is
measured or trained here. ``docs/results.md`` is made from ``pages/results.md.jinja``, and what
stands between the markers in the README from ``pages/headline.md.jinja``: their numbers come from
the files, and a sentence whose condition the files no longer meet is an error.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from common import ROOT, write_whole
from findings import FIGURES, KINDS
from jinja2 import Environment, FileSystemLoader, StrictUndefined

KEPT = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
MARKERS = "<!-- results: made by `make results` -->", "<!-- end of results -->"
MADE = ("commit", "date", "command", "device", "versions")
"""What a file has to say of how it was made."""


class ResultsError(Exception):
    """The files do not give what the pages say."""


@dataclass(frozen=True)
class Result:
    """A kept file."""

    path: Path

    @property
    def name(self) -> str:
        """Without its ending."""
        return self.path.stem

    @property
    def kind(self) -> str:
        """Who measured it."""
        return re.split(r"-", self.name, maxsplit=1)[0]

    @cached_property
    def content(self) -> dict[str, Any]:
        """As it was written."""
        return json.loads(self.path.read_text())

    @cached_property
    def made(self) -> dict[str, Any]:
        """How it was made: of ``MADE``, and of the settings, what the file says."""
        about = self.content.get("about", {})  # of a `compare.json`
        (*_, session) = self.content.get("sessions", [{}])  # of runs that were made in several
        return {**about, **session, **self.content}

    @property
    def missing(self) -> list[str]:
        """What of ``MADE`` the file does not say."""
        return [fact for fact in MADE if not self.made.get(fact)]

    @property
    def command(self) -> str:
        """What was typed, with ``--out`` to where the file is kept now."""
        words = shlex.split(self.made["command"])
        if "--out" in words:
            place = words.index("--out")
            is_script = words[0] == "python"
            kept = ["--out", os.path.relpath(self.path, ROOT)] if is_script else []
            words[place : place + 2] = kept
        set_first = [f"{name}={value}" for name, value in self.made.get("environment", {}).items()]
        return shlex.join([*set_first, *words])

    @property
    def origin(self) -> str:
        """The command, and the facts that the numbers have to be read with, as Markdown."""
        made = self.made
        when = datetime.fromisoformat(made["date"]).strftime("%Y-%m-%d")
        commit = f"commit `{made['commit'][:8]}`" if made.get("commit") else "commit not recorded"
        facts = [commit, when, made["device"]]
        facts += [f"{made['threads']} threads"] if "threads" in made else []
        facts += [made["dtype"]] if "dtype" in made else []
        facts += [f"{package} {version}" for package, version in made["versions"].items()]
        if changed := made.get("uncommitted"):
            facts.append(f"with uncommitted changes of {' '.join(changed)}")
        return f"```sh\n{self.command}\n```\n\n{self.link()}: {', '.join(facts)}."

    def link(self, text: str = "", ending: str = "json", start: Path = PAGE.parent) -> str:
        """To the file, or to a picture beside it."""
        path = Path(os.path.relpath(self.path.with_suffix(f".{ending}"), start))
        return f"[{text or path.name}]({path})"

    def figure(self, text: str) -> str:
        """The picture, as Markdown."""
        return "!" + self.link(text, "svg")


@dataclass
class Pages:
    """What templates can use, and what they used."""

    results: Mapping[str, Result]
    shown: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def result(self, name: str) -> dict[str, Any]:
        """What is found in a file, and the file itself.

        Raises:
            ResultsError: If there is none of this name.
        """
        if name not in self.results:
            raise ResultsError(f"no {name}.json is kept: there are {', '.join(self.results)}")
        self.shown.add(name)
        result = self.results[name]
        found = KINDS[result.kind]({**result.content, "path": result.path})
        return {"file": result, **found}

    def holds(self, sentence: str, condition: object) -> str:
        """The sentence, which is true only under a condition."""
        if not condition:
            self.broken.append(sentence)
        return sentence

    def render(self, template: str) -> str:
        """A page.

        Raises:
            ResultsError: If a sentence in it does not hold.
        """
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "pages"), undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        environment.filters["holds"] = self.holds
        environment.globals |= {
            "result": self.result, "files": self.results, "example": example_json, "root": ROOT,
        }  # fmt: skip
        page = environment.get_template(template).render()
        if self.broken:
            told = "; ".join(" ".join(sentence.split()) for sentence in self.broken)
            raise ResultsError(f"pages/{template} says what the files do not: {told}")
        return page


def example_json(path: str) -> Any:
    """What an example has kept, such as ``look/mix_ffn/analysis.json``."""
    return json.loads((ROOT / "examples" / path).read_text())


def kept(folder: Path = KEPT) -> dict[str, Result]:
    """The files by name, each of the newest version that has it.

    Raises:
        ResultsError: If there is one that nobody can read.
    """

    def age(path: Path) -> tuple[list[int], str]:
        return [int(number) for number in path.parent.name.split(".")], path.name

    results = {path.stem: Result(path) for path in sorted(folder.glob("*/*.json"), key=age)}
    for result in results.values():
        if result.kind not in KINDS:
            raise ResultsError(
                f"{result.path} is of no known kind ({', '.join(KINDS)}): add a function to "
                "benchmarks/findings.py"
            )
    return results


def written(results: Mapping[str, Result]) -> dict[Path, str]:
    """Every page that is made, by its place.

    Raises:
        ResultsError: If a page says what the files do not, or a file is on no page.
    """
    pages = Pages(results)
    page, headline = pages.render("results.md.jinja"), pages.render("headline.md.jinja")
    if unseen := [name for name in results if name not in pages.shown]:
        raise ResultsError(f"no page shows {', '.join(unseen)}: add it to pages/results.md.jinja")
    return {PAGE: page, README: put(headline, README.read_text())}


def put(headline: str, readme: str) -> str:
    """The README with another table between its markers.

    Raises:
        ResultsError: If it has no markers.
    """
    first, last = MARKERS
    before, opened, rest = readme.partition(first)
    _, closed, after = rest.partition(last)
    if not (opened and closed):
        raise ResultsError(f"{README} has no '{first}' with '{last}' behind it")
    return f"{before}{first}\n\n{headline.strip()}\n\n{last}{after}"


def draw(results: Mapping[str, Result]) -> None:
    """The figures of all files that have one."""
    for result in results.values():
        if result.kind in FIGURES:
            FIGURES[result.kind](result.path)


def main(words: Sequence[str] | None = None) -> int:
    """Write or check the pages.

    Returns:
        The exit code, 1 if files and pages do not agree.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(words)
    try:
        results = kept()
        pages = written(results)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if args.check:
        for path in stale:
            print(f"error: {path} is not what `make results` writes", file=sys.stderr)
        return int(bool(stale))
    for path, text in pages.items():
        write_whole(path, text.encode())
    draw(results)
    print("written:", *(path.relative_to(ROOT) for path in pages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
