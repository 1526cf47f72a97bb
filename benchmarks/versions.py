"""With which versions of what it needs do the library's tests pass?

    make test-wheel                                      # the newest of everything
    make test-lowest                                     # the lowest that pyproject.toml allows
    python benchmarks/versions.py dist --python 3.13 --keep
    python benchmarks/versions.py dist --with timm==1.0.25 --tests tests/surgery

uv installs the wheel of that folder in a new virtual environment, and the tests of the sdist beside
it run against it, with no source of the library in reach. ``--keep`` adds the run to those that are
kept, and writes ``docs/versions.md`` anew, as it is written without a folder.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from common import ROOT, facts, write_json, write_whole
from packaging.requirements import Requirement
from packaging.version import Version

RUNS = ROOT / "benchmarks/versions.json"
PAGE = ROOT / "docs/versions.md"
EXTRAS = ("demo", "deploy")
CORE = [
    "analysis/test_survey.py", "blocks/test_official.py", "blocks/test_papers.py",
    "cli/test_commands.py", "cli/test_sweeps.py", "costs/test_pricing.py",
    "deploy/test_export.py", "layers", "ops", "profiling/test_report.py",
    "surgery/test_checkpoint.py", "surgery/test_families.py", "surgery/test_insertion.py",
    "surgery/test_plans.py", "surgery/test_tools.py", "test_grid.py", "test_models.py",
    "test_public_api.py",
]  # fmt: skip
"""The tests that another version is likely to break: those on what the dependencies do."""
NAMED = ("torch", "torchvision", "timm", "einops", "safetensors", "numpy")
"""The packages that have a column."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The tests, once, and what was installed."""

    lowest: bool
    """Whether everything that users need was as old as pyproject.toml allows, or as new."""
    instead: list[str]
    """Requirements in place of those of pyproject.toml."""
    tests: list[str]
    """The arguments of pytest; none for those of ``CORE`` that are not slow."""
    versions: dict[str, str]
    """Of Python and of every package in the environment."""
    passed: int
    skipped: int
    failed: list[str]
    """Names of tests."""
    seconds: float
    about: dict[str, Any]
    """Commit, date, command and machine."""

    @property
    def what(self) -> tuple[object, ...]:
        """Runs that have this in common answer the same question."""
        columns = [self.versions["python"].rpartition(".")[0], *map(self.versions.get, NAMED)]
        return self.lowest, *self.instead, *self.tests, *columns


def install(
    wheel: Path, project: Path, folder: Path, python: str, lowest: bool, instead: Sequence[str]
) -> None:
    """Make a virtual environment with a wheel and what the pyproject.toml of its project names.

    The tools of the tests are the newest that go with these.
    """
    overrides, given = folder.with_suffix(".overrides"), folder.with_suffix(".constraints")
    overrides.write_text("\n".join(instead))
    into = ["pip", "install", "--quiet", "--compile-bytecode", "--python", folder]
    what = ["--overrides", overrides, "--requirements", project / "pyproject.toml"]
    resolution = "lowest-direct" if lowest else "highest"
    _uv("venv", "--quiet", "--seed", "--python", python, folder)  # with pip, as Python makes them
    extras = [f"--extra={name}" for name in EXTRAS]
    _uv(*into, *what, *extras, f"--resolution={resolution}", wheel)
    found = installed(folder)
    given.write_text("\n".join(f"{name}=={found[name]}" for name in needed()))
    _uv(*into, *what, "--extra=test", "--constraints", given)


def installed(environment: Path) -> dict[str, str]:
    """The versions of Python and of every package in an environment."""
    ask = [environment / "bin/python", "-c", "import platform; print(platform.python_version())"]
    python = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    packages = json.loads(_uv("pip", "list", "--python", environment, "--format", "json"))
    return {"python": python} | {one["name"]: one["version"] for one in packages}


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist without the sources of the library; where its files are then."""
    with tarfile.open(sdist) as archive:
        members = [one for one in archive if Path(one.name).parts[1] != "tokenconv"]
        archive.extractall(folder, members, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def run_tests(environment: Path, sources: Path, tests: Sequence[str]) -> dict[str, Any]:
    """What passes, is skipped and fails in an environment, and the seconds it takes."""
    report = sources.with_suffix(".xml")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Warnings are errors with the versions that we develop with: others have their own.
    pytest = [environment / "bin/python", "-m", "pytest", "--override-ini=filterwarnings=default"]
    done = subprocess.run([*pytest, f"--junitxml={report}", *tests], cwd=sources, env=clean)
    if not report.exists():
        sys.exit(f"error: pytest ended with {done.returncode} and wrote no report")
    return outcome(report)


def outcome(report: Path) -> dict[str, Any]:
    """What a report of pytest in JUnit's format says."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.attrib["skipped"])
    return {
        "passed": int(suite.attrib["tests"]) - skipped - len(failed),
        "skipped": skipped,
        "failed": failed,
        "seconds": round(float(suite.attrib["time"])),
    }


