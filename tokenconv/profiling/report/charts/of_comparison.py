"""The charts of a comparison."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes

from tokenconv.profiling.measurement import MIB, Mode
from tokenconv.profiling.report.charts.roofline import roofline
from tokenconv.profiling.report.findings import counted
from tokenconv.profiling.report.tables import PHASES, categories, phase_share
from tokenconv.profiling.results import Arm, Comparison, Measured, Memory, short
from tokenconv.reports.chart import INK, Chart
from tokenconv.reports.ladder import BAR, GAP, LINE, Ladder, legend_height
from tokenconv.reports.palette import BASELINE, COLORS, fills

_MEMORY: dict[str, Callable[[Memory], int]] = {
    "parameters": lambda memory: memory.parameters,
    "buffers": lambda memory: memory.buffers,
    "images": lambda memory: memory.images,
    "optimizer state": lambda memory: memory.optimizer_state,
    "peak of the step": lambda memory: memory.peak - memory.held,
}
_PROFILED = "Of a step under the profiler, which says where time goes and not how long it takes."


def comparison_charts(comparison: Comparison, mode: Mode) -> list[Chart]:
    """All charts of one mode; the roofline comes with the first.

    Args:
        comparison: What was measured.
        mode: One of its modes.
    """
    charts = [_latency(comparison, mode), _memory(comparison, mode), _shares(comparison, mode)]
    if mode == "train":
        charts.append(_phases(comparison, mode))
    if mode == comparison.modes[0] and (chart := roofline(comparison, mode)):
        charts.append(chart)
    return charts


def _latency(comparison: Comparison, mode: Mode) -> Chart:
    def value(arm: Arm, measured: Measured) -> str:
        ms, ratio = f"{short(measured.latency_ms.median)} ms", measured.ratio
        if arm.name == comparison.baseline:
            return f"{ms}, baseline"
        if ratio is None:
            return ms
        return f"{ms}, {ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"

    def draw(ladder: Ladder, arm: Arm, measured: Measured) -> None:
        spread = measured.latency_ms
        color = BASELINE if arm.name == comparison.baseline else COLORS[0]
        middle = ladder.bar([spread.median], [{"facecolor": color}])
        whiskers = [[spread.median - spread.q25], [spread.q75 - spread.median]]
        ladder.ax.errorbar(spread.median, middle, xerr=whiskers, capsize=4, lw=1.5, color=INK)

    return _chart(
        comparison,
        mode,
        name="latency",
        title=f"latency of {counted(comparison.batch_size, 'image')}",
        note="Median; whiskers are the interquartile range; ratio with its 99% interval.",
        most=lambda one: one.latency_ms.q75,
        value=value,
        draw=draw,
    )


def _memory(comparison: Comparison, mode: Mode) -> Chart:
    is_training = mode == "train"
    styles = dict(zip(_MEMORY, fills(len(_MEMORY)), strict=True))
    if not is_training:
        del styles["optimizer state"]
    phases = ("forward", "backward", "optimizer") if is_training else ()

    def value(arm: Arm, measured: Measured) -> str:
        peak, ratio = f"{short(measured.memory.peak / MIB)} MiB", measured.memory_ratio
        if arm.name == comparison.baseline:
            return f"{peak}, baseline"
        return peak if ratio is None else f"{peak}, {ratio:.2f}x"

    def draw(ladder: Ladder, arm: Arm, measured: Measured) -> None:
        memory = measured.memory
        widths = [_MEMORY[part](memory) / MIB for part in styles]
        ladder.bar(widths, list(styles.values()), [short(width) for width in widths])
        for phase in phases:
            taken = getattr(memory, f"{phase}_peak") / MIB
            label = f"{phase} {short(taken)}"
            ladder.span(memory.held / MIB, taken, label, styles["peak of the step"])

    room = 1.42 if is_training else 1  # for the labels behind the thin bars
    return _chart(
        comparison,
        mode,
        name="memory",
        title="peak memory [MiB]",
        note="The bar is the peak: what is held between steps, and the most of what a step takes."
        + (" Thin bars: the most that each phase takes." if is_training else ""),
        most=lambda one: room * one.memory.peak / MIB,
        value=value,
        draw=draw,
        below=BAR + LINE * len(phases),
        legend=styles,
    )


def _shares(comparison: Comparison, mode: Mode) -> Chart:
    names = categories(comparison)
    return _stacked(
        comparison,
        mode,
        name="shares",
        title="share of the time",
        parts=lambda one: {name: one.time_share.get(name, 0.0) for name in names},
        legend=dict(zip(names, fills(len(names)), strict=True)),
        form=lambda share: f"{share:.0%}",
        value=lambda arm, one: "",
    )


def _phases(comparison: Comparison, mode: Mode) -> Chart:
    return _stacked(
        comparison,
        mode,
        name="phases",
        title="share of the time by phase",
        parts=lambda one: {phase: phase_share(one, phase) for phase in PHASES},
        legend=dict(zip(PHASES, fills(len(PHASES)), strict=True)),
        form=lambda share: f"{share:.0%}",
        value=lambda arm, one: "",
    )


def _stacked(
    comparison: Comparison,
    mode: Mode,
    *,
    parts: Callable[[Measured], Mapping[str, float]],
    form: Callable[[float], str],
    legend: Mapping[str, dict[str, Any]],
    **rest: Any,
) -> Chart:
    """A bar per arm that is made of parts."""

    def draw(ladder: Ladder, arm: Arm, measured: Measured) -> None:
        widths = list(parts(measured).values())
        ladder.bar(widths, list(legend.values()), [form(width) for width in widths])

    def tell(arm: Arm, measured: Measured) -> str:
        return ", ".join(f"{part} {form(width)}" for part, width in parts(measured).items())

    return _chart(
        comparison,
        mode,
        note=_PROFILED,
        most=lambda one: sum(parts(one).values()),
        draw=draw,
        tell=tell,
        legend=legend,
        **rest,
    )


def _chart(
    comparison: Comparison,
    mode: Mode,
    *,
    name: str,
    title: str,
    note: str,
    most: Callable[[Measured], float],
    value: Callable[[Arm, Measured], str],
    draw: Callable[[Ladder, Arm, Measured], None],
    tell: Callable[[Arm, Measured], str] | None = None,
    below: float = BAR,
    legend: Mapping[str, dict[str, Any]] | None = None,
) -> Chart:
    """A rung per arm; one that failed has none but its name.

    Args:
        comparison: What was measured.
        mode: One of its modes.
        name: Of the chart.
        title: Of the chart.
        note: What one should know to read it.
        most: What an arm needs to the right.
        value: What stands beside the name.
        draw: Draws what stands below.
        tell: The same in words; None takes ``value``.
        below: Height of what is drawn.
        legend: How parts are filled.
    """
    rungs = [(arm, arm.modes.get(mode)) for arm in comparison.arms]
    height = len(rungs) * (LINE + below + GAP) + (legend_height(len(legend)) if legend else 0)

    def draw_all(ax: Axes) -> None:
        ladder = Ladder(ax, height, max((most(one) for _, one in rungs if one), default=0))
        for arm, measured in rungs:
            ladder.title(arm.name, value(arm, measured) if measured else "failed")
            if measured:
                draw(ladder, arm, measured)
            ladder.gap()
        if legend:
            ladder.legend(list(legend), list(legend.values()))

    return Chart(
        name=f"{mode}-{name}",
        title=f"{mode}: {title}",
        words="; ".join(
            f"{arm.name}: {(tell or value)(arm, measured) if measured else 'failed'}"
            for arm, measured in rungs
        ),
        note=note,
        height=height,
        draw=draw_all,
    )
