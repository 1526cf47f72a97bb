"""``report.md`` and ``compare.json``: what they say."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenconv.profiling.measurement import MIB
from tokenconv.profiling.report import changes_table, write_sweep
from tokenconv.profiling.report.markdown import sweep_to_markdown, to_markdown
from tokenconv.profiling.results import Comparison, Point, read_comparison

MODES = ("infer", "train")
ARMS = ("attention_only", "original", "mix_ffn")
MakeUp = Callable[..., Comparison]


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    return (folder / "report.md").read_text("utf-8")


@pytest.fixture(scope="module")
def sweep_report(sweep: list[Point]) -> str:
    return sweep_to_markdown(sweep, {"model": "pvt_v2_b0", "command": "tokenconv compare"})


def section(report: str, title: str) -> str:
    """The text under a heading; the one before the first heading for an empty title."""
    parts = re.split(r"^## (.*)\n", report, flags=re.MULTILINE)
    return parts[0] if not title else dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def changed(comparison: Comparison, arm: str, /, **values: object) -> Comparison:
    """The same with other facts about an arm."""
    arms = [dataclasses.replace(a, **values) if a.name == arm else a for a in comparison.arms]
    return dataclasses.replace(comparison, arms=tuple(arms))


# --- compare.json ---


def test_json_is_the_comparison(folder: Path, made_up: MakeUp):
    assert read_comparison(folder / "compare.json") == made_up()


# --- report.md ---


def test_report_names_the_model_and_every_arm(report: str):
    title = report.splitlines()[0]
    assert title == "# pvt_v2_b0: attention_only, original, mix_ffn"


def test_report_without_a_model_has_a_title(made_up: MakeUp):
    unknown = dataclasses.replace(made_up(), about={})
    assert to_markdown(unknown).startswith("# Comparison: attention_only, original, mix_ffn\n")


def test_report_begins_with_what_was_found(report: str):
    found = section(report, "")
    assert "4 images of 3x64x96 in float32 on cpu (made up), 2 threads" in found
    assert (
        "- Inference of mix_ffn takes 2.25x the time of attention_only (2.14 to 2.36: slower; "
        "45.0 ms for 4 images) and 1.50x its memory." in found
    )
    assert "- A training step of original takes 1.44x the time of attention_only" in found
    assert "attention_only takes" not in found, "the baseline is not compared with itself"
    assert "- The output of mix_ffn is equal to that of original, bit for bit." in found


def test_report_sums_up_before_all(report: str):
    first = report.splitlines()[2]
    assert first == (
        "Inference: original (1.44x the time) and mix_ffn (2.25x the time) are slower than "
        "attention_only. A training step: original (1.44x the time) and mix_ffn (2.25x the time) "
        "are slower than attention_only."
    )


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        (("faster", "slower"), "original (1.44x the time) is faster than attention_only; mix_ffn"),
        (("slower", "faster"), "mix_ffn (2.25x the time) is faster than attention_only."),
        (
            ("no difference shown", "slower"),
            "no difference from attention_only is shown for original (1.44x the time); mix_ffn",
        ),
    ],
)
def test_every_verdict_has_its_words(made_up: MakeUp, verdicts: tuple[str, str], told: str):
    made = made_up(("infer",))
    for name, verdict in zip(("original", "mix_ffn"), verdicts, strict=True):
        figures = made.arm(name).modes["infer"]
        ratio = dataclasses.replace(figures.ratio, verdict=verdict)
        made = changed(made, name, modes={"infer": dataclasses.replace(figures, ratio=ratio)})
    assert told in to_markdown(made).splitlines()[2]


def test_many_arms_are_summed_up_by_their_number(made_up: MakeUp):
    made = made_up(("infer",))
    *others, last = made.arms
    more = [dataclasses.replace(last, name=f"mix_ffn_{i}") for i in range(3)]
    report = to_markdown(dataclasses.replace(made, arms=(*others, last, *more)))
    assert report.startswith("# pvt_v2_b0: 6 arms\n")
    assert report.splitlines()[2] == (
        "Inference: 5 arms (1.44x to 2.25x the time) are slower than attention_only."
    )


def test_nothing_is_summed_up_where_nothing_is_compared(made_up: MakeUp):
    made = made_up(("infer",))
    alone = dataclasses.replace(made, arms=made.arms[:1])
    assert to_markdown(alone).splitlines()[2].startswith("1 arm took turns")


def test_report_says_what_the_arms_are(report: str):
    assert section(report, "Arms").splitlines()[1:4] == [
        "- attention_only: what attention_only is; the baseline: times and memory are compared "
        "with it",
        "- original: what original is; the reference: outputs are compared with it",
        "- mix_ffn: what mix_ffn is",
    ]


def test_report_lists_operators_that_differ(report: str, made_up: MakeUp):
    header, _, *body = rows(section(report, "Operators that differ"))
    assert header[:4] == ["mode", "arm", "operator", "what it does"]
    assert body == [
        [mode, "mix_ffn", "aten::_conv_depthwise2d", "appears", "0", "12", "0.00", "10.12"]
        for mode in MODES
    ]
    equal = dataclasses.replace(made_up(), arms=made_up().arms[:2])
    assert "Every arm runs the operators of attention_only" in to_markdown(equal)
    assert changes_table(equal) == (
        "Every arm runs the operators of attention_only, as often as it does."
    )


def test_report_warns_before_it_shows_figures(report: str, made_up: MakeUp):
    assert "> - Warning: the machine was busy before: 3.0 processes" in section(report, "")
    assert "Warning" not in to_markdown(dataclasses.replace(made_up(), warnings=()))


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (0.125, "of mix_ffn differs from that of original by up to 0.12."),
        (None, "of mix_ffn could not be compared with that of original."),
    ],
)
def test_report_tells_a_difference_of_the_output(
    made_up: MakeUp, difference: float | None, expected: str
):
    assert expected in to_markdown(
        changed(made_up(), "mix_ffn", max_abs_diff_at_insertion=difference)
    )


def test_report_tells_macs_that_are_not_confirmed(report: str, made_up: MakeUp):
    assert "not confirmed" not in report
    doubtful = changed(made_up(), "mix_ffn", macs_by_flop_counter=43_000_000)
    expected = "MACs of mix_ffn are not confirmed: 44,000,000 by formula, 43,000,000 by"
    assert expected in to_markdown(doubtful)


def test_report_has_a_row_of_figures_per_mode_and_arm(report: str):
    header, _, *body = rows(section(report, "Figures"))
    assert [row[:2] for row in body] == [[mode, name] for mode in MODES for name in ARMS]
    found = dict(zip(header, body[5], strict=True))
    assert found["latency ms (IQR)"] == "180.0 (36.0)"
    assert found["vs baseline (99% interval)"] == "2.250x (2.137-2.363)"
    assert found["verdict"] == "slower"
    assert found["peak MiB"] == "300.0"
    assert found["memory vs baseline"] == "1.500x"
    assert found["params"] == "8.100 M"
    assert "compiled" not in found
    assert dict(zip(header, body[0], strict=True))["vs baseline (99% interval)"] == "baseline"


def test_an_arm_that_failed_has_rows_and_a_reason(made_up: MakeUp, failed: MakeUp):
    report = to_markdown(failed(made_up(), "mix_ffn", "train"))
    assert "> - Failed: A training step of mix_ffn: no memory left" in section(report, "")
    assert "A training step of mix_ffn takes" not in report
    header, _, *body = rows(section(report, "Figures"))
    assert [row[:2] for row in body] == [[mode, name] for mode in MODES for name in ARMS]
    found = dict(zip(header, body[5], strict=True))
    assert found["verdict"] == "failed"
    assert found["latency ms (IQR)"] == found["memory vs baseline"] == "-"
    assert rows(section(report, "Activations saved"))[0] == ["module", "attention_only", "original"]


def test_without_a_baseline_nothing_is_compared(made_up: MakeUp, failed: MakeUp):
    report = to_markdown(failed(failed(made_up(), "attention_only", "infer"), "mix_ffn", "train"))
    assert (
        "- Inference of mix_ffn takes 45.0 ms for 4 images; attention_only failed, so there is "
        "nothing to compare it with." in section(report, "")
    )
    header, _, *body = rows(section(report, "Figures"))
    assert dict(zip(header, body[2], strict=True))["vs baseline (99% interval)"] == "-"
    assert "Every arm runs the operators" in section(report, "Operators that differ")
    nowhere = failed(made_up(modes=("infer",)), "attention_only", "infer")
    expected = "attention_only failed, so there is nothing to compare operators with."
    assert changes_table(nowhere) == expected


def test_report_has_the_memory_of_every_phase(report: str):
    header, _, *body = rows(section(report, "Memory"))
    found = dict(zip(header, body[5], strict=True))
    assert "reserved" not in found, "nobody told it"
    assert found["held"] == "75.0"
    assert (found["forward"], found["backward"], found["optimizer"]) == ("210.0", "225.0", "30.0")
    assert found["peak"] == "300.0"


def test_report_has_the_reserved_memory_of_a_gpu(made_up: MakeUp):
    made = made_up(modes=("infer",))
    for arm in made.arms:
        memory = dataclasses.replace(arm.modes["infer"].memory, reserved=64 * MIB)
        arm.modes["infer"] = dataclasses.replace(arm.modes["infer"], memory=memory)
    header, _, *body = rows(section(to_markdown(made), "Memory"))
    assert dict(zip(header, body[0], strict=True))["reserved"] == "64.0"


def test_report_has_the_share_of_every_category(report: str):
    header, _, *body = rows(section(report, "Where the time goes"))
    assert header[1:] == [f"{mode}: {name}" for mode in MODES for name in ARMS]
    shares = {row[0]: row[1:] for row in body}
    assert len(shares) == 10
    assert shares["attention"] == ["40.0%"] * 6
    assert shares["depthwise convolution"] == ["10.0%"] * 6


def test_report_adds_up_what_was_inserted(report: str):
    header, _, *body = rows(section(report, "What was inserted"))
    assert len(body) == 1, "the baseline has nothing of it"
    assert dict(zip(header, body[0], strict=True)) == {
        "arm": "mix_ffn",
        "module": "blocks.\\*.mlp.act",
        "modules": "12",
        "params": "60,000",
        "MMACs": "24.00",
        "traffic MiB": "96.00",
        "infer: forward ms": "4.50",
        "infer: share": "10.0%",
        "train: forward ms": "5.40",
        "train: backward ms": "10.80",
        "train: share": "10.0%",
        "train: saved MiB": "36.0",
    }


def test_report_adds_up_what_is_saved(report: str):
    header, _, *body = rows(section(report, "Activations saved"))
    assert header == ["module", *ARMS]
    assert body == [
        ["blocks.\\*.attn", "72.0", "72.0", "72.0"],
        ["blocks.\\*.mlp.act.conv", "0.0", "0.0", "36.0"],
        ["all", "72.0", "72.0", "108.0"],
    ]


def test_what_is_saved_counts_for_the_module_that_it_is_under(made_up: MakeUp):
    """``blocks.10`` is not under ``blocks.1``."""
    made = made_up(("train",))
    *others, arm = made.arms
    figures = arm.modes["train"]
    saved = {"blocks.1": MIB, "blocks.1.conv": 2 * MIB, "blocks.10.conv": 4 * MIB}
    memory = dataclasses.replace(figures.memory, saved=saved)
    (_, cost), *_ = arm.sites.items()
    arm = dataclasses.replace(
        arm,
        sites={"blocks.1": cost},
        modes={"train": dataclasses.replace(figures, memory=memory)},
    )
    report = to_markdown(dataclasses.replace(made, arms=(*others, arm)))
    header, _, row = rows(section(report, "What was inserted"))
    assert dict(zip(header, row, strict=True))["train: saved MiB"] == "3.0"


def test_time_of_modules_that_are_compiled_is_not_known(made_up: MakeUp):
    made = made_up()
    *others, arm = made.arms
    compiled = dataclasses.replace(arm, compiled=True)
    report = to_markdown(dataclasses.replace(made, arms=(*others, compiled)))
    header, _, row = rows(section(report, "What was inserted"))
    found = dict(zip(header, row, strict=True))
    times = [name for name in header if name.endswith((" ms", "share"))]
    assert len(times) == 5
    assert {found[name] for name in times} == {"-"}
    assert found["train: saved MiB"] != "-"
    assert "mix_ffn, run eagerly" in rows(section(report, "Activations saved"))[0]


def test_modules_that_save_little_share_a_row(made_up: MakeUp):
    made = made_up()
    measured = made.arms[0].modes["train"]
    saved = {f"part{i}": (i + 1) * MIB for i in range(8)}
    memory = dataclasses.replace(measured.memory, saved=saved)
    made.arms[0].modes["train"] = dataclasses.replace(measured, memory=memory)
    one = dataclasses.replace(made, arms=made.arms[:1])
    _, _, *body = rows(section(to_markdown(one), "Activations saved"))
    assert [row[0] for row in body[:6]] == [f"part{i}" for i in range(7, 1, -1)]
    assert body[6:] == [["2 others", "3.0"], ["all", "36.0"]]


def test_report_says_which_convolutions_remain(report: str):
    assert rows(section(report, "Convolutions"))[2:] == [
        ["patch_embed.proj", "1", "1", "1"],
        ["blocks.\\*.mlp.act.conv", "0", "0", "12"],
    ]


def test_report_says_how_to_repeat_it(report: str):
    environment = section(report, "How to repeat it").splitlines()
    for line in (
        "- command: tokenconv compare pvt_v2_b0 --block mix_ffn",
        "- weights: random",
        "- allocator: glibc, keeps freed memory",
        "- images: 4 of 3x64x96, float32, channels_last",
        "- device: cpu (made up), 2 threads",
        "- compiled: no arm",
        "- rounds: 20 infer, 20 train",
        "- load: 0.2 before, 2.0 after",
        "- governor: performance",
        "- roof: 180 GFLOP/s in a matrix product, 21.0 GB/s in a copy",
        "- versions: python 3.11.7, torch 2.15.0",
        "- date: 2026-01-02T03:04:05+00:00",
    ):
        assert line in environment


def test_report_says_which_arms_are_compiled(made_up: MakeUp):
    report = to_markdown(changed(made_up(), "mix_ffn", compiled=True))
    assert "- compiled: mix_ffn" in section(report, "How to repeat it")
    header, _, *body = rows(section(report, "Figures"))
    assert [row[header.index("compiled")] for row in body] == ["no", "no", "yes"] * 2


def test_arms_without_a_description_are_told_by_how_they_run(made_up: MakeUp):
    report = to_markdown(changed(made_up(), "mix_ffn", compiled=True, description=""))
    assert "through torch.compile" in section(report, "Arms")
    report = to_markdown(changed(made_up(), "mix_ffn", description=""))
    assert "no description was given" in section(report, "Arms")


def test_report_shows_a_figure_that_is_there(folder: Path, report: str):
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", report)
    assert (folder / picture).is_file()


def test_a_bar_in_a_name_does_not_end_a_cell(made_up: MakeUp):
    report = to_markdown(changed(made_up(), "mix_ffn", name="a|b"))
    assert "| infer | a\\|b |" in report


# --- report.md of a sweep ---


def test_sweep_begins_with_the_range_of_every_ratio(sweep_report: str):
    found = section(sweep_report, "")
    assert "img-size 160, 224, 384; batch-size 1, 4, 8" in found
    assert (
        "- Inference of mix_ffn takes 1.15x (img-size=384,batch-size=4) to 1.50x "
        "(img-size=160,batch-size=1) the time of the baseline, 1.33x in the median of 8 points "
        "(slower at 8), and 1.07x to 1.22x its memory." in found
    )
    assert "> - Failed: img-size=384,batch-size=8: no memory left" in found
    assert found.count("> - Warning") == 1, "the same warning at eight points"


def test_sweep_has_a_row_per_point_mode_and_arm(sweep_report: str):
    header, _, *body = rows(section(sweep_report, "Points"))
    assert len(body) == 8 * 2 * 3 + 1
    first = dict(zip(header, body[2], strict=True))
    assert (first["img-size"], first["batch-size"], first["arm"]) == ("160", "1", "mix_ffn")
    assert first["vs baseline"] == "1.500x"
    assert first["report"] == "[open](points/img-size%3D160%2Cbatch-size%3D1/report.html)"
    last = dict(zip(header, body[-1], strict=True))
    assert (last["img-size"], last["batch-size"], last["verdict"]) == ("384", "8", "failed")


def test_an_arm_that_failed_at_a_point_has_a_row(sweep: list[Point], failed: MakeUp):
    first = dataclasses.replace(
        sweep[0], comparison=failed(sweep[0].comparison, "mix_ffn", "train")
    )
    header, _, *body = rows(section(sweep_to_markdown([first, *sweep[1:]], {}), "Points"))
    told = [dict(zip(header, row, strict=True)) for row in body[:6]]
    assert [(row["mode"], row["arm"]) for row in told if row["verdict"] == "failed"] == [
        ("train", "mix_ffn")
    ]
    assert told[-1]["latency ms"] == told[-1]["memory vs baseline"] == "-"
    assert told[-1]["report"] == told[0]["report"]


def test_a_sweep_of_which_nothing_is_left_says_so(tmp_path: Path):
    points = [Point({"batch-size": size}, None, "no memory left") for size in ("1", "2")]
    write_sweep(points, tmp_path, {})
    assert "batch-size=2: no memory left" in (tmp_path / "report.md").read_text("utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md", "report.html", "sweep.png", "sweep.svg"
    }  # fmt: skip
