"""The tables of an analysis."""

from collections.abc import Sequence
from statistics import fmean

from tokenconv.analysis.factors import Order
from tokenconv.analysis.fields import Fields
from tokenconv.analysis.receptive_field import radius
from tokenconv.analysis.survey import ENERGIES, Analysis
from tokenconv.reports.table import Cell, Table, number, words


def all_tables(analysis: Analysis, fields: Sequence[Fields]) -> dict[str, Table]:
    """Every table, by its heading."""
    return {
        "What to do": _recommendations(analysis),
        "What each choice saves and loses": _options(analysis),
        "Structure": _structure(analysis),
        "Depthwise kernels": _depthwise(analysis),
        "How far it looks": _fields(fields),
        "Passed over": _passed_over(analysis),
    }


def _recommendations(analysis: Analysis) -> Table:
    rows = []
    for layer in analysis.layers:
        option = analysis.recommended[layer.name]
        shape = "x".join(map(str, layer.weight_shape))
        row = [Cell(layer.name), Cell(shape), number(layer.macs / 1e6, ",.1f")]
        if option is None:
            rows.append([*row, *words("keep dense", "-", "-", "-", "-")])
            continue
        rows.append(
            [
                *row,
                Cell(option.order),
                number(option.rank, "d"),
                number(option.relative_error, ".3f"),
                number(option.macs / layer.macs, ".2f", "x"),
                number(option.params / layer.params, ".2f", "x"),
            ]
        )
    return Table(
        f"The cheaper order and the fewest pairs that keep {analysis.energy:.0%} of the energy, "
        f"where they take at most 0.9x the MACs.",
        ["layer", "kernel", "M MACs", "do", "rank", "error", "MACs", "params"],
        rows,
    )


def _options(analysis: Analysis) -> Table:
    rows = []
    for layer in analysis.layers:
        for order in Order:
            options = [layer.option(order, energy) for energy in ENERGIES]
            cells = [
                Cell(f"{o.rank}: {o.macs / layer.macs:.2f}x", o.macs / layer.macs) for o in options
            ]
            one = layer.separability.spectra[order]
            rows.append([Cell(layer.name), Cell(order), number(one.errors[0], ".3f"), *cells])
    return Table(
        "Rank, and MACs over those of the dense convolution, for the share of the energy to keep.",
        ["layer", "order", "error of one pair", *(f"{energy:.0%}" for energy in ENERGIES)],
        rows,
        keys=2,
    )


def _structure(analysis: Analysis) -> Table:
    return Table(
        "Share of the energy that one pair carries, and what random kernels of this shape have.",
        ["layer", "intra-kernel", "of random", "cross-kernel", "of random"],
        [
            [
                Cell(layer.name),
                number(layer.separability.intra_kernel_correlation, ".3f"),
                number(layer.separability.of_random[Order.PW_DW], ".3f"),
                number(layer.separability.cross_kernel_correlation, ".3f"),
                number(layer.separability.of_random[Order.DW_PW], ".3f"),
            ]
            for layer in analysis.layers
        ],
    )


def _depthwise(analysis: Analysis) -> Table:
    return Table(
        "Means over channels; a residual counts as the centre of the kernel.",
        ["layer", "channels", "side", "residual", "distance from the identity", "off the centre"],
        [
            [
                Cell(kernels.name),
                number(len(kernels.kernels), "d"),
                number(kernels.kernels.shape[-1], "d"),
                Cell("yes" if kernels.has_residual else "no"),
                number(kernels.distance.mean().item(), ".3f"),
                number(kernels.off_centre.mean().item(), ".1%"),
            ]
            for kernels in analysis.depthwise
        ],
    )


def _fields(fields: Sequence[Fields]) -> Table:
    return Table(
        "Radius of the square that holds half and nine tenths of the field, in pixels; attention "
        "distance in tokens, the mean over heads.",
        ["model", "half", "nine tenths", "first layer", "last layer", "all layers"],
        [
            [
                Cell(each.name),
                *(number(radius(each.field, share), ".1f") for share in (0.5, 0.9)),
                *(number(distance, ".2f") for distance in _distances(each)),
            ]
            for each in fields
        ],
    )


def _distances(fields: Fields) -> Sequence[float | None]:
    """Of the first layer, the last one, and all."""
    means = [heads.mean().item() for heads in fields.attention]
    return (means[0], means[-1], fmean(means)) if means else (None, None, None)


def _passed_over(analysis: Analysis) -> Table:
    return Table(
        "Other convolutions.",
        ["layer", "why"],
        [words(name, why) for name, why in analysis.passed_over.items()],
    )
