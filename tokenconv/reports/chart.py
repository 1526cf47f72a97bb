"""What a chart is: a picture of a known size, and the same in words."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

WIDTH = 331.0
"""Of every chart in points, so that text of 10 points can be read on a phone."""
INK = "#010203"
"""Of text and lines; the HTML replaces it by the colour of its own text."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture."""

    name: str
    """Unique within a report."""
    title: str
    words: str
    """What it shows, for those who cannot see it."""
    note: str = ""
    """What one should know to read it."""
    height: float
    """In points."""
    margins: tuple[float, float, float, float] = (0, 0, 0, 0)
    """Left, above, right and below the axes, in points."""
    draw: Callable[[Axes], None]
    """Draws it into axes of this size."""
