"""``compare.png``: latency, memory and time share, a row per mode."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.results import Comparison

_BAR = "#4477aa"
_BASELINE = "#999999"
_SHARES = ("#332288", "#88ccee", "#cc6677", "#ddcc77", "#117733", "#aa4499", "#dddddd")


def write_figure(comparison: Comparison, title: str, path: Path) -> None:
    """Draw a comparison as a PNG.

    Args:
        comparison: What was measured.
        title: What was compared.
        path: Where the picture goes.
    """
    modes = list(comparison.arms[0].modes)
    names = [arm.name for arm in comparison.arms]
    figure = Figure(
        figsize=(13, 1.1 + (1.1 + 0.42 * len(names)) * len(modes)), layout="constrained"
    )
    grid = figure.subplots(len(modes), 3, squeeze=False, width_ratios=[1, 1, 1.5])
    for row, mode in zip(grid, modes, strict=True):
        latency = [arm.modes[mode].latency_ms for arm in comparison.arms]
        _bars(
            row[0],
            comparison,
            f"{mode}: latency of {comparison.batch_size} images [ms]",
            [spread.median for spread in latency],
            [arm.ratios[mode]["latency"]["median"] for arm in comparison.arms],
            [[s.median - s.q25 for s in latency], [s.q75 - s.median for s in latency]],
        )
        _bars(
            row[1],
            comparison,
            f"{mode}: peak memory [MiB]",
            [arm.modes[mode].peak_memory_mib for arm in comparison.arms],
            [arm.ratios[mode]["peak_memory"] for arm in comparison.arms],
        )
        _shares(row[2], comparison, mode)
    handles, labels = grid[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    size = "x".join(str(s) for s in comparison.input_size)
    figure.suptitle(
        f"{title}: {size}, {comparison.dtype}, {comparison.device}, {comparison.threads} threads; "
        f"median and interquartile range of "
        f"{', '.join(f'{n} rounds ({mode})' for mode, n in comparison.rounds.items())}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _bars(
    ax: Axes,
    comparison: Comparison,
    title: str,
    values: Sequence[float],
    ratios: Sequence[float],
    quartiles: Sequence[Sequence[float]] | None = None,
) -> None:
    names = [arm.name for arm in comparison.arms]
    is_baseline = [name == comparison.baseline for name in names]
    colors = [_BASELINE if base else _BAR for base in is_baseline]
    bars = ax.barh(names, values, xerr=quartiles, color=colors, capsize=3)
    labels = [
        f"{value:.1f}" if base else f"{value:.1f}  ({ratio:.2f}x)"
        for value, ratio, base in zip(values, ratios, is_baseline, strict=True)
    ]
    ax.bar_label(bars, labels, padding=6, fontsize=9)
    ends = (
        [v + upper for v, upper in zip(values, quartiles[1], strict=True)] if quartiles else values
    )
    ax.set_xlim(right=1.45 * max(ends))  # room for the label behind bar and whisker
    ax.set_title(title, fontsize=10, loc="left")
    _tidy(ax)


def _shares(ax: Axes, comparison: Comparison, mode: Mode) -> None:
    names = [arm.name for arm in comparison.arms]
    left = [0.0] * len(names)
    for category, color in zip(comparison.arms[0].modes[mode].time_share, _SHARES, strict=True):
        widths = [arm.modes[mode].time_share[category] for arm in comparison.arms]
        bars = ax.barh(names, widths, left=left, color=color, label=category, edgecolor="white")
        dark = color in ("#332288", "#117733", "#aa4499", "#cc6677")
        ax.bar_label(
            bars, [f"{w:.0%}" if w > 0.05 else "" for w in widths], label_type="center",
            fontsize=8, color="white" if dark else "black",
        )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    ax.set_xlim(0, 1)
    ax.set_title(f"{mode}: share of the time", fontsize=10, loc="left")
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
