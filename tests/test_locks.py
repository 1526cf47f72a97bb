"""Locks that many processes take and give back, file and all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenconv import locks

COUNTS = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("locks", sys.argv[1])
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
count = Path(sys.argv[2])
for _ in range(int(sys.argv[3])):
    with locks.locked(count.with_name(".lock")):
        number = int(count.read_text())
        count.write_text(str(number + 1))
    print(number, flush=True)
"""


def counter(count: Path, times: int) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", COUNTS, str(locks.__file__), str(count), str(times)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_processes_take_turns_though_the_file_goes_each_time(tmp_path: Path):
    count = tmp_path / "count"
    count.write_text("0")
    processes = [counter(count, 100) for _ in range(3)]
    seen = [int(number) for one in processes for number in one.communicate()[0].split()]
    assert sorted(seen) == [*range(300)]
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_who_does_not_wait_is_told(tmp_path: Path):
    with (
        locks.locked(tmp_path / ".lock"),
        pytest.raises(TimeoutError),
        locks.locked(tmp_path / ".lock", wait_s=0),
    ):
        raise AssertionError("two have the lock")


def test_a_lock_ends_with_its_process(tmp_path: Path):
    count = tmp_path / "count"
    count.write_text("0")
    process = counter(count, 10**6)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locks.locked(tmp_path / ".lock", wait_s=5):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()
