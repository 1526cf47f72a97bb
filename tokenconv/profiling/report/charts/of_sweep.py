"""The charts of a sweep: ratios against what was set."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.report.charts.chart import INK, Chart
from tokenconv.profiling.report.charts.ladder import elided
from tokenconv.profiling.report.charts.palette import COLORS, MARKERS
from tokenconv.profiling.report.charts.scaled import finish, scaled
from tokenconv.profiling.report.findings import measured_points
from tokenconv.profiling.report.sweep import setting_value
from tokenconv.profiling.results import Measured, Point

_STYLES = ("-", "--", ":", "-.")
_MOST_LINES = len(_STYLES)  # per arm


@dataclass(frozen=True)
class _Place:
    """A ratio to the baseline, where it was measured."""

    setting: str
    """On the horizontal axis."""
    arm: str
    others: str
    """All other settings."""
    median: float
    low: float
    high: float


def sweep_charts(points: Sequence[Point], mode: Mode) -> list[Chart]:
    """Ratios of latency and memory against everything that was set to several values.

    Args:
        points: What was measured.
        mode: What to show.
    """
    charts = []
    for key in dict.fromkeys(key for point in points for key in point.settings):
        for what in ("latency", "memory"):
            places = list(_places(points, mode, key, what))
            if len({place.setting for place in places}) > 1:
                charts.append(_chart(places, mode, key, what))
    return charts


def _places(points: Sequence[Point], mode: Mode, key: str, what: str) -> Iterator[_Place]:
    for point, comparison in measured_points(points):
        others = ", ".join(f"{k}={v}" for k, v in point.settings.items() if k != key)
        for arm in comparison.arms:
            measured = arm.modes.get(mode)
            if measured is None or arm.name == comparison.baseline:
                continue
            if (ratio := _ratio(measured, what)) is not None:
                yield _Place(point.settings.get(key, "-"), arm.name, others, *ratio)


def _ratio(measured: Measured, what: str) -> tuple[float, float, float] | None:
    """Median and interval."""
    if what == "memory":
        return None if (ratio := measured.memory_ratio) is None else (ratio, ratio, ratio)
    return None if (own := measured.ratio) is None else (own.median, own.low, own.high)


def _chart(places: Sequence[_Place], mode: Mode, key: str, what: str) -> Chart:
    is_merged = len({place.others for place in places}) > _MOST_LINES
    band = "99% intervals" if what == "latency" else ""
    if is_merged:
        places, band = _merged(places), "from the least to the most over the other settings"
    numbers = [setting_value(place.setting) for place in places]
    is_numeric = None not in numbers
    settings = list(dict.fromkeys(place.setting for place in places))
    if is_numeric:
        settings.sort(key=float)
    arms = list(dict.fromkeys(place.arm for place in places))
    others = list(dict.fromkeys(place.others for place in places))
    lines = {
        (arm, other): own
        for arm in arms
        for other in others
        if (own := [p for p in places if (p.arm, p.others) == (arm, other)])
    }

    def draw(ax: Axes) -> None:
        ax.axhline(1, ls=(0, (1, 2)), lw=1, color=INK)
        for i, ((arm, other), own) in enumerate(lines.items()):
            own = sorted(own, key=lambda place: settings.index(place.setting))
            shift = 0 if is_numeric else 0.5 * ((i + 0.5) / len(lines) - 0.5)
            x = [settings.index(place.setting) + shift for place in own]
            medians = [place.median for place in own]
            color = COLORS[i % len(COLORS)]
            style = _STYLES[others.index(other)] if is_numeric else ""
            label = ", ".join(part for part in (elided(arm), other) if part)
            ax.plot(x, medians, MARKERS[i % len(MARKERS)] + style, color=color, ms=6, label=label)
            lows, highs = [place.low for place in own], [place.high for place in own]
            if is_numeric:
                ax.fill_between(x, lows, highs, color=color, alpha=0.2, lw=0)
            else:
                ax.vlines(x, lows, highs, color=color)
        ax.set_xticks(range(len(settings)), settings)
        ax.margins(x=0.08, y=0.1)
        finish(ax, across=key, up=f"{what} over the baseline's")

    return Chart(
        name=f"{mode}-{key}-{what}",
        title=f"{mode}: {what} over that of the baseline, by {key}",
        words="; ".join(
            f"{', '.join(filter(None, line))}: "
            + ", ".join(f"{place.median:.2f} at {key} {place.setting}" for place in own)
            for line, own in lines.items()
        ),
        note=("Median over the other settings; the band is " if is_merged else "The band is ")
        + f"{band}."
        if band
        else "",
        draw=draw,
        **scaled(legend=len(lines)),
    )


def _merged(places: Sequence[_Place]) -> list[_Place]:
    """The median over all other settings, and its range instead of an interval."""
    groups: dict[tuple[str, str], list[float]] = {}
    for place in places:
        groups.setdefault((place.setting, place.arm), []).append(place.median)
    return [
        _Place(setting, arm, "", statistics.median(own), min(own), max(own))
        for (setting, arm), own in groups.items()
    ]
