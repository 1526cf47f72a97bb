"""The folder of a report: written whole, or not at all."""

from pathlib import Path

import pytest

from tokenconv import MeasurementError
from tokenconv.profiling import COMPARISON_FILES
from tokenconv.reports import alone_in, report_folder


def snapshot(folder: Path) -> dict[str, str]:
    """Everything under a folder, hidden or not."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "(folder)"
        for path in folder.rglob("*")
    }


def fill(staging: Path) -> None:
    (staging / "compare.json").write_text("new")
    (staging / "traces" / "mix_ffn").mkdir(parents=True)
    (staging / "traces" / "mix_ffn" / "infer.2.pt.trace.json.gz").write_text("new")


def test_files_appear_only_when_all_is_done(tmp_path: Path):
    out = tmp_path / "deep" / "report"
    with report_folder(out) as staging:
        fill(staging)
        assert not out.exists()
    assert snapshot(out) == {
        "compare.json": "new",
        "traces": "(folder)",
        "traces/mix_ffn": "(folder)",
        "traces/mix_ffn/infer.2.pt.trace.json.gz": "new",
    }
    assert list(out.parent.iterdir()) == [out]


def old_report(tmp_path: Path) -> Path:
    out = tmp_path / "report"
    (out / "traces" / "mix_ffn").mkdir(parents=True)
    (out / "traces" / "mix_ffn" / "infer.1.pt.trace.json.gz").write_text("old")
    (out / "traces" / "mix_ffn" / "notes.txt").write_text("mine")
    (out / "compare.json").write_text("old")
    (out / "notes.txt").write_text("mine")
    return out


def test_an_old_report_is_replaced_and_foreign_files_stay(tmp_path: Path):
    out = old_report(tmp_path)
    with report_folder(out, instead_of=COMPARISON_FILES) as staging:
        fill(staging)
        assert (out / "compare.json").read_text() == "old"
    assert snapshot(tmp_path) == {
        "report": "(folder)",
        "report/compare.json": "new",
        "report/notes.txt": "mine",
        "report/traces": "(folder)",
        "report/traces/mix_ffn": "(folder)",
        "report/traces/mix_ffn/infer.2.pt.trace.json.gz": "new",
        "report/traces/mix_ffn/notes.txt": "mine",
    }


def test_traces_of_an_earlier_run_go_with_its_report(tmp_path: Path):
    """A report without traces must not stand beside traces of other figures."""
    out = old_report(tmp_path)
    with report_folder(out, instead_of=COMPARISON_FILES) as staging:
        (staging / "compare.json").write_text("new")
    assert not list(out.rglob("*.gz"))
    assert (out / "traces" / "mix_ffn" / "notes.txt").read_text() == "mine"


def test_an_existing_folder_is_staged_inside(tmp_path: Path):
    """It may be a disk of its own, such as a mounted volume, which nothing can be renamed into."""
    out = old_report(tmp_path)
    with report_folder(out) as staging:
        assert staging.parent == out


def fail_in_the_middle(out: Path, error: type[BaseException]) -> None:
    with report_folder(out) as staging:
        fill(staging)
        raise error("in the middle")


@pytest.mark.parametrize("error", [ValueError, MeasurementError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error, match="in the middle"):
        fail_in_the_middle(tmp_path / "report", error)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_old_report_survives_an_error(tmp_path: Path, error: type[BaseException]):
    out = old_report(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(error, match="in the middle"):
        fail_in_the_middle(out, error)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["file", "file/report", "file/deep/report"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, where: str):
    (tmp_path / "file").write_text("mine")
    entered = False
    with (
        pytest.raises(MeasurementError, match=r"cannot write a report to .*file"),
        report_folder(tmp_path / where),
    ):
        entered = True
    assert not entered
    assert snapshot(tmp_path) == {"file": "mine"}


# --- alone in it ---


def enter(out: Path) -> None:
    with alone_in(out):
        pass


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path):
    out = tmp_path / "deep" / "report"
    with alone_in(out):
        with pytest.raises(MeasurementError, match=r"another run is writing to .*report: wait"):
            enter(out)
        with report_folder(out) as staging:
            fill(staging)
    enter(out)
    assert "compare.json" in snapshot(out)
    assert not list(out.glob(".*"))


def test_a_folder_that_nothing_came_into_goes_again(tmp_path: Path):
    enter(tmp_path / "deep" / "new")
    assert snapshot(tmp_path) == {}
    (tmp_path / "mine").mkdir()
    enter(tmp_path / "mine")
    assert snapshot(tmp_path) == {"mine": "(folder)"}


def test_what_a_killed_run_left_unfinished_goes(tmp_path: Path):
    out = old_report(tmp_path)
    before = snapshot(tmp_path)
    fill_unfinished = out / ".report-unfinished"
    fill_unfinished.mkdir()
    fill(fill_unfinished)
    enter(out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["file", "file/report"])
def test_nobody_is_alone_where_nobody_can_write(tmp_path: Path, where: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MeasurementError, match=r"cannot write a report to .*file"):
        enter(tmp_path / where)
    assert snapshot(tmp_path) == {"file": "mine"}
