"""What the experiments share: numbers of several seeds, claims, and how both are drawn."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from scipy.stats import t as student

Table = dict[str, dict[str, float]]
"""What a seed gives: rows, and of each its columns."""


class Claim(NamedTuple):
    """What was found, and whether the numbers at hand say so."""

    text: str
    holds: bool


class Spread(NamedTuple):
    """Mean over seeds, and half of its 95 % interval, from Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of independent seeds."""
        if len(values) < 2:
            return cls(values[0], math.inf)
        error = statistics.stdev(values) / len(values) ** 0.5
        return cls(statistics.fmean(values), float(student.ppf(0.975, len(values) - 1)) * error)

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval is."""
        return self.mean > self.half

    def __str__(self) -> str:
        if self.half in (0, math.inf):
            return f"{self.mean:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.half)))
        if digits > 5:
            return f"{self.mean:.1e} ± {self.half:.0e}"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def column(runs: Sequence[Table], row: str, name: str) -> list[float]:
    """One number, seed by seed."""
    return [run[row][name] for run in runs]


def mean(runs: Sequence[Table], row: str, name: str) -> float:
    """One number, over seeds."""
    return statistics.fmean(column(runs, row, name))


def gain(runs: Sequence[Table], better: str, worse: str, name: str) -> Spread:
    """How much larger a column is in one row than in another, paired by seed."""
    pairs = zip(column(runs, better, name), column(runs, worse, name), strict=True)
    return Spread.of([one - other for one, other in pairs])


def points(gained: Spread) -> str:
    """A difference of accuracies, in percentage points."""
    interval = f" ± {100 * gained.half:.1f}" if math.isfinite(gained.half) else ""
    return f"{100 * gained.mean:+.1f}{interval}"


def draw_rows(axis: Axes, runs: Sequence[Table], rows: Sequence[str], name: str) -> None:
    """A dot a seed, and a line at the mean, for each row."""
    for place, row in enumerate(rows):
        values = column(runs, row, name)
        axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.5, markersize=5)
        axis.hlines(statistics.fmean(values), place - 0.3, place + 0.3, f"C{place}", linewidth=2)
    axis.set_xticks(range(len(rows)), [row.replace(", ", ",\n") for row in rows], fontsize=9)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", alpha=0.3)


def draw_curve(axis: Axes, runs: Sequence[Table], row: str, label: str, number: int) -> None:
    """A dot a seed, and a line through the means, over columns whose names are numbers."""
    names = [*runs[0][row]]
    places = [float(name) for name in names]
    for run in runs:
        axis.plot(places, [*run[row].values()], "o", color=f"C{number}", alpha=0.35, markersize=4)
    style = ("-", "--", ":")[number]  # curves may coincide
    means = [mean(runs, row, name) for name in names]
    axis.plot(places, means, style, color=f"C{number}", label=label)
    axis.grid(alpha=0.3)
