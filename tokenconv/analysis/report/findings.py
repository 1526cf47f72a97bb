"""What was found, in sentences: the beginning of the report."""

from collections.abc import Iterator, Mapping, Sequence

from tokenconv.analysis.factors import Order
from tokenconv.analysis.fields import Fields
from tokenconv.analysis.receptive_field import radius
from tokenconv.analysis.survey import Analysis

_MOST_NAMED = 6
_STRUCTURED = 1.1  # times what random kernels have


def title(about: Mapping[str, str]) -> str:
    """Such as ``resnet18: what its kernels are``."""
    return f"{about.get('model', 'Analysis')}: what its kernels are"


def introduction(analysis: Analysis) -> str:
    """What was done, for those who were not there."""
    size = "x".join(str(side) for side in analysis.input_size)
    return (
        f"Every dense convolution was compared with the nearest sums of depthwise and pointwise "
        f"pairs, from its weights alone, without data. The model has {analysis.params:,} "
        f"parameters and takes {analysis.macs / 1e6:,.1f} million MACs for an image of {size}."
    )


def findings(analysis: Analysis, fields: Sequence[Fields]) -> list[str]:
    """What was found."""
    return [*_of_layers(analysis), *_of_depthwise(analysis), *_of_fields(fields)]


def warnings(analysis: Analysis, about: Mapping[str, str]) -> list[str]:
    """What makes the findings worth less."""
    lines = []
    if about.get("weights") == "random":
        lines.append(
            "The weights are random, so no kernel has structure: analyse trained weights with "
            "--pretrained or --checkpoint."
        )
    if any(analysis.recommended.values()):
        lines.append(
            "Energy is no accuracy. Before a recommendation is used: decompose_ with images, "
            "some training, and a measurement of time, since pairs take less arithmetic and more "
            "memory traffic for each multiplication."
        )
    return lines


def _of_layers(analysis: Analysis) -> Iterator[str]:
    layers, energy = analysis.layers, f"{analysis.energy:.0%}"
    if not layers:
        yield "There is no dense convolution."
        return
    nearly = {
        layer.name: order
        for layer in layers
        for order in Order
        if layer.separability.spectra[order].rank_for(energy=analysis.energy) == 1
        and layer.separability.spectra[order].values.shape[1] > 1  # else any kernel is one pair
    }
    yield (
        f"{len(nearly)} of {len(layers)} dense convolutions are nearly separable: one pair keeps "
        f"{energy} of their energy" + (f" ({_named(list(nearly))})." if nearly else ".")
    )
    chosen = {name: option for name, option in analysis.recommended.items() if option}
    if chosen:
        after = analysis.macs_with(analysis.recommended)
        yield (
            f"Taking {len(chosen)} of them apart ({_named(list(chosen))}) keeps {energy} of each "
            f"and takes the model from {analysis.macs / 1e6:,.1f} to {after / 1e6:,.1f} million "
            f"MACs ({after / analysis.macs:.2f}x)."
        )
    kept = [name for name, option in analysis.recommended.items() if option is None]
    if kept:
        yield (
            f"{len(kept)} should stay dense ({_named(kept)}): pairs that keep {energy} of their "
            f"energy would save less than a tenth of their MACs."
        )
    structured = [
        layer.name
        for layer in layers
        if layer.separability.intra_kernel_correlation
        > _STRUCTURED * layer.separability.of_random[Order.PW_DW]
    ]
    yield (
        f"The filters of {len(structured)} of {len(layers)} are more alike within themselves than "
        f"random ones, by a tenth or more, which is what blueprint convolutions build on."
    )


def _of_depthwise(analysis: Analysis) -> Iterator[str]:
    residual = [kernels for kernels in analysis.depthwise if kernels.has_residual]
    if residual:
        distances = {kernels.name: kernels.distance.mean().item() for kernels in residual}
        still = [name for name, distance in distances.items() if distance == 0]
        if len(still) == len(residual):
            yield f"All {len(residual)} inserted depthwise convolutions are still the identity."
            return
        least, *_, most = sorted(distances, key=distances.__getitem__) * 2  # may be one
        yield (
            f"Of {len(residual)} depthwise convolutions with a residual, {most} has moved furthest "
            f"from the identity ({distances[most]:.3f} on average over channels), {least} least "
            f"({distances[least]:.3f})."
        )


def _of_fields(fields: Sequence[Fields]) -> Iterator[str]:
    for each in fields:
        line = (
            f"{each.name}: half of the effective receptive field lies within "
            f"{radius(each.field):.1f} pixels of the middle, nine tenths within "
            f"{radius(each.field, 0.9):.1f}"
        )
        if each.attention:
            first, last = (each.attention[i].mean().item() for i in (0, -1))
            line += (
                f"; attention looks {first:.2f} tokens far in the first layer and {last:.2f} in "
                f"the last"
            )
        yield f"{line}."


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown
