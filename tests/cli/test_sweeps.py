"""Sweeps: every point is kept as it finishes, and none is measured twice."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tokenconv.cli import commands, main
from tokenconv.errors import MeasurementError
from tokenconv.profiling import machine, read_comparison

FAST = "compare test_vit --block mix_ffn --repeats 1 --mode infer --batch-size 1"
SIZES = "--sweep img-size=32,32x64"
POINTS = [
    "img-size=32,kernel-size=3", "img-size=32,kernel-size=5",
    "img-size=32x64,kernel-size=3", "img-size=32x64,kernel-size=5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "steady_allocator", lambda: "not touched")


def run(options: str, out: Path) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main([*options.split(), "--out", str(out)])
    return status, stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the images of every comparison that really ran."""
    sizes: list[tuple[int, ...]] = []
    compare = commands.compare

    def counted(arms: Any, images: Any, **kwargs: Any) -> Any:
        sizes.append(tuple(images.shape[2:]))
        return compare(arms, images, **kwargs)

    monkeypatch.setattr(commands, "compare", counted)
    return sizes


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "points").iterdir())


def test_every_combination_is_a_point(tmp_path: Path, measured: list[tuple[int, ...]]):
    words = f"{FAST} {SIZES} --sweep kernel-size=3,5"
    status, out, err = run(words, tmp_path)
    assert status == 0, err
    assert measured == [(32, 32)] * 2 + [(32, 64)] * 2
    assert names(tmp_path) == POINTS
    for name in POINTS:
        folder = tmp_path / "points" / name
        found = read_comparison(folder / "compare.json")
        size, kernel = re.fullmatch(r"img-size=(.*),kernel-size=(.)", name).groups()
        expected = tuple(int(side) for side in (size.split("x") * 2)[:2])
        assert found.input_size == (3, *expected)
        plain, hybrid = (arm.params for arm in found.arms)
        assert hybrid - plain == 6 * 192 * (int(kernel) ** 2 + 1)
        assert (folder / "report.html").is_file()
        assert found.about["command"].startswith(f"tokenconv {FAST} ")
        assert "--sweep" not in found.about["command"]
    page = (tmp_path / "report.html").read_text()
    for name in POINTS:
        assert f"points/{name}/report.html" in page.replace("%3D", "=").replace("%2C", ",")
    report = (tmp_path / "report.md").read_text()
    assert f"tokenconv {words}" in report
    for name in ("report.html", "report.md", "points"):
        assert str(tmp_path / name) in out
    assert (tmp_path / "sweep.png").is_file()
    assert (tmp_path / "sweep.svg").is_file()


def test_the_command_of_a_point_repeats_it(tmp_path: Path, measured: list[tuple[int, ...]]):
    run(f"{FAST} --sweep batch-size=1,2", tmp_path)
    words = read_comparison(tmp_path / "points" / "batch-size=2" / "compare.json").about["command"]
    assert main(words.split()[1:]) == 0
    again = read_comparison(tmp_path / "points" / "batch-size=2" / "compare.json")
    assert (again.batch_size, again.about["command"]) == (2, words)


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    tmp_path: Path, measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    words = f"{FAST} {SIZES} --sweep kernel-size=3,5"
    counted = commands.compare

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    monkeypatch.setattr(commands, "compare", interrupt)
    status, _, err = run(words, tmp_path)
    assert status == 130
    assert "interrupted; finished points are kept in" in err
    assert names(tmp_path) == POINTS[:2]
    assert not (tmp_path / "report.html").exists()
    before = {n: (tmp_path / "points" / n / "compare.json").read_bytes() for n in POINTS[:2]}
    monkeypatch.setattr(commands, "compare", counted)
    measured.clear()
    status, _, err = run(words, tmp_path)
    assert status == 0, err
    assert measured == [(32, 64)] * 2
    assert names(tmp_path) == POINTS
    for name, content in before.items():
        assert (tmp_path / "points" / name / "compare.json").read_bytes() == content
    assert (tmp_path / "report.html").is_file()


def test_other_words_are_another_sweep(tmp_path: Path, measured: list[tuple[int, ...]]):
    run(f"{FAST} {SIZES}", tmp_path)
    assert len(measured) == 2
    run(f"{FAST} {SIZES}", tmp_path)
    assert len(measured) == 2, "finished"
    run(f"{FAST} --sweep img-size=32,32x64,64", tmp_path)
    assert len(measured) == 3, "one point is new"
    run(f"{FAST} --blocks 0 --sweep img-size=32", tmp_path)
    assert len(measured) == 4


@pytest.mark.parametrize("damage", ["{", "other version"])
def test_a_point_that_cannot_be_read_is_measured_again(
    tmp_path: Path, measured: list[tuple[int, ...]], damage: str
):
    run(f"{FAST} --sweep img-size=32", tmp_path)
    path = tmp_path / "points" / "img-size=32" / "compare.json"
    content = {**json.loads(path.read_text()), "schema_version": 1}
    path.write_text("{" if damage == "{" else json.dumps(content))
    status, _, err = run(f"{FAST} --sweep img-size=32", tmp_path)
    assert status == 0, err
    assert len(measured) == 2
    assert read_comparison(path).batch_size == 1


