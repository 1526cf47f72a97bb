"""With which versions of what it needs do the library's tests pass?

    make test-wheel                                   # the newest of everything
    make test-lowest                                  # the lowest that pyproject.toml allows
    python benchmarks/versions.py dist --python 3.13 --keep
    python benchmarks/versions.py dist --with timm==1.0.25 -- tests/surgery

The wheel in the folder is installed in a new virtual environment, as users install it, and the tests
of the sdist beside it run against it, with no source of the library in reach. ``--keep`` adds the run
to the kept ones, and makes ``docs/versions.md`` of all of them; without a folder only the page is
made.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from common import ROOT, facts, write_json, write_whole

RUNS = ROOT / "benchmarks/results/0.1.0/versions--2-core-avx512--cpu.json"
PAGE = ROOT / "docs/versions.md"
EXTRAS = "deploy,profile,test"
SHOWN = ("torch", "torchvision", "timm", "einops", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The tests, once, with what was installed."""

    lowest: bool
    instead: list[str]
    """Requirements that replaced those of pyproject.toml."""
    tests: list[str]
    """What pytest was given."""
    versions: dict[str, str]
    """Of Python, and of all packages in the environment."""
    passed: int
    skipped: int
    failed: list[str]
    seconds: float
    about: dict[str, Any]

    @property
    def title(self) -> str:
        """How the versions were chosen."""
        if self.instead:
            return "newest, but " + ", ".join(f"`{one}`" for one in self.instead)
        return "lowest" if self.lowest else "newest"


def install(wheel: Path, folder: Path, python: str, lowest: bool, instead: Sequence[str]) -> None:
    """Make a virtual environment with the wheel, its extras and the newest or lowest versions."""
    overrides = folder.with_suffix(".txt")
    overrides.write_text("\n".join(instead))
    _uv("venv", "--python", python, folder)
    _uv(
        "pip", "install", "--python", folder, "--overrides", overrides,
        "--resolution", "lowest-direct" if lowest else "highest",
        f"tokenconv[{EXTRAS}] @ {wheel.as_uri()}",
    )  # fmt: skip


def installed(folder: Path) -> dict[str, str]:
    """The versions of Python and of all packages in an environment."""
    python = subprocess.run(
        [folder / "bin/python", "-c", "import platform; print(platform.python_version())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    packages = json.loads(_uv("pip", "list", "--python", folder, "--format", "json", quiet=True))
    return {"python": python.stdout.strip()} | {one["name"]: one["version"] for one in packages}


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist without the library's sources; returns where its files are."""
    with tarfile.open(sdist) as archive:
        members = [one for one in archive if "tokenconv" not in Path(one.name).parts[1:2]]
        archive.extractall(folder, members, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def test(environment: Path, sources: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run pytest in an environment: what passed, was skipped and failed, and the seconds."""
    report = sources.with_suffix(".xml")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pytest = environment / "bin" / "pytest"
    done = subprocess.run([pytest, f"--junitxml={report}", *words], cwd=sources, env=clean)
    if not report.exists():
        sys.exit(f"error: pytest ended with {done.returncode} and left no report")
    return outcome(report)


def outcome(report: Path) -> dict[str, Any]:
    """What a JUnit report tells."""
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


def attempt(dist: Path, args: argparse.Namespace) -> Run:
    """Install what is in a folder and run the tests."""
    ((wheel,), (sdist,)) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        environment, unpacked = Path(folder, "environment"), Path(folder, "sdist")
        install(wheel.resolve(), environment, args.python, args.lowest, args.instead)
        found = test(environment, unpack_tests(sdist, unpacked), args.tests)
        versions = installed(environment)
    about = facts(torch.device("cpu"))
    del about["versions"]  # those of this process
    return Run(
        lowest=args.lowest, instead=args.instead, tests=args.tests, versions=versions,
        about=about, **found,
    )  # fmt: skip


def page(runs: Iterable[Run]) -> str:
    """What is supported, and the runs that show it."""
    runs = [*runs]
    whole = [run for run in runs if not run.instead and not run.failed]
    lines = [
        "# Supported versions",
        "",
        "Each row is a run of the library's tests against the wheel, installed in a new virtual",
        "environment on Linux, on a CPU. *Lowest* takes the lowest version that `pyproject.toml` allows",
        "of everything that it names, *newest* the newest of everything.",
        "",
        "| versions | Python | " + " | ".join(SHOWN) + " | passed | skipped | failed |",
        "|---" * (len(SHOWN) + 2) + "|---:" * 3 + "|",
    ]
    return "\n".join(lines) + "\n"


def kept() -> list[Run]:
    """The runs that were kept."""
    return [Run(**row) for row in json.loads(RUNS.read_text())["runs"]] if RUNS.exists() else []


def keep(run: Run) -> None:
    """Add a run to the kept ones, in place of one of the same versions and tests."""


def _uv(*words: object, quiet: bool = False) -> str:
    done = subprocess.run(
        ["uv", *map(str, words)], stdout=subprocess.PIPE if quiet else None, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: uv {words[0]} ended with {done.returncode}")
    return done.stdout