def attempt(args: argparse.Namespace) -> Run:
    """Install the wheel and run the tests."""
    wheels, sdists = [*args.dist.glob("*.whl")], [*args.dist.glob("*.tar.gz")]
    if not len(wheels) == len(sdists) == 1:
        found = ", ".join(path.name for path in [*wheels, *sdists]) or "none"
        sys.exit(
            f"error: expected one wheel and its sdist in {args.dist}, got {found}; run make dist"
        )
    about = facts(torch.device("cpu"))
    del about["versions"]  # of this process
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        sources = unpack(sdists[0], Path(folder, "sdist"))
        install(wheels[0], sources, environment, args.python, args.lowest, args.instead)
        words = args.tests or ["-m", "not slow", *(f"tests/{name}" for name in CORE)]
        found = run_tests(environment, sources, words)
        versions = installed(environment)
    return Run(
        lowest=args.lowest, instead=args.instead, tests=args.tests, versions=versions, about=about,
        **found,
    )  # fmt: skip


def kept() -> list[Run]:
    """The runs that are kept."""
    return [Run(**row) for row in json.loads(RUNS.read_text())["runs"]] if RUNS.exists() else []


def keep(run: Run) -> None:
    """Add a run, in place of the one that answered the same question, and write the page."""
    runs = [*(one for one in kept() if one.what != run.what), run]
    write_json(RUNS, {"runs": [asdict(one) for one in runs]})
    write_whole(PAGE, page(runs).encode())


def needed() -> list[str]:
    """What pyproject.toml says that everybody needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line).name for line in project["dependencies"]]


def page(runs: Iterable[Run]) -> str:
    """What is supported, and the runs that show it."""
    runs = sorted(runs, key=lambda run: (not run.lowest, run.instead, run.what))
    plain = [run for run in runs if not run.instead]
    lines = [
        "# Supported versions",
        "",
        "The tests of the library, run against its wheel in a new virtual environment, on Linux",
        "and a CPU. *Lowest*: all that users need is as old as `pyproject.toml` allows, by",
        "`make test-lowest`. *Newest*: everything is as new as there is, by `make test-wheel`.",
        "*Core* tests are those that another version is likely to break, of `tests/`: "
        + ", ".join(f"`{name}`" for name in CORE)
        + ".",
        "",
        "| | lowest | newest |",
        "|---|---|---|",
    ]
    low = [run.versions for run in plain if run.lowest and not run.failed]
    new = [run.versions for run in plain if not run.lowest and not run.failed]
    for name in ("python", *needed()):
        cells = [
            min((one[name] for one in low), key=Version, default="not run"),
            max((one[name] for one in new), key=Version, default="not run"),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Runs", "", *_table(plain)]
    if others := [run for run in runs if run.instead]:
        lines += [
            "", "## Versions of one package", "",
            "The same, with one package at another version.", "", *_table(others),
        ]  # fmt: skip
    return "\n".join([*lines, ""])


def _table(runs: Sequence[Run]) -> list[str]:
    notes: list[str] = []
    rows = [
        ["versions", "Python", *NAMED, "tests", "passed", "skipped", "failed", "commit", "date"],
        [*["---"] * (3 + len(NAMED)), *["---:"] * 3, "---", "---"],
    ]
    for run in runs:
        chosen = "lowest" if run.lowest else "newest"
        failed = str(len(run.failed))
        if run.failed:
            notes.append(f"{len(notes) + 1}. " + ", ".join(f"`{name}`" for name in run.failed))
            failed += f" ({len(notes)})"
        rows.append(
            [
                ", ".join([chosen, *(f"`{one}`" for one in run.instead)]),
                *(run.versions.get(name, "none") for name in ("python", *NAMED)),
                f"`{shlex.join(run.tests)}`" if run.tests else "core",
                str(run.passed),
                str(run.skipped),
                failed,
                run.about["commit"][:8],
                run.about["date"][:10],
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows] + ([""] if notes else []) + notes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests, and keep what came of them if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "dist", type=Path, nargs="?", help="folder of a wheel and its sdist; without, only the page"
    )
    parser.add_argument(
        "--tests", type=shlex.split, default=[], help="arguments of pytest, as one; default: core"
    )
    parser.add_argument("--python", default=sys.executable, help="a version or an interpreter")
    parser.add_argument("--lowest", action="store_true", help="as old as pyproject.toml allows")
    parser.add_argument(
        "--with", dest="instead", action="append", default=[], metavar="REQUIREMENT",
        help="in place of what pyproject.toml asks for; may be repeated",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="and write docs/versions.md")
    args = parser.parse_args(argv)
    if args.dist is None:
        write_whole(PAGE, page(kept()).encode())
        return 0
    run = attempt(args)
    if args.keep:
        keep(run)
    print("\n".join(_table([run])))
    return int(bool(run.failed))


def _uv(*words: object) -> str:
    """What uv prints; it tells its errors itself."""
    done = subprocess.run(
        [sys.executable, "-m", "uv", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"error: uv {words[0]} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
