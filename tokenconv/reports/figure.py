"""Pictures of charts: many in a file, for papers, or one within a page."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from tokenconv.reports.chart import INK, WIDTH, Chart

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "hatch.linewidth": 1,
    "svg.fonttype": "none",
    "svg.hashsalt": "tokenconv",
    "text.color": INK,
    "text.parse_math": False,  # a name may hold any letters
    "xtick.color": INK,
    "ytick.color": INK,
}
_INCH = 72.0  # points
_GUTTER, _TITLE = 30.0, 24.0  # points, between charts and above each
_NO_TRACE = {"Creator": None, "Date": None, "Format": None, "Type": None}


def write_figures(rows: Sequence[Sequence[Chart]], title: str, stem: Path) -> None:
    """Draw charts as PNG and SVG.

    Args:
        rows: Charts beside each other, from top to bottom.
        title: Of all of them.
        stem: Where the pictures go, without the ends of their names.
    """
    heights = [_TITLE + max((chart.height for chart in row), default=0) + _GUTTER for row in rows]
    columns = max((len(row) for row in rows), default=1)
    width, height = columns * (WIDTH + _GUTTER) + _GUTTER, 2 * _GUTTER + sum(heights)
    with _style():
        figure = Figure(figsize=(width / _INCH, height / _INCH))

        def write(text: str, left: float, top: float, size: float) -> None:
            figure.text(left / width, 1 - top / height, text, va="center", size=size, weight="bold")

        write(title, _GUTTER, _GUTTER, 13)
        top = 2 * _GUTTER
        for row, taken in zip(rows, heights, strict=True):
            for column, chart in enumerate(row):
                left = _GUTTER + column * (WIDTH + _GUTTER)
                write(chart.title, left, top, 11)
                _draw(chart, figure, left, top + _TITLE / 2)
            top += taken
        figure.savefig(stem.with_suffix(".png"), dpi=120, metadata={"Software": None})
        figure.savefig(stem.with_suffix(".svg"), metadata=_NO_TRACE)


def inline_svg(chart: Chart, prefix: str) -> str:
    """A chart as an ``<svg>`` element that takes the colour of the text around it.

    Args:
        chart: What to draw.
        prefix: Of its ids, which are unique within a page then.
    """
    with _style(), io.StringIO() as file:
        figure = Figure(figsize=(WIDTH / _INCH, chart.height / _INCH))
        _draw(chart, figure, 0, 0)
        figure.savefig(file, format="svg", metadata=_NO_TRACE, transparent=True)
        svg = ElementTree.fromstring(file.getvalue())
    for element in svg.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML has no namespaces
        element.attrib = {
            key.rpartition("}")[2]: _inlined(key, value, prefix)
            for key, value in element.attrib.items()
        }
        for style in element.findall("{*}style"):  # would concern the whole page
            element.remove(style)
    del svg.attrib["width"], svg.attrib["height"]
    svg.attrib |= {"role": "img", "aria-label": f"{chart.title}. {chart.words}"}
    return ElementTree.tostring(svg, encoding="unicode")


def _inlined(key: str, value: str, prefix: str) -> str:
    """The value of an attribute, for use within a page."""
    if key == "id":
        return prefix + value
    if key.endswith("href"):
        if value.startswith("data:"):  # a picture, which is in it
            return value
        return f"#{prefix}{value.removeprefix('#')}"
    return value.replace("url(#", f"url(#{prefix}").replace(INK, "currentColor")


def _draw(chart: Chart, figure: Figure, left: float, top: float) -> None:
    """Draw a chart at a place in points."""
    width, height = (inches * _INCH for inches in figure.get_size_inches())
    before, above, behind, below = chart.margins
    inner = WIDTH - before - behind, chart.height - above - below
    bottom = height - top - chart.height + below
    ax = figure.add_axes(
        ((left + before) / width, bottom / height, inner[0] / width, inner[1] / height)
    )
    chart.draw(ax)


@contextmanager
def _style() -> Iterator[None]:
    with rc_context(_STYLE), warnings.catch_warnings():
        # A PNG shows a box for it, an SVG has the fonts of whoever looks at it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
