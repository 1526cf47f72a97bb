"""The charts of an analysis."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tokenconv.analysis.depthwise import DepthwiseKernels
from tokenconv.analysis.factors import Order
from tokenconv.analysis.fields import Fields
from tokenconv.analysis.receptive_field import radius
from tokenconv.analysis.survey import Analysis
from tokenconv.reports.chart import WIDTH, Chart
from tokenconv.reports.ladder import BAR, GAP, LINE, Ladder, elided
from tokenconv.reports.palette import BASELINE, COLORS, MARKERS, fills
from tokenconv.reports.scaled import finish, scaled

_MOST_RANKS, _ROW = 9, 13.0  # columns; points
_MOST_GALLERIES, _TILES = 6, (6, 12)  # rows, columns of kernels
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
_NAMES = {Order.DW_PW: "depthwise first", Order.PW_DW: "pointwise first"}


def analysis_charts(analysis: Analysis) -> list[Chart]:
    """What pairs keep, what they save, and the kernels that are depthwise already."""
    charts = []
    if analysis.layers:
        charts += [_kept(analysis, order) for order in Order]
        charts.append(_trade(analysis))
    if analysis.depthwise:
        charts.append(_distances(analysis.depthwise))
    furthest = sorted(analysis.depthwise, key=lambda k: -k.off_centre.mean().item())
    shown = {kernels.name for kernels in furthest[:_MOST_GALLERIES]}
    return charts + [_gallery(kernels) for kernels in analysis.depthwise if kernels.name in shown]


def field_charts(fields: Sequence[Fields]) -> list[Chart]:
    """Fields beside each other, and attention distances of all."""
    charts = [_field(each) for each in fields]
    if any(each.attention for each in fields):
        charts.append(_attention([each for each in fields if each.attention]))
    return charts


def _kept(analysis: Analysis, order: Order) -> Chart:
    spectra = {layer.name: layer.separability.spectra[order] for layer in analysis.layers}
    ranks = min(_MOST_RANKS, max(len(found.explained) for found in spectra.values()))
    shares = torch.full((len(spectra), ranks), torch.nan)
    for row, found in enumerate(spectra.values()):
        known = found.explained[:ranks]
        shares[row, : len(known)] = torch.tensor(known)
    height = _ROW * len(spectra)

    def draw(ax: Axes) -> None:
        ax.imshow(shares.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for row, values in enumerate(shares.tolist()):
            for column, value in enumerate(values):
                if value == value:
                    ax.text(
                        column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if value < 0.6 else "black",
                    )  # fmt: skip
        ax.set_yticks(range(len(spectra)), [elided(name) for name in spectra], fontsize=8)
        ax.set_xticks(range(ranks), [str(rank + 1) for rank in range(ranks)])
        ax.set_xlabel("pairs")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    return Chart(
        name=f"kept-{order}",
        title=f"% of the energy kept, {_NAMES[order]}",
        words="; ".join(f"{n}: {f.explained[0]:.0%} by one pair" for n, f in spectra.items()),
        note="Rows are dense convolutions in the order of the model.",
        height=height + 40,
        margins=(120, 0, 4, 40),
        draw=draw,
    )


def _trade(analysis: Analysis) -> Chart:
    curves = {}
    for order in Order:
        points = []
        for share in _SHARES:
            options = {layer.name: layer.option(order, share) for layer in analysis.layers}
            cheaper = {
                layer.name: options[layer.name] if options[layer.name].macs < layer.macs else None
                for layer in analysis.layers
            }
            points.append((analysis.macs_with(cheaper) / analysis.macs, share))
        curves[order] = points

    def draw(ax: Axes) -> None:
        legend = []
        for (order, points), color, marker in zip(curves.items(), COLORS, MARKERS, strict=False):
            macs, shares = zip(*points, strict=True)
            (line,) = ax.plot(macs, [100 * s for s in shares], f"{marker}-", color=color, ms=5)
            legend.append((line, _NAMES[order]))
        ax.axvline(1, ls=(0, (1, 2)), lw=1, color=BASELINE)
        ax.set_xlim(0, 1.05)
        finish(ax, legend, across="MACs of the model, over the dense one's",
               up="% of each kernel's energy kept")  # fmt: skip

    return Chart(
        name="trade",
        title="What is saved, what is lost",
        words="; ".join(
            f"{_NAMES[order]}: " + ", ".join(f"{s:.0%} at {m:.2f}x" for m, s in points)
            for order, points in curves.items()
        ),
        note="Layers that would take more MACs as pairs stay dense. Thin dots: the dense model.",
        draw=draw,
        **scaled(legend=2),
    )


def _distances(depthwise: Sequence[DepthwiseKernels]) -> Chart:
    values = {kernels.name: kernels.off_centre.mean().item() for kernels in depthwise}
    height = len(values) * (LINE + BAR + GAP)
    (fill,) = fills(1)

    def draw(ax: Axes) -> None:
        ladder = Ladder(ax, height, 1.0)
        for name, value in values.items():
            ladder.title(name, f"{value:.1%}")
            ladder.bar([value], [fill])
            ladder.gap()

    return Chart(
        name="off-centre",
        title="Share of energy off the centre",
        words="; ".join(f"{name}: {value:.1%}" for name, value in values.items()),
        note="Depthwise kernels: 0 looks at no neighbour. The mean over channels.",
        height=height,
        draw=draw,
    )


def _gallery(kernels: DepthwiseKernels) -> Chart:
    order = kernels.off_centre.argsort(descending=True)
    rows, columns = _TILES
    count = min(rows * columns, len(order))
    rows = -(-count // columns)
    picked = kernels.kernels[order[torch.linspace(0, len(order) - 1, count).round().long()]]
    mosaic = _mosaic(picked.cpu(), rows, columns)
    height = WIDTH * rows / columns

    def draw(ax: Axes) -> None:
        ax.imshow(
            mosaic.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
        )
        ax.set_axis_off()

    return Chart(
        name=f"gallery-{kernels.name}",
        title=f"Kernels of {elided(kernels.name)}",
        words=f"{count} of {len(order)} kernels, {kernels.off_centre.mean():.1%} off the centre.",
        note=f"{count} of {len(order)}, those that look furthest first; red adds, blue subtracts, "
        f"each over its largest entry.",
        height=height,
        draw=draw,
    )


def _mosaic(kernels: Tensor, rows: int, columns: int) -> Tensor:
    """Kernels ``(n, K, K)`` beside each other with a gap of NaN."""
    count, *sides = kernels.shape
    tiles = torch.full((rows * columns, sides[0] + 1, sides[1] + 1), torch.nan, dtype=kernels.dtype)
    peak = kernels.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
    tiles[:count, :-1, :-1] = kernels / peak
    tiles = tiles.view(rows, columns, *tiles.shape[1:]).transpose(1, 2)
    return tiles.reshape(rows * (sides[0] + 1), columns * (sides[1] + 1))[:-1, :-1]


def _field(fields: Fields) -> Chart:
    rows, columns = fields.field.shape
    height = WIDTH * rows / columns
    level = (fields.field / fields.field.max()).clamp(min=1e-4).log10().cpu()

    def draw(ax: Axes) -> None:
        ax.imshow(level.numpy(), cmap="magma", vmin=-4, vmax=0, aspect="auto")
        for share, style in ((0.5, "-"), (0.9, "--")):
            half = radius(fields.field, share)
            x = [columns / 2 - 0.5 + half * sign for sign in (-1, 1, 1, -1, -1)]
            y = [rows / 2 - 0.5 + half * sign for sign in (-1, -1, 1, 1, -1)]
            ax.plot(x, y, style, color="white", lw=1)
        ax.set_xlim(-0.5, columns - 0.5)
        ax.set_ylim(rows - 0.5, -0.5)
        ax.set_axis_off()

    return Chart(
        name=f"field-{fields.name}",
        title=f"Field of {elided(fields.name)}",
        words=f"half of the field within {radius(fields.field):.1f} pixels of the middle",
        note="Logarithmic, four decades. The squares hold half and nine tenths of it.",
        height=height,
        draw=draw,
    )


def _attention(fields: Sequence[Fields]) -> Chart:
    def draw(ax: Axes) -> None:
        legend = []
        for each, color, marker in zip(fields, COLORS, MARKERS, strict=False):
            means = [heads.mean().item() for heads in each.attention]
            (line,) = ax.plot(range(1, len(means) + 1), means, "-", color=color)
            for layer, heads in enumerate(each.attention, 1):
                ax.plot([layer] * len(heads), heads.tolist(), marker, color=color, ms=4, alpha=0.6)
            legend.append((line, each.name))
        ax.set_ylim(0, 1.1 * max(ax.get_ylim()))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish(ax, legend, across="layer", up="tokens")

    return Chart(
        name="attention",
        title="Attention distance by layer",
        words="; ".join(
            f"{each.name}: " + ", ".join(f"{heads.mean():.2f}" for heads in each.attention)
            for each in fields
        ),
        note="Marks are heads, lines their means.",
        draw=draw,
        **scaled(legend=len(fields)),
    )
