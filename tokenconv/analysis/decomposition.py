"""Trained dense convolutions replaced by sums of depthwise and pointwise pairs, and back.

Shape letters as in ``factors``.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenconv.analysis.convolutions import check_finite, find_dense, is_plain
from tokenconv.analysis.factors import Factors, Order, factorise, full_rank, relative_error
from tokenconv.analysis.refinement import Fit, refine_
from tokenconv.analysis.separability import pair_macs, spectrum
from tokenconv.costs import num_params
from tokenconv.errors import AnalysisError

_SPATIAL = ("stride", "padding", "dilation", "padding_mode")
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name)


class DecomposedConv(nn.Sequential):
    """T pairs as two plain convolutions, ``depthwise`` and ``pointwise``, in the order asked for.

    ``dw_pw``: T kernels per input channel, then a 1x1 convolution of ``G*I*T`` channels;
    ``pw_dw``: a 1x1 convolution to ``O*T`` channels, then kernels that sum T channels each.
    Stride, padding and dilation are those of the depthwise part; the second one has the bias.
    Parameters: ``T * (G*I*K*K + O*I)`` or ``T * (O*I + O*K*K)``, and those of the bias.

    Args:
        conv: Says all but the kernel.
        factors: The kernel.
        relative_error: ``||W - W'|| / ||W||``.
    """

    def __init__(self, conv: nn.Conv2d, factors: Factors, relative_error: float):
        spatial = {name: getattr(conv, name) for name in _SPATIAL}
        parts = {
            "depthwise": _conv(factors.depthwise_weight, len(factors.depthwise), **spatial),
            "pointwise": _conv(factors.pointwise_weight, conv.groups),
        }
        names = sorted(parts, reverse=factors.order is Order.PW_DW)
        super().__init__(OrderedDict((name, parts[name]) for name in names))
        self.requires_grad_(conv.weight.requires_grad).train(conv.training)
        if conv.bias is not None:
            self[1].bias = nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
        self.order = factors.order
        self.rank = factors.rank
        self.relative_error = relative_error
        """``||W - W'|| / ||W||``, when it was made, without rounding to the dtype."""

    @property
    def weight(self) -> Tensor:
        """The dense kernel, for code that asks a convolution for its dtype, such as CLIP's."""
        return self.factors().expand()

    def factors(self) -> Factors:
        """The kernel as it is now."""
        depthwise, pointwise = map(self.get_parameter, ("depthwise.weight", "pointwise.weight"))
        return Factors.of_weights(self.order, depthwise, pointwise, self.rank)


def _conv(weight: Tensor, groups: int, **spatial: Any) -> nn.Conv2d:
    """A convolution with this weight and without a bias; draws no random numbers."""
    out_dim, per_group, *sides = weight.shape
    kernel: Any = tuple(sides)
    conv = nn.Conv2d(
        per_group * groups, out_dim, kernel, groups=groups, bias=False, device="meta", **spatial
    )
    conv.weight = nn.Parameter(weight.detach().contiguous())
    return conv


def decompose(
    conv: nn.Conv2d,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    order: Order | str = Order.DW_PW,
) -> DecomposedConv:
    """Take one trained convolution apart: T pairs, optimal in the Frobenius norm, without data.

    Args:
        conv: Any ``nn.Conv2d``, with stride, padding, dilation, groups and bias; it is left alone.
        rank: T; or else
        energy: the share of ``||W||^2`` to keep, or else
        max_error: the largest ``||W - W'|| / ||W||``.
        order: ``dw_pw``: depthwise first, T at most ``min(O/G, K*K)``; ``pw_dw``: pointwise first,
            T at most ``min(I, K*K)``. At its most T is exact.

    Returns:
        A module with ``relative_error``, whose square is the energy that was discarded.

    Raises:
        AnalysisError: If it is no plain ``nn.Conv2d``, the weight is not finite or quantised, or
            ``rank``, ``energy`` or ``max_error`` is out of range or not the only one.
        UnknownNameError: If there is no such order.

    References:
        Network Decoupling, https://arxiv.org/abs/1808.05517
    """
    if not is_plain(conv):
        raise AnalysisError(
            f"expected an nn.Conv2d that computes as one, got {type(conv).__name__}"
        )
    return _decompose("the convolution", conv, rank, energy, max_error, Order.of(order))


def _decompose(
    name: str,
    conv: nn.Conv2d,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    order: Order,
) -> DecomposedConv:
    if sum(value is not None for value in (rank, energy, max_error)) != 1:
        raise AnalysisError(
            f"expected one of rank, energy and max_error, got {rank=}, {energy=}, {max_error=}"
        )
    check_finite(name, conv.weight)
    weight = conv.weight.detach()
    found = spectrum(weight, order, conv.groups)
    try:
        if rank is None:
            rank = found.rank_for(energy=energy, max_error=max_error)
        factors = factorise(weight, rank, order=order, groups=conv.groups)
    except ValueError as error:
        raise AnalysisError(f"cannot take {name} apart: {error}") from error
    return DecomposedConv(conv, factors, found.errors[rank - 1])


@dataclass(frozen=True)
class LayerDecomposition:
    """What became of one convolution."""

    rank: int
    full_rank: int
    """Where the pairs are exact."""
    relative_error: float
    """``||W - W'|| / ||W||``."""
    params: tuple[int, int]
    """Before and after."""
    macs: tuple[int, int]
    """Per output position, before and after."""
    fit: Fit | None = None
    """How near the outputs are on the calibration images; None without them."""


