"""Bars below each other, the name of each above it: it leaves the bars the whole width."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

from tokenconv.reports.chart import WIDTH

LINE, BAR, GAP = 15.0, 15.0, 11.0  # points
_LONGEST_NAME = 24
_LETTER = 7.0  # points, of an average letter with some room


class Ladder:
    """Draws from top to bottom, in points.

    Args:
        ax: Loses its frame and its scales.
        height: Of the axes.
        most: What is as wide as the axes.
    """

    def __init__(self, ax: Axes, height: float, most: float):
        self.ax = ax
        self.y = 0.0
        self.most = most or 1.0
        ax.set_xlim(0, 1.01 * self.most)
        ax.set_ylim(height, 0)
        ax.set_axis_off()
        self._at_edge = blended_transform_factory(ax.transAxes, ax.transData)

    def title(self, name: str, value: str) -> None:
        """A line of text: a name at the left, its value at the right."""
        y = self.y + LINE / 2
        self.ax.text(0, y, elided(name), va="center", weight="bold", transform=self._at_edge)
        self.ax.text(1, y, value, va="center", ha="right", transform=self._at_edge)
        self.y += LINE

    def bar(
        self, widths: Sequence[float], fills: Sequence[dict], labels: Sequence[str] | None = None
    ) -> float:
        """A bar of parts; a label is shown where its part has room for it.

        Returns:
            The middle of the bar.
        """
        middle, left = self.y + BAR / 2, 0.0
        for i, (width, fill) in enumerate(zip(widths, fills, strict=True)):
            self.ax.barh(middle, width, height=BAR - 2, left=left, **fill)
            if labels and width / self.most * WIDTH > _LETTER * len(labels[i]):
                box = {"facecolor": fill["facecolor"], "edgecolor": "none", "pad": 1}
                self.ax.text(
                    left + width / 2, middle, labels[i], va="center", ha="center", color="black",
                    bbox=box,
                )  # fmt: skip
            left += width
        self.y += BAR
        return middle

    def span(self, start: float, width: float, label: str, fill: dict) -> None:
        """A thin bar that begins further right, with its label behind it."""
        middle = self.y + LINE / 2
        self.ax.barh(middle, width, height=LINE / 3, left=start, **fill)
        self.ax.text(start + width + 0.015 * self.most, middle, label, va="center")
        self.y += LINE

    def gap(self) -> None:
        """Room before the next name."""
        self.y += GAP

    def legend(self, names: Sequence[str], fills: Sequence[dict]) -> None:
        """What the parts of the bars are, in two columns."""
        self.ax.legend(
            [Patch(**fill) for fill in fills], names, ncols=2, loc="upper left", frameon=False,
            bbox_to_anchor=(0, self.y), bbox_transform=self._at_edge, borderpad=0,
            borderaxespad=0, handlelength=1.6, columnspacing=1.5, labelspacing=0.4,
        )  # fmt: skip


def legend_height(count: int) -> float:
    """Of a legend with so many entries."""
    return LINE * ((count + 1) // 2) + 4


def elided(name: str) -> str:
    """A name without its middle, if it is too long for a chart."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[1 - half :]}"
