"""The files of a report: what they say, and that they are written whole or not at all."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tokenconv import MeasurementError
from tokenconv.profiling import Arm, Comparison, Measured, Spread, report_folder, write_report
from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.report.figure import write_figure
from tokenconv.profiling.report.markdown import to_markdown
from tokenconv.profiling.traces import Category, Operator

MODES: tuple[Mode, ...] = ("infer", "train")
ABOUT = {
    "model": "pvt_v2_b0",
    "weights": "random",
    "command": "tokenconv compare pvt_v2_b0 --block mix_ffn",
    "allocator": "glibc, keeps freed memory",
}


def arm(name: str, *, factor: float, difference: float, modes: tuple[Mode, ...] = MODES) -> Arm:
    """An arm that takes ``factor`` times as long as the baseline, and more memory by its root."""
    share = {category.value: 0.1 for category in Category} | {Category.ATTENTION.value: 0.4}
    latency = {"infer": 20 * factor, "train": 80 * factor}
    return Arm(
        name=name,
        params=int(3_600_000 * factor),
        macs=44_000_000,
        macs_by_flop_counter=44_000_000,
        bytes=10**7,
        max_abs_diff_at_insertion=difference,
        modes={
            mode: Measured(
                latency_ms=Spread(ms := latency[mode], 0.2 * ms, 0.9 * ms, 1.1 * ms),
                images_per_s=4000 / ms,
                peak_memory_mib=50 * factor**0.5,
                time_share=share,
                operators={"aten::addmm": Operator(24, 3.0)}
                | ({"aten::_conv_depthwise2d": Operator(12, 4.5 * factor)} if factor > 2 else {}),
            )
            for mode in modes
        },
        ratios={
            "params": factor,
            "macs": 1.0,
            **{
                mode: {
                    "latency": {
                        "median": factor,
                        "iqr": 0.11,
                        "q25": 0.9,
                        "q75": 1.1,
                        "low": 0.95 * factor,
                        "high": 1.05 * factor,
                        "verdict": "no difference shown" if factor == 1 else "slower",
                    },
                    "peak_memory": factor**0.5,
                }
                for mode in modes
            },
        },
    )


def made_up(modes: tuple[Mode, ...] = MODES) -> Comparison:
    return Comparison(
        baseline="attention_only",
        reference="original",
        batch_size=4,
        input_size=(3, 64, 96),
        rounds=dict.fromkeys(modes, 20),
        load=(0.25, 2.0),
        governor="performance",
        compiled=False,
        device="cpu (made up)",
        dtype="float32",
        threads=2,
        versions={"python": "3.11.7", "torch": "2.15.0"},
        memory_source="memory events of the profiler",
        date="2026-01-02T03:04:05+00:00",
        arms=(
            arm("attention_only", factor=1, difference=0.17, modes=modes),
            arm("original", factor=1.44, difference=0, modes=modes),
            arm("mix_ffn", factor=2.25, difference=0, modes=modes),
        ),
        warnings=("the machine was busy before: 3.0 processes on 2 cores",),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(made_up(), folder, about=ABOUT)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    return (folder / "report.md").read_text()


def section(report: str, title: str) -> str:
    """The text under a heading; the one before the first heading for an empty title."""
    parts = re.split(r"^## (.*)\n", report, flags=re.MULTILINE)
    return parts[0] if not title else dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- compare.json ---


def test_json_is_the_comparison_and_what_is_known_about_it(folder: Path):
    content = json.loads((folder / "compare.json").read_text())
    expected: dict[str, Any] = json.loads(json.dumps(made_up().to_dict() | ABOUT))
    assert content == expected
    assert [arm["name"] for arm in content["arms"]] == ["attention_only", "original", "mix_ffn"]
    assert content["arms"][2]["modes"]["train"]["latency_ms"]["median"] == 180


# --- report.md ---


def test_report_names_the_model_and_every_arm(report: str):
    title = report.splitlines()[0]
    assert title == "# pvt_v2_b0: attention_only, original, mix_ffn"


def test_report_begins_with_what_was_found(report: str):
    findings = section(report, "")
    assert (
        "- Inference of **mix_ffn** takes 2.25x the time of attention_only (2.14 to 2.36: slower; "
        "45.0 ms for 4 images) and 1.50x its memory." in findings
    )
    assert "- A training step of **original** takes 1.44x the time of attention_only" in findings
    assert "**attention_only** takes" not in findings, "the baseline is not compared with itself"
    assert "- The output of **mix_ffn** is equal to that of original, bit for bit." in findings


def test_report_lists_operators_that_differ(report: str):
    header, _, *body = rows(section(report, "Operators that differ"))
    assert header[:4] == ["mode", "arm", "operator", ""]
    assert body == [
        [mode, "mix_ffn", "`aten::_conv_depthwise2d`", "appears", "0", "12", "0.00", "10.12"]
        for mode in MODES
    ]
    equal = dataclasses.replace(made_up(), arms=made_up().arms[:2])
    assert "Every arm runs the operators of the baseline" in to_markdown(equal, ABOUT)


def test_report_warns_before_it_shows_figures(report: str):
    assert "> Warning: the machine was busy before: 3.0 processes" in section(report, "")
    assert "Warning" not in to_markdown(dataclasses.replace(made_up(), warnings=()), ABOUT)


def test_report_tells_a_difference_of_the_output():
    made = made_up()
    moved = dataclasses.replace(made.arms[2], max_abs_diff_at_insertion=0.125)
    made = dataclasses.replace(made, arms=(*made.arms[:2], moved))
    assert "of **mix_ffn** differs from that of original by up to 0.12." in to_markdown(made, ABOUT)


def test_report_tells_macs_that_are_not_confirmed(report: str):
    assert "not confirmed" not in report
    made = made_up()
    doubtful = dataclasses.replace(made.arms[2], macs_by_flop_counter=43_000_000)
    made = dataclasses.replace(made, arms=(*made.arms[:2], doubtful))
    expected = "MACs of **mix_ffn** are not confirmed: 44,000,000 by formula, 43,000,000 by"
    assert expected in to_markdown(made, ABOUT)


def test_report_has_a_row_of_figures_per_mode_and_arm(report: str):
    header, _, *body = rows(section(report, "Figures"))
    assert [row[:2] for row in body] == [
        [mode, name] for mode in MODES for name in ("attention_only", "original", "mix_ffn")
    ]
    found = dict(zip(header, body[5], strict=True))
    assert found["latency ms (IQR)"] == "180.0 (36.0)"
    assert found["vs baseline (99% interval)"] == "2.250x (2.137-2.363)"
    assert found["verdict"] == "slower"
    assert found["peak MiB"] == "75.0"
    assert found["params"] == "8.100 M"
    assert dict(zip(header, body[0], strict=True))["vs baseline (99% interval)"] == "baseline"


def test_report_has_the_share_of_every_category(report: str):
    header, _, *body = rows(section(report, "Where the time goes"))
    assert [row[0] for row in body] == [category.value for category in Category]
    assert header[1:] == [
        f"{mode}: {name}" for mode in MODES for name in ("attention_only", "original", "mix_ffn")
    ]
    assert body[0][1:] == ["40.0%"] * 6
    assert body[1][1:] == ["10.0%"] * 6


def test_report_says_how_to_repeat_it(report: str):
    environment = section(report, "How to repeat it").splitlines()
    for line in (
        "- command: tokenconv compare pvt_v2_b0 --block mix_ffn",
        "- weights: random",
        "- allocator: glibc, keeps freed memory",
        "- images: 4 of 3x64x96, float32",
        "- device: cpu (made up), 2 threads",
        "- rounds: 20 infer, 20 train",
        "- load: 0.2 before, 2.0 after",
        "- governor: performance",
        "- versions: python 3.11.7, torch 2.15.0",
        "- date: 2026-01-02T03:04:05+00:00",
    ):
        assert line in environment


def test_report_says_what_compiling_does_to_the_shares(report: str):
    compiled = to_markdown(dataclasses.replace(made_up(), compiled=True), ABOUT)
    assert "- compiled: yes" in compiled
    assert "- compiled: no" in report
    note = "Compiled kernels do the work of several operators; they count as other."
    assert note in section(compiled, "Where the time goes")
    assert note not in report


def test_report_shows_a_figure_that_is_there(folder: Path, report: str):
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", report)
    assert (folder / picture).is_file()


# --- compare.png ---


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.verify()
    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(maxcolors=2**24)
        assert colors is not None
        assert len(colors) > 20, "bars, text and background"
        return image.size


def test_figure_is_a_picture_of_sensible_size(folder: Path):
    width, height = picture_size(folder / "compare.png")
    assert 800 <= width <= 3000
    assert 300 <= height <= 3000


def test_figure_grows_with_modes_and_arms(tmp_path: Path, folder: Path):
    """One arm in one mode is the smallest; matplotlib would warn if nothing fitted."""
    single = made_up(modes=("infer",))
    single = dataclasses.replace(single, arms=single.arms[:1])
    many = made_up()
    named = tuple(dataclasses.replace(many.arms[2], name=f"mix_ffn_{i}") for i in range(9))
    many = dataclasses.replace(many, arms=(*many.arms, *named))
    heights = []
    for name, comparison in (("single", single), ("many", many)):
        (tmp_path / name).mkdir()
        write_report(comparison, tmp_path / name, about=ABOUT)
        heights.append(picture_size(tmp_path / name / "compare.png")[1])
    assert heights[0] < picture_size(folder / "compare.png")[1] < heights[1]


def test_whiskers_and_labels_stay_inside_however_wide_the_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    comparison = made_up()
    for each in comparison.arms:
        for measured in each.modes.values():
            ms = measured.latency_ms.median
            object.__setattr__(measured, "latency_ms", Spread(ms, 2 * ms, 0.5 * ms, 2.5 * ms))
    write_figure(comparison, "noisy", tmp_path / "compare.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    latency = figure.axes[0]
    inside = latency.get_window_extent()
    assert latency.get_xlim()[1] > max(a.modes["infer"].latency_ms.q75 for a in comparison.arms)
    labels = [text for text in latency.texts if text.get_text()]
    assert len(labels) == len(comparison.arms)
    for label in labels:
        assert label.get_visible()
        assert label.get_window_extent().x0 < inside.x1


# --- the folder ---


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
    with report_folder(out) as staging:
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
    with report_folder(out) as staging:
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
