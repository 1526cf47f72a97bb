"""What the kernels of a whole model are, and what taking them apart would save and lose.

Shape letters as in ``factors``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import nn

from tokenconv.analysis.convolutions import find_dense
from tokenconv.analysis.depthwise import DepthwiseKernels, depthwise_kernels
from tokenconv.analysis.factors import Order
from tokenconv.analysis.separability import Separability, pair_macs, separability
from tokenconv.costs import cost, num_params
from tokenconv.errors import AnalysisError

ENERGIES = (0.8, 0.9, 0.95, 0.99)
"""Shares of a kernel's energy that options are listed for."""
_WORTH = 0.9
"""Of a layer's MACs: with more it is not worth the loss."""


@dataclass(frozen=True)
class Option:
    """What a layer would be as pairs."""

    order: Order
    rank: int
    energy: float
    """Share of ``||W||^2`` that is kept."""
    relative_error: float
    """``||W - W'|| / ||W||``."""
    macs: int
    """For one image."""
    params: int


@dataclass(frozen=True)
class DenseLayer:
    """A convolution that mixes channels and looks at more than one position."""

    name: str
    weight_shape: tuple[int, ...]
    """``(O, I, K, K)``."""
    stride: tuple[int, int]
    groups: int
    params: int
    macs: int
    """For one image."""
    separability: Separability
    pair_macs: Mapping[Order, tuple[int, int]]
    """Of one pair: for one image, and its parameters."""
    bias: bool

    def option(self, order: Order, energy: float) -> Option:
        """The fewest pairs that keep a share of the energy."""
        spectrum = self.separability.spectra[order]
        rank = spectrum.rank_for(energy=energy)
        macs, params = self.pair_macs[order]
        return Option(
            order,
            rank,
            spectrum.explained[rank - 1],
            spectrum.errors[rank - 1],
            rank * macs,
            rank * params + self.bias * self.weight_shape[0],
        )

    def recommendation(self, energy: float) -> Option | None:
        """The cheaper order, if it takes at most 90% of the MACs; None: keep it dense."""
        best = min((self.option(order, energy) for order in Order), key=lambda option: option.macs)
        return best if best.macs <= _WORTH * self.macs else None


@dataclass(frozen=True)
class Analysis:
    """What ``analyze`` found; print it to read it."""

    input_size: tuple[int, ...]
    macs: int
    """Of the whole model, for one image."""
    params: int
    energy: float
    """Share of a kernel's energy that the recommendations keep."""
    layers: Sequence[DenseLayer]
    passed_over: Mapping[str, str]
    """Why other convolutions are not among them, by name."""
    depthwise: Sequence[DepthwiseKernels]

    @cached_property
    def recommended(self) -> dict[str, Option | None]:
        """What to do with each layer, by name."""
        return {layer.name: layer.recommendation(self.energy) for layer in self.layers}

    def macs_with(self, options: Mapping[str, Option | None]) -> int:
        """Of the whole model with these layers as pairs."""
        saved = sum(
            layer.macs - option.macs for layer in self.layers if (option := options[layer.name])
        )
        return self.macs - saved

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "input_size": list(self.input_size),
            "macs": self.macs,
            "params": self.params,
            "energy": self.energy,
            "layers": [_layer_dict(layer, self.recommended[layer.name]) for layer in self.layers],
            "passed_over": dict(self.passed_over),
            "depthwise": [kernels.to_dict() for kernels in self.depthwise],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        after = self.macs_with(self.recommended)
        changed = sum(option is not None for option in self.recommended.values())
        yield (
            f"{len(self.layers)} dense convolutions, {changed} worth taking apart at "
            f"{self.energy:.0%} of the energy: {self.macs / 1e6:,.1f} -> {after / 1e6:,.1f} M MACs"
        )
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            option = self.recommended[layer.name]
            yield f"  {layer.name:<{width}}  " + (
                f"{option.order} rank {option.rank}, error {option.relative_error:.3f}, "
                f"MACs {option.macs / layer.macs:.2f}x"
                if option
                else "keep dense"
            )


def analyze(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    energy: float = 0.95,
    layers: str | Sequence[str] | None = None,
) -> Analysis:
    """Say how separable the convolutions of a model are, from its weights alone.

    The energy of a kernel says nothing of the accuracy of the model: it ranks the choices, and
    ``decompose_`` with images, training and a measurement decide.

    Args:
        model: Any module that takes images; it is left alone.
        input_size: ``(C, H, W)`` of one image.
        energy: Share of a kernel's energy that recommendations keep, above 0, at most 1.
        layers: Only these dense convolutions, by a regular expression or a list of names.

    Raises:
        AnalysisError: If ``energy`` is out of range, a weight is not finite or quantised.
        MeasurementError: If the model refuses images of this size.
        UnknownNameError: If there is no layer of a name in ``layers``.
    """
    if not 0 < energy <= 1:
        raise AnalysisError(f"expected 0 < energy <= 1, got {energy}")
    found = find_dense(model, layers)
    priced = cost(model, input_size, sites=list(found.dense))
    macs = {name: priced.sites[name].macs for name in found.dense}
    unused = {name: "does not run in a forward pass" for name in macs if not macs[name]}
    return Analysis(
        tuple(input_size),
        priced.macs,
        priced.params,
        energy,
        [_layer(name, conv, macs[name]) for name, conv in found.dense.items() if macs[name]],
        {**found.passed_over, **unused},
        depthwise_kernels(model),
    )


def _layer(name: str, conv: nn.Conv2d, macs: int) -> DenseLayer:
    stride: Any = conv.stride
    per_position = conv.weight.numel()
    return DenseLayer(
        name,
        tuple(conv.weight.shape),
        stride,
        conv.groups,
        num_params(conv),
        macs,
        separability(conv.weight, groups=conv.groups),
        {
            order: (
                macs
                * pair_macs(conv.weight, 1, order, groups=conv.groups, stride=stride)
                // per_position,
                pair_macs(conv.weight, 1, order, groups=conv.groups),
            )
            for order in Order
        },
        conv.bias is not None,
    )


def _layer_dict(layer: DenseLayer, recommended: Option | None) -> dict[str, Any]:
    found = layer.separability
    return {
        "name": layer.name,
        "weight_shape": list(layer.weight_shape),
        "stride": list(layer.stride),
        "groups": layer.groups,
        "params": layer.params,
        "macs": layer.macs,
        "explained": {order.value: found.spectra[order].explained for order in Order},
        "intra_kernel_correlation": found.intra_kernel_correlation,
        "cross_kernel_correlation": found.cross_kernel_correlation,
        "of_random_kernels": {order.value: found.of_random[order] for order in Order},
        "options": [asdict(layer.option(order, e)) for order in Order for e in ENERGIES],
        "recommended": None if recommended is None else asdict(recommended),
    }
