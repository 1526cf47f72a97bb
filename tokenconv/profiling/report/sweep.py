"""The table of a sweep: every point, mode and arm."""

from collections.abc import Iterator, Sequence
from urllib.parse import quote

from tokenconv.profiling.measurement import MIB, Mode
from tokenconv.profiling.results import Arm, Comparison, Point, short
from tokenconv.reports.table import NOTHING, Cell, Table, number, words

_HEADER = (
    "mode", "arm", "latency ms", "vs baseline", "99% interval", "verdict", "images/s", "peak MiB",
    "memory vs baseline", "report",
)  # fmt: skip


def points_table(points: Sequence[Point]) -> Table:
    """What was measured at every point; one that failed has a row that says so."""
    keys = list(dict.fromkeys(key for point in points for key in point.settings))
    rows = [
        [*(_setting(point.settings.get(key, "-")) for key in keys), *row]
        for point in points
        for row in _rows(point)
    ]
    return Table("A row per point, mode and arm.", (*keys, *_HEADER), rows, keys=len(keys) + 2)


def _rows(point: Point) -> Iterator[list[Cell]]:
    if point.comparison is None:
        yield [*words("-", "-"), *[NOTHING] * 3, Cell("failed"), *[NOTHING] * 4]
        return
    report = Cell("open", link=f"points/{quote(point.name)}/report.html")
    for mode in point.comparison.modes:
        for arm in point.comparison.arms:
            yield [*words(mode, arm.name), *_cells(arm, mode, point.comparison), report]


def _cells(arm: Arm, mode: Mode, comparison: Comparison) -> list[Cell]:
    if mode not in arm.modes:
        return [*[NOTHING] * 3, Cell("failed"), *[NOTHING] * 3]
    measured = arm.modes[mode]
    ratio = measured.ratio
    is_baseline = arm.name == comparison.baseline
    return [
        _shortly(measured.latency_ms.median),
        Cell("baseline", 1) if is_baseline else number(ratio and ratio.median, ".3f", "x"),
        Cell(f"{ratio.low:.3f}-{ratio.high:.3f}" if ratio and not is_baseline else "-"),
        Cell(ratio.verdict if ratio and not is_baseline else "-"),
        _shortly(measured.images_per_s),
        _shortly(measured.memory.peak / MIB),
        number(measured.memory_ratio, ".3f", "x"),
    ]


def _shortly(value: float) -> Cell:
    return Cell(short(value), value)


def setting_value(text: str) -> float | None:
    """A setting as a number; None for one that is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _setting(text: str) -> Cell:
    return Cell(text, setting_value(text))
