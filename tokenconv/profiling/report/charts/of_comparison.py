"""The charts of a comparison."""

from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes

from tokenconv.profiling.measurement import MIB, Mode
from tokenconv.profiling.report.charts.chart import INK, Chart
from tokenconv.profiling.report.charts.ladder import BAR, GAP, LINE, Ladder, legend_height
from tokenconv.profiling.report.charts.palette import BASELINE, COLORS, fills
from tokenconv.profiling.report.charts.roofline import roofline
from tokenconv.profiling.report.tables import PHASES, categories, phase_ms
from tokenconv.profiling.results import Arm, Comparison, Measured, Memory

_MEMORY: dict[str, Callable[[Memory], int]] = {
    "parameters": lambda memory: memory.parameters,
    "buffers": lambda memory: memory.buffers,
    "images": lambda memory: memory.images,
    "optimizer state": lambda memory: memory.optimizer_state,
    "peak of the step": lambda memory: memory.peak - memory.held,
}
_STEP_PHASES = ("forward", "backward", "optimizer")
_PROFILED = "Under the profiler, which slows the step down: good for shares, not for latency."


def comparison_charts(comparison: Comparison, mode: Mode) -> list[Chart]:
    """All charts of one mode.

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


def _rungs(comparison: Comparison, mode: Mode) -> Iterator[tuple[Arm, Measured | None]]:
    return ((arm, arm.modes.get(mode)) for arm in comparison.arms)


def _height(comparison: Comparison, bars: float, legend: int = 0) -> float:
    """Of a ladder with a rung per arm.

    Args:
        comparison: What was measured.
        bars: Height of what is under a name.
        legend: Its entries.
    """
    below = legend_height(legend) if legend else 0
    return len(comparison.arms) * (LINE + bars + GAP) + below


def _in_words(comparison: Comparison, mode: Mode, tell: Callable[[Measured], str]) -> str:
    return "; ".join(
        f"{arm.name}: {tell(measured) if measured else 'failed'}"
        for arm, measured in _rungs(comparison, mode)
    )


def _latency(comparison: Comparison, mode: Mode) -> Chart:
    height = _height(comparison, BAR)

    def label(arm: Arm, measured: Measured) -> str:
        ms, ratio = f"{_short(measured.latency_ms.median)} ms", measured.ratio
        if arm.name == comparison.baseline:
            return f"{ms}, baseline"
        if ratio is None:
            return ms
        return f"{ms}, {ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"

    def draw(ax: Axes) -> None:
        spreads = [one.latency_ms for _, one in _rungs(comparison, mode) if one]
        ladder = Ladder(ax, height, max((spread.q75 for spread in spreads), default=0))
        for arm, measured in _rungs(comparison, mode):
            ladder.title(arm.name, label(arm, measured) if measured else "failed")
            if measured:
                spread = measured.latency_ms
                is_baseline = arm.name == comparison.baseline
                fill = {"facecolor": BASELINE if is_baseline else COLORS[0]}
                middle = ladder.bar([spread.median], [fill])
                whiskers = [[spread.median - spread.q25], [spread.q75 - spread.median]]
                ax.errorbar(spread.median, middle, xerr=whiskers, capsize=4, lw=1.5, color=INK)
            ladder.gap()

    return Chart(
        name=f"{mode}-latency",
        title=f"{mode}: latency of {comparison.batch_size} images",
        words=_in_words(
            comparison,
            mode,
            lambda one: (
                f"{_short(one.latency_ms.median)} ms, interquartile range "
                f"{_short(one.latency_ms.iqr)} ms"
                + (f", {one.ratio.median:.2f} times the baseline" if one.ratio else "")
            ),
        ),  # fmt: skip
        note="Median; whiskers are the interquartile range; ratio with its 99% interval.",
        height=height,
        draw=draw,
    )


def _memory(comparison: Comparison, mode: Mode) -> Chart:
    styles = dict(zip(_MEMORY, fills(len(_MEMORY)), strict=True))
    if mode == "infer":
        del styles["optimizer state"]
    phases = _STEP_PHASES if mode == "train" else ()
    height = _height(comparison, BAR + LINE * len(phases), len(styles))

    def label(arm: Arm, measured: Measured) -> str:
        peak, ratio = f"{_short(measured.memory.peak / MIB)} MiB", measured.memory_ratio
        if arm.name == comparison.baseline:
            return f"{peak}, baseline"
        return peak if ratio is None else f"{peak}, {ratio:.2f}x"

    def draw(ax: Axes) -> None:
        peaks = [one.memory.peak / MIB for _, one in _rungs(comparison, mode) if one]
        room = 1.42 if phases else 1  # for the labels behind the thin bars
        ladder = Ladder(ax, height, room * max(peaks, default=0))
        for arm, measured in _rungs(comparison, mode):
            ladder.title(arm.name, label(arm, measured) if measured else "failed")
            if measured:
                own = [_MEMORY[part](measured.memory) / MIB for part in styles]
                ladder.bar(own, list(styles.values()), [_short(width) for width in own])
                for phase in phases:
                    taken = getattr(measured.memory, f"{phase}_peak") / MIB
                    text = f"{phase} {_short(taken)}"
                    ladder.span(measured.memory.held / MIB, taken, text, styles["peak of the step"])
            ladder.gap()
        ladder.legend(list(styles), list(styles.values()))

    return Chart(
        name=f"{mode}-memory",
        title=f"{mode}: peak memory [MiB]",
        words=_in_words(
            comparison,
            mode,
            lambda one: (
                f"{_short(one.memory.peak / MIB)} MiB, of which "
                f"{_short(one.memory.held / MIB)} MiB are held between steps"
            ),
        ),  # fmt: skip
        note="A bar is the peak: what is held between steps, then the most that a step takes on top."
        + (" Thin bars: the most that each phase takes." if phases else ""),
        height=height,
        draw=draw,
    )


def _shares(comparison: Comparison, mode: Mode) -> Chart:
    names = categories(comparison)
    return _stacked(
        comparison, mode, names,
        name=f"{mode}-shares",
        title=f"{mode}: share of the time",
        widths=lambda one: [one.time_share.get(name, 0.0) for name in names],
        form=lambda share: f"{share:.0%}",
        total=lambda one: "",
    )  # fmt: skip


def _phases(comparison: Comparison, mode: Mode) -> Chart:
    return _stacked(
        comparison, mode, PHASES,
        name=f"{mode}-phases",
        title=f"{mode}: time by phase [ms]",
        widths=lambda one: [phase_ms(one, phase) for phase in PHASES],
        form=_short,
        total=lambda one: f"{_short(sum(spent.ms for spent in one.time))} ms",
    )  # fmt: skip


def _stacked(
    comparison: Comparison,
    mode: Mode,
    parts: Sequence[str],
    *,
    name: str,
    title: str,
    widths: Callable[[Measured], list[float]],
    form: Callable[[float], str],
    total: Callable[[Measured], str],
) -> Chart:
    """A bar per arm that is made of parts."""
    styles = fills(len(parts))
    height = _height(comparison, BAR, len(parts))

    def draw(ax: Axes) -> None:
        sums = [sum(widths(one)) for _, one in _rungs(comparison, mode) if one]
        ladder = Ladder(ax, height, max(sums, default=0))
        for arm, measured in _rungs(comparison, mode):
            ladder.title(arm.name, total(measured) if measured else "failed")
            if measured:
                own = widths(measured)
                ladder.bar(own, styles, [form(width) for width in own])
            ladder.gap()
        ladder.legend(parts, styles)

    def tell(measured: Measured) -> str:
        own = zip(parts, widths(measured), strict=True)
        return ", ".join(f"{part} {form(width)}" for part, width in own)

    return Chart(
        name=name,
        title=title,
        words=_in_words(comparison, mode, tell),
        note=_PROFILED,
        height=height,
        draw=draw,
    )


def _short(value: float) -> str:
    """A number with the digits that matter."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