@dataclass(frozen=True)
class Decomposition:
    """What ``decompose_`` did; print it to read it, call ``undo_`` to take it back."""

    order: Order
    layers: Mapping[str, LayerDecomposition]
    passed_over: Mapping[str, str]
    """Why other convolutions run as before, by name."""
    _model: nn.Module
    _dense: Mapping[str, nn.Conv2d]
    _pairs: Mapping[str, DecomposedConv]

    def undo_(self) -> nn.Module:
        """Put the dense convolutions back, with the weights they had; what was trained is lost.

        They follow the device, dtype and mode of what stood in for them.

        Returns:
            The model.

        Raises:
            AnalysisError: If the model no longer has what was put in; it is left as it is.
        """
        for name, pair in self._pairs.items():
            if not _is_at(self._model, name, pair):
                raise AnalysisError(f"{name} is no longer what decompose_ put there")
        for name, pair in self._pairs.items():
            now = next(pair.parameters())
            dense = self._dense[name].to(now.device, now.dtype).train(pair.training)
            _replace(self._model, pair, dense)
        return self._model

    def __str__(self) -> str:
        before, after = (sum(layer.params[i] for layer in self.layers.values()) for i in range(2))
        lines = [
            f"{len(self.layers)} convolutions as {self.order} pairs, their parameters "
            f"{before:,} -> {after:,}"
        ]
        width = max(map(len, (*self.layers, *self.passed_over)), default=0)
        for name, layer in self.layers.items():
            ratio = layer.macs[1] / layer.macs[0]
            fit = (
                f", output error {layer.fit.before:.3f} -> {layer.fit.after:.3f}"
                if layer.fit
                else ""
            )
            lines.append(
                f"  {name:<{width}}  rank {layer.rank} of {layer.full_rank}, error "
                f"{layer.relative_error:.3f}, MACs {ratio:.2f}x{fit}"
            )
        lines += [f"  {name:<{width}}  kept: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


def decompose_(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    order: Order | str = Order.DW_PW,
    layers: str | Sequence[str] | None = None,
    images: Tensor | None = None,
) -> Decomposition:
    """Replace a model's dense convolutions by pairs, in place; see ``decompose``.

    With ``energy`` or ``max_error`` a convolution that would take more arithmetic as pairs is kept;
    with ``rank`` none is. 1x1, depthwise and transposed convolutions are passed over, and those
    whose weight is computed or shared. The result is an ordinary module: train it, compile it,
    export it.

    Args:
        model: Any module with ``nn.Conv2d`` in it.
        rank: T of every layer; or else
        energy: the share of each kernel's energy to keep, or else
        max_error: the largest relative error of each kernel.
        order: Which part comes first, see ``decompose``.
        layers: Only these, by a regular expression searched in their names or a list of names.
        images: ``(B, C, H, W)``: with them the second part of every pair is fitted, by least
            squares, to what the dense convolution gives for what the changed model feeds it. Take
            many: where they give fewer positions than a layer has unknowns it is not fitted.

    Returns:
        What was done, layer by layer.

    Raises:
        AnalysisError: If there is nothing to take apart, a number is out of range for a layer, or a
            layer is quantised or not finite; the model is left as it was.
        UnknownNameError: If there is no such order or layer.
    """
    order = Order.of(order)
    found = find_dense(model, layers)
    if isinstance(model, nn.Conv2d) or not found.dense:
        others = "; ".join(f"{name}: {why}" for name, why in [*found.passed_over.items()][:3])
        what = (
            "is a convolution itself; use decompose"
            if found.dense
            else f"has no dense convolution, but {others or 'none at all'}"
        )
        raise AnalysisError(f"this {type(model).__name__} {what}")
    passed_over = dict(found.passed_over)
    pairs, done = {}, {}
    for name, conv in found.dense.items():
        pair = _decompose(name, conv, rank, energy, max_error, order)
        layer = _described(conv, pair)
        if rank is None and layer.macs[1] >= layer.macs[0]:
            passed_over[name] = (
                f"{layer.rank} of {layer.full_rank} pairs would take "
                f"{layer.macs[1] / layer.macs[0]:.2f}x the MACs"
            )
            continue
        pairs[name], done[name] = pair, layer
    dense = {name: found.dense[name] for name in pairs}
    for name, pair in pairs.items():
        _replace(model, dense[name], pair)
    result = Decomposition(order, done, passed_over, model, dense, pairs)
    if images is None or not pairs:
        return result
    try:
        fits = refine_(model, {pair: dense[name] for name, pair in pairs.items()}, images)
    except BaseException:
        result.undo_()
        raise
    for name, pair in pairs.items():
        done[name] = _described(dense[name], pair, fits.get(pair))
    return result


def _described(conv: nn.Conv2d, pair: DecomposedConv, fit: Fit | None = None) -> LayerDecomposition:
    stride: Any = conv.stride
    error = relative_error(conv.weight, pair.weight) if fit else pair.relative_error
    return LayerDecomposition(
        pair.rank,
        full_rank(conv.weight, pair.order, conv.groups),
        error,
        (num_params(conv), num_params(pair)),
        (
            conv.weight.numel(),
            pair_macs(conv.weight, pair.rank, pair.order, groups=conv.groups, stride=stride),
        ),
        fit,
    )


def _is_at(model: nn.Module, name: str, module: nn.Module) -> bool:
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names; hooks stay at the place."""
    for attribute in _HOOKS:
        vars(new)[attribute] = vars(old)[attribute]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)