def test_a_point_of_another_machine_is_measured_again(
    tmp_path: Path, measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    words = f"{FAST} --sweep img-size=32"
    run(words, tmp_path)
    for name, value in (
        ("device_name", "a Cray"),
        ("versions", {"torch": "3.0"}),
    ):
        monkeypatch.setattr(machine, name, lambda *args, value=value: value)
        measured.clear()
        assert run(words, tmp_path)[0] == 0
        assert len(measured) == 1, name
        assert run(words, tmp_path)[0] == 0
        assert len(measured) == 1, "it is known now"


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, measured: list[tuple[int, ...]]):
    unfinished = tmp_path / "points" / "img-size=32" / ".img-size=32-unfinished"
    unfinished.mkdir(parents=True)
    (tmp_path / "points" / ".DS_Store").touch()
    with FileLock(tmp_path / ".lock"):
        status, _, err = run(f"{FAST} --sweep img-size=32", tmp_path)
    assert status == 1
    assert "another run is writing to" in err
    assert unfinished.is_dir(), "it may be the other's"
    assert measured == []
    assert run(f"{FAST} --sweep img-size=32", tmp_path)[0] == 0
    assert not unfinished.exists()
    assert (tmp_path / "points" / ".DS_Store").exists()


def test_a_point_that_fails_loses_no_other_and_is_tried_again(
    tmp_path: Path, measured: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    counted = commands.compare

    def fail(arms: Any, images: Any, **kwargs: Any) -> Any:
        if images.shape[2:] == (32, 32):
            raise MeasurementError("no arm can be measured; baseline: out of memory: 8 EiB")
        return counted(arms, images, **kwargs)

    monkeypatch.setattr(commands, "compare", fail)
    status, _, err = run(f"{FAST} {SIZES}", tmp_path)
    assert status == 1
    assert "tokenconv: error: img-size=32: no arm can be measured; baseline: out of memory" in err
    assert names(tmp_path) == ["img-size=32x64"]
    assert "out of memory: 8 EiB" in (tmp_path / "report.md").read_text()
    assert "out of memory: 8 EiB" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(commands, "compare", counted)
    measured.clear()
    assert run(f"{FAST} {SIZES}", tmp_path)[0] == 0
    assert measured == [(32, 32)]
    assert "out of memory" not in (tmp_path / "report.md").read_text()


def test_sizes_that_a_model_refuses_are_told(tmp_path: Path):
    status, _, err = run(f"{FAST} --sweep img-size=32,33", tmp_path)
    assert status == 1
    assert "tokenconv: error: img-size=33: the model refuses an image of 3x33x33" in err
    assert names(tmp_path) == ["img-size=32"]


def test_a_sweep_of_nothing_is_an_error(tmp_path: Path, measured: list[tuple[int, ...]]):
    status, _, err = run(f"{FAST} --sweep img-size=33,34", tmp_path / "report")
    assert status == 1
    assert "no point of the sweep could be measured: the model refuses" in err
    assert not (tmp_path / "report" / "report.html").exists()
    status, _, err = run(f"{FAST.replace('mix_ffn', 'mixffn')} {SIZES}", tmp_path / "other")
    assert status == 1
    assert "unknown block 'mixffn': did you mean mix_ffn" in err
    assert measured == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sweep colour=red", "expected one of img-size, batch-size"),
        ("--sweep batch-size", "and different values, such as batch-size=1,8"),
        ("--sweep batch-size=1,,2", "different values"),
        ("--sweep batch-size=1,1", "different values"),
        ("--sweep batch-size=1,two", "expected a positive integer, got two"),
        ("--sweep memory-format=nhwc", "invalid choice: 'nhwc'"),
        ("--sweep batch-size=1,2 --against old.json", "--against takes one comparison"),
        ("--swee batch-size=1,2", "unrecognized arguments"),
        ("--sweep batch-size=1 --sweep batch-size=2", "--sweep batch-size twice: give all values"),
        ("--fail-if ratio>1.1", "--fail-if says what is worse than a comparison"),
    ],
)
def test_sweeps_that_make_no_sense_are_wrong_usage(
    tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main([*FAST.split(), *options.split(), "--out", str(tmp_path / "report")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path: Path):
    words = [*FAST.split(), *SIZES.split(), "--sweep", "kernel-size=3,5", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tokenconv", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 240
    second = tmp_path / "points" / POINTS[1] / "compare.json"
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("points/*/compare.json")}
    assert 2 <= len(kept) < 4
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == POINTS
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not [path for path in tmp_path.rglob(".*") if path.is_dir()], "left by the killed run"
