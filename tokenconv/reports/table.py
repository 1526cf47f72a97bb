"""A table: of a report, before it becomes Markdown or HTML, and as text for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Cell(NamedTuple):
    """What stands in one place of a table."""

    text: str
    value: float | None = None
    """What it is sorted by; None for words."""
    link: str = ""
    """Where it leads, relative to the report."""


NOTHING = Cell("-")


@dataclass(frozen=True)
class Table:
    """Rows that have the same columns."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    keys: int = 1
    """Columns from the left that say what a row is about."""
    foot: Sequence[Sequence[Cell]] = ()
    """Rows that stay at the end however the others are sorted."""

    def is_numeric(self, column: int) -> bool:
        """Whether there is a number in a column."""
        return any(row[column].value is not None for row in self.rows)


def words(*texts: str) -> list[Cell]:
    """Cells without a number."""
    return [Cell(text) for text in texts]


def number(value: float | None, form: str = ".1f", unit: str = "") -> Cell:
    """A cell with a number; with a dash for None."""
    return NOTHING if value is None else Cell(f"{value:{form}}{unit}", value)


def aligned(rows: Sequence[Sequence[str]], *, keys: int = 1) -> str:
    """Rows as text, a line each; the first columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < keys else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
