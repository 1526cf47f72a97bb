"""The charts of a report: what they show, and that it can be read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

from tokenconv.profiling.measurement import MIB, Spread
from tokenconv.profiling.report import write_report
from tokenconv.profiling.report.charts import comparison_charts, sweep_charts
from tokenconv.profiling.report.roofline import roofline_points
from tokenconv.profiling.results import Comparison, Point
from tokenconv.reports.chart import Chart
from tokenconv.reports.figure import write_figures
from tokenconv.reports.palette import COLORS

ARMS = ("attention_only", "original", "mix_ffn")
MakeUp = Callable[..., Comparison]


def draw(chart: Chart) -> Figure:
    figure = Figure(figsize=(4.6, chart.height / 72), dpi=72)
    chart.draw(figure.add_axes((0, 0, 1, 1)))
    figure.draw_without_rendering()
    return figure


def chart(charts: list[Chart], name: str) -> Chart:
    return {chart.name: chart for chart in charts}[name]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


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


def test_figure_grows_with_modes_and_arms(tmp_path: Path, made_up: MakeUp, folder: Path):
    """One arm in one mode is the smallest."""
    single = made_up(modes=("infer",))
    single = dataclasses.replace(single, arms=single.arms[:1])
    many = made_up()
    named = tuple(dataclasses.replace(many.arms[2], name=f"mix_ffn_{i}") for i in range(9))
    many = dataclasses.replace(many, arms=(*many.arms, *named))
    heights = []
    for name, comparison in (("single", single), ("many", many)):
        rows = [comparison_charts(comparison, mode) for mode in comparison.modes]
        write_figures(rows, "some", tmp_path / name)
        heights.append(picture_size(tmp_path / f"{name}.png")[1])
    assert heights[0] < picture_size(folder / "compare.png")[1] < heights[1]


def test_pictures_are_the_same_every_time(folder: Path, tmp_path: Path, made_up: MakeUp):
    write_report(made_up(), tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_whiskers_stay_inside_however_wide_the_spread(made_up: MakeUp):
    comparison = made_up()
    for arm in comparison.arms:
        for mode, measured in arm.modes.items():
            ms = measured.latency_ms.median
            wide = Spread(ms, 2 * ms, 0.5 * ms, 2.5 * ms)
            arm.modes[mode] = dataclasses.replace(measured, latency_ms=wide)
    figure = draw(chart(comparison_charts(comparison, "infer"), "infer-latency"))
    assert figure.axes[0].get_xlim()[1] > 2.5 * 45


@pytest.mark.parametrize("name", ["infer-latency", "infer-memory", "train-memory", "train-phases"])
def test_text_stays_inside_and_apart(made_up: MakeUp, name: str):
    """Also that of an arm with a long name."""
    comparison = made_up()
    *others, last = comparison.arms
    long = dataclasses.replace(last, name="a_block_with_a_name_of_many_words")
    comparison = dataclasses.replace(comparison, arms=(*others, long))
    mode = name.partition("-")[0]
    figure = draw(chart(comparison_charts(comparison, mode), name))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 - 1 <= box.x0
        assert box.x1 <= figure.bbox.x1 + 1
        for other in boxes[:i]:
            assert not box.padded(-1).overlaps(other.padded(-1))


def test_latency_is_labelled_with_ratio_and_interval(made_up: MakeUp):
    labels = texts(draw(chart(comparison_charts(made_up(), "train"), "train-latency")))
    assert labels == [
        "attention_only", "80.0 ms, baseline",
        "original", "115.2 ms, 1.44x (1.37-1.51)",
        "mix_ffn", "180.0 ms, 2.25x (2.14-2.36)",
    ]  # fmt: skip


def test_a_bar_of_memory_is_as_long_as_the_peak(made_up: MakeUp):
    axes = draw(chart(comparison_charts(made_up(), "train"), "train-memory")).axes[0]
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
    assert max(ends) == pytest.approx(300)
    assert len(ends) == 3 * (5 + 3), "parts and phases of three arms"


def test_an_arm_that_failed_keeps_its_place_in_charts(made_up: MakeUp, failed: MakeUp):
    comparison = failed(made_up(), "original", "train")
    for made in comparison_charts(comparison, "train"):
        assert texts(draw(made)).count("failed") == 1, made.name
        assert "original: failed" in made.words


def test_charts_of_a_mode_in_which_all_failed(made_up: MakeUp, failed: MakeUp):
    comparison = made_up(modes=("infer",))
    for name in ARMS:
        comparison = failed(comparison, name, "infer")
    charts = comparison_charts(comparison, "infer")
    assert [made.name for made in charts] == ["infer-latency", "infer-memory", "infer-shares"]
    assert texts(draw(charts[0])).count("failed") == 3


def test_roofline_reads_weights_once_for_a_batch(made_up: MakeUp):
    comparison = made_up()
    (first, *others) = roofline_points(comparison, comparison.arms[2], "infer")
    assert len(others) == 11
    assert first.flops_per_s == pytest.approx(2 * 2_000_000 * 4 / 1e-3)
    weight = 5000 * 4
    assert first.intensity == pytest.approx(2 * 2_000_000 * 4 / (4 * (8 * MIB - weight) + weight))
    assert roofline_points(comparison, comparison.arms[0], "infer") == []


def test_roofline_is_drawn_once_and_only_with_points(made_up: MakeUp):
    def names(comparison: Comparison) -> list[str]:
        return [
            made.name for mode in comparison.modes for made in comparison_charts(comparison, mode)
        ]

    assert [name for name in names(made_up()) if "roofline" in name] == ["infer-roofline"]
    assert "train-roofline" in names(made_up(modes=("train",)))
    without = dataclasses.replace(made_up(), arms=made_up().arms[:2])
    assert not [name for name in names(without) if "roofline" in name]


def test_sweep_has_a_line_per_arm_and_other_setting(sweep: list[Point]):
    latency = chart(sweep_charts(sweep, "infer"), "infer-img-size-latency")
    assert "mix_ffn, batch-size=1: 1.50x at img-size 160, 1.35x" in latency.words
    assert "batch-size=8: 1.40x at img-size 160, 1.25x at img-size 224" in latency.words
    assert "attention_only" not in latency.words
    axes = draw(latency).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["160", "224", "384"]
    assert len(axes.lines) == 1 + 2 * 3, "the baseline, and two arms in three batch sizes"


def test_sweep_of_many_settings_shows_the_median(sweep: list[Point]):
    many = [
        dataclasses.replace(point, settings={**point.settings, "seed": str(seed)})
        for point in sweep
        for seed in range(2)
    ]
    latency = chart(sweep_charts(many, "infer"), "infer-img-size-latency")
    assert latency.words.startswith("original: ")
    assert "; mix_ffn: 1.45x at img-size 160" in latency.words
    assert "median over all other settings" in latency.note


def test_sweep_over_names_is_drawn_in_groups(sweep: list[Point]):
    named = [
        dataclasses.replace(point, settings={"block": name})
        for point, name in zip(sweep, ("mix_ffn", "peg"), strict=False)
    ]
    axes = draw(chart(sweep_charts(named, "infer"), "infer-block-latency")).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mix_ffn", "peg"]
    assert {line.get_linestyle() for line in axes.lines[1:]} == {"None"}


def luminance(color: str) -> float:
    parts = colors.to_rgb(color)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("color", COLORS)
def test_colors_can_be_told_from_both_backgrounds(color: str):
    assert contrast(color, "#ffffff") >= 3
    assert contrast(color, "#15181c") >= 3
    assert contrast(color, "#000000") >= 4.5, "the text on it"
