"""The charts of a sweep: ratios against what was set."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.report.findings import measured_points
from tokenconv.profiling.report.sweep import setting_value
from tokenconv.profiling.results import Measured, Point
from tokenconv.reports.chart import INK, Chart
from tokenconv.reports.ladder import elided
from tokenconv.reports.palette import COLORS, MARKERS
from tokenconv.reports.scaled import finish, scaled

_STYLES = ("-", "--", "-.")
_MOST_LINES = 8


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

    @property
    def line(self) -> str:
        """What it is joined with."""
        return ", ".join(part for part in (self.arm, self.others) if part)


def sweep_charts(points: Sequence[Point], mode: Mode) -> list[Chart]:
    """Ratios of latency and memory against everything that was set.

    Args:
        points: What was measured.
        mode: What to show.
    """
    charts = []
    for key in dict.fromkeys(key for point in points for key in point.settings):
        for what in ("latency", "memory"):
            if places := list(_places(points, mode, key, what)):
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
    is_merged = len({place.line for place in places}) > _MOST_LINES
    if is_merged:
        places = _merged(places)
    settings = list(dict.fromkeys(place.setting for place in places))
    is_numeric = all(setting_value(setting) is not None for setting in settings)
    if is_numeric:
        settings.sort(key=float)
    arms = list(dict.fromkeys(place.arm for place in places))
    lines = {p.line: list[_Place]() for p in sorted(places, key=lambda p: arms.index(p.arm))}
    for place in sorted(places, key=lambda place: settings.index(place.setting)):
        lines[place.line].append(place)

    def draw(ax: Axes) -> None:
        ax.axhline(1, ls=(0, (1, 2)), lw=1, color=INK)
        legend = []
        for i, own in enumerate(lines.values()):
            shift = 0 if is_numeric else (i + 0.5) / len(lines) / 2 - 0.25
            x = [settings.index(place.setting) + shift for place in own]
            lows, highs = [place.low for place in own], [place.high for place in own]
            color = COLORS[i % len(COLORS)]
            form = MARKERS[i % len(MARKERS)] + (_STYLES[i % len(_STYLES)] if is_numeric else "")
            (drawn,) = ax.plot(x, [place.median for place in own], form, color=color, ms=6)
            legend.append((drawn, ", ".join(filter(None, (elided(own[0].arm), own[0].others)))))
            if is_numeric:
                ax.fill_between(x, lows, highs, color=color, alpha=0.2, lw=0)
            else:
                ax.vlines(x, lows, highs, color=color)
        ax.set_xticks(range(len(settings)), settings)
        ax.margins(x=0.08, y=0.1)
        finish(ax, legend, across=key, up=f"{what} over the baseline's")

    return Chart(
        name=f"{mode}-{key}-{what}",
        title=f"{mode}: {what} vs baseline, by {key}",
        words="; ".join(
            f"{line}: " + ", ".join(f"{p.median:.2f}x at {key} {p.setting}" for p in own)
            for line, own in lines.items()
        ),
        note=_note(what, is_merged=is_merged),
        draw=draw,
        **scaled(legend=len(lines)),
    )


def _note(what: str, *, is_merged: bool) -> str:
    spread = " Bands or bars are 99% intervals." if what == "latency" else ""
    if is_merged:
        spread = " The median over all other settings; bands or bars are their range."
    return f"Thin dots: as much as the baseline.{spread}"


def _merged(places: Sequence[_Place]) -> list[_Place]:
    """The median over all other settings, and its range instead of an interval."""
    groups: dict[tuple[str, str], list[float]] = {}
    for place in places:
        groups.setdefault((place.setting, place.arm), []).append(place.median)
    return [
        _Place(setting, arm, "", statistics.median(own), min(own), max(own))
        for (setting, arm), own in groups.items()
    ]
