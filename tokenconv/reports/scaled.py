"""Charts with two scales and a legend above them."""

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes

_LEGEND_LINE = 14.5  # points
_AREA, _LEFT, _RIGHT, _BELOW = 200.0, 48.0, 8.0, 40.0  # points


def scaled(legend: int) -> dict[str, Any]:
    """Height and margins of a chart.

    Args:
        legend: Lines of the legend.
    """
    above = legend * _LEGEND_LINE + 6
    return {"height": above + _AREA + _BELOW, "margins": (_LEFT, above, _RIGHT, _BELOW)}


def finish(
    ax: Axes, legend: Sequence[tuple[Artist, str]], *, across: str, up: str, columns: int = 1
) -> None:
    """Name the scales and show the legend.

    Args:
        ax: Where all is drawn.
        legend: What was drawn, and its name.
        across: What is on the horizontal scale.
        up: What is on the vertical scale.
        columns: Of the legend.
    """
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.legend(
        *zip(*legend, strict=True),
        loc="lower left", bbox_to_anchor=(-_LEFT / 275, 1.01), ncols=columns, frameon=False,
        borderpad=0, labelspacing=0.3, columnspacing=1.5,
    )  # fmt: skip
