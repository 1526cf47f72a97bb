"""Supported versions are those that were tested."""

import dataclasses
import io
import json
import tarfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite errors="1" failures="1" skipped="1" tests="5" time="12.6">
  <testcase classname="tests.test_grid" name="test_a"/>
  <testcase classname="tests.test_grid" name="test_b[1-2]"><failure message="no"/></testcase>
  <testcase classname="tests.test_grid" name="test_c"><skipped message="why"/></testcase>
  <testcase classname="tests.ops.test_d" name="test_d"><error message="no"/></testcase>
  <testcase classname="tests.ops.test_d" name="test_e"/>
</testsuite></testsuites>
"""


@pytest.fixture
def versions(load_benchmark):
    return load_benchmark("versions")


@pytest.fixture
def kept_elsewhere(versions, monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "RUNS", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "PAGE", tmp_path / "versions.md")
    return tmp_path


def some_run(module, **changes):
    named = dict.fromkeys([*module.NAMED, *module.needed()], "1.0")
    facts = {
        "lowest": False, "instead": [], "tests": [], "seconds": 9, "passed": 7,
        "skipped": 1, "failed": [], "versions": {"python": "3.11.7", **named},
        "about": {"commit": "0123456789", "date": "2026-11-28T20:00:00+00:00"},
    }  # fmt: skip
    return module.Run(**(facts | changes))


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda one: one.name)
def test_the_lowest_of_each_package_was_tested(versions, requirement):
    """After a change of pyproject.toml: ``make test-lowest``, with ``--keep``."""
    ((floor),) = [one.version for one in requirement.specifier if one.operator == ">="]
    tried = [run for run in versions.kept() if run.lowest and not run.failed and not run.instead]
    assert Version(floor) in [Version(run.versions[requirement.name.lower()]) for run in tried]


def test_every_python_that_is_named_was_tested(versions):
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if " :: 3." in line}
    passed = [run for run in versions.kept() if not run.failed]
    assert named == {run.versions["python"].rpartition(".")[0] for run in passed}


def test_the_page_is_of_the_runs_that_are_kept(versions):
    assert versions.PAGE.read_text() == versions.page(versions.kept())


def test_a_run_replaces_the_one_of_the_same_versions(versions, kept_elsewhere):
    first = some_run(versions, failed=["tests.test_grid::test_a"])
    other = some_run(versions, instead=["timm==1.0"])
    newer = some_run(versions, versions={**first.versions, "timm": "1.1"})
    for run in (first, other, newer):
        versions.keep(run)
    assert versions.kept() == [first, other, newer]
    assert "| 1 (1) |" in versions.PAGE.read_text()
    assert "1. `tests.test_grid::test_a`" in versions.PAGE.read_text()
    again = dataclasses.replace(first, failed=[], about={**first.about, "commit": "abcdef0123"})
    versions.keep(again)
    assert versions.kept() == [other, newer, again]
    versions.PAGE.unlink()
    assert versions.main([]) == 0
    page = versions.PAGE.read_text()
    assert "| 1 (1) |" not in page
    assert "| timm | not run | 1.1 |" in page
    assert "newest, `timm==1.0`" in page


def test_failures_and_errors_of_a_report_are_told(versions, tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert versions.outcome(tmp_path / "report.xml") == {
        "passed": 2,
        "skipped": 1,
        "failed": ["tests.test_grid::test_b[1-2]", "tests.ops.test_d::test_d"],
        "seconds": 13,
    }


def test_no_source_of_the_library_is_in_reach(versions, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in ("a-1/pyproject.toml", "a-1/tokenconv/grid.py", "a-1/tests/tokenconv/t.py"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    unpacked = versions.unpack(tmp_path / "a.tar.gz", tmp_path / "sdist")
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "tests/tokenconv/t.py"}


def test_what_is_installed_is_what_was_asked_for(versions, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(versions, "_uv", lambda *words: calls.append([*map(str, words)]))
    monkeypatch.setattr(versions, "installed", lambda folder: dict.fromkeys(versions.needed(), "2"))
    wheel, folder = tmp_path / "tokenconv-1.whl", tmp_path / "environment"
    versions.install(wheel, ROOT, folder, "3.12", lowest=True, instead=["timm==1.0.25"])
    (*_, python, _), needed, tools = calls
    assert python == "3.12"
    assert {"--resolution=lowest-direct", "--extra=deploy", str(wheel)} <= set(needed)
    assert "--extra=test" in tools
    assert Path(tools[tools.index("--constraints") + 1]).read_text().startswith("torch==2\n")
    for words in (needed, tools):
        assert words[words.index("--requirements") + 1] == str(ROOT / "pyproject.toml")
        assert Path(words[words.index("--overrides") + 1]).read_text() == "timm==1.0.25"


@pytest.mark.parametrize("there", [[], ["a.whl"], ["a.whl", "b.whl", "a.tar.gz"]])
def test_a_folder_without_one_wheel_and_its_sdist_is_refused(versions, tmp_path, there):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match=r"expected one wheel and its sdist in .*make dist"):
        versions.main([str(tmp_path)])


def test_a_run_is_a_row_and_its_failures_are_the_exit_status(
    versions, kept_elsewhere, monkeypatch, capsys
):
    for failed in ([], ["tests.test_grid::test_a"]):
        run = some_run(versions, failed=failed)
        asked = []
        monkeypatch.setattr(versions, "attempt", lambda args: asked.append(args) or run)  # noqa: B023
        assert versions.main(["dist", "--tests", "-m 'not slow' tests", "--keep"]) == len(failed)
        assert asked[0].tests == ["-m", "not slow", "tests"]
        assert versions.kept() == [run]
        assert "| newest | 3.11.7 | 1.0 |" in capsys.readouterr().out
    assert json.loads(versions.RUNS.read_text())["runs"]
