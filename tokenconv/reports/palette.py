"""Colours that can be told from white and from black, and that black text can be read on."""

from itertools import cycle, islice

from matplotlib.colors import to_hex, to_rgb

COLORS = (
    "#3f88c5", "#d9702e", "#2f9e77", "#b06fc4", "#c9605f", "#a3861d", "#4f9fa8", "#b07a5e",
    "#7d84d1", "#808790",
)  # fmt: skip
BASELINE = "#808790"
MARKERS = "os^DvPX<>*"
_HATCHES = ("", "////", "++++", "\\\\\\\\", "xxxx", "||||", "//--", "||\\\\", "\\\\--", "----")


def fills(count: int) -> list[dict[str, str | float]]:
    """How to fill areas, by colour and by hatch."""
    return [
        {"facecolor": color, "hatch": hatch, "edgecolor": _darker(color), "linewidth": 0}
        for color, hatch in islice(zip(cycle(COLORS), cycle(_HATCHES), strict=False), count)
    ]


def _darker(color: str) -> str:
    red, green, blue = (0.75 * part for part in to_rgb(color))
    return to_hex((red, green, blue))
