"""Separable layers read as the dense kernel they are, and started from a trained one.

Shape letters as in ``factors``.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.analysis.convolutions import check_finite, is_depthwise
from tokenconv.analysis.factors import Factors, Order, factorise, full_rank, relative_error
from tokenconv.errors import AnalysisError
from tokenconv.layers import DWConv


def expand(module: nn.Module) -> nn.Conv2d:
    """The dense convolution that a separable layer is.

    Args:
        module: A depthwise part and one or more pointwise parts behind it or in front of it, and
            nothing that is not linear: ``SeparableConv``, ``BSConvU``, ``BSConvS``,
            ``DecomposedConv``, an ``nn.Sequential`` of convolutions. On maps or on tokens.

    Returns:
        A convolution of maps, with the stride, padding and dilation of the depthwise part.

    Raises:
        AnalysisError: If the module is none of these, or a part in front of the depthwise one has
            a bias, which is no constant at the borders.
    """
    parts = _Parts.of(module)
    factors, bias = parts.factors(), parts.bias()
    weight = factors.expand()
    spatial = dict(parts.spatial)
    conv = nn.Conv2d(
        weight.shape[1] * parts.groups, len(weight), spatial.pop("kernel_size"),
        groups=parts.groups, bias=bias is not None, device="meta", **spatial,
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.detach())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach())
    return conv


def factors_of(module: nn.Module) -> Factors:
    """The kernel of a separable layer as pairs; see ``expand``."""
    return _Parts.of(module).factors()


def init_from_dense_(module: nn.Module, conv: nn.Conv2d) -> float:
    """Start a separable layer from the kernel of a trained dense convolution, in place.

    The nearest kernel that the layer can be, in the Frobenius norm, and the bias. For ``BSConvS``
    the pointwise weights are cut to their rank behind that. Patch embeddings and stems are dense
    convolutions like others.

    Args:
        module: As for ``expand``.
        conv: Of the same widths and kernel sides.

    Returns:
        ``||W - W'|| / ||W||``.

    Raises:
        AnalysisError: If the layer cannot be read as pairs, or the shapes differ; nothing changed.
    """
    parts = _Parts.of(module)
    check_finite("the convolution", conv.weight)
    have, want = tuple(parts.factors().expand().shape), tuple(conv.weight.shape)
    if have != want or parts.groups != conv.groups:
        raise AnalysisError(
            f"expected a kernel {have} in {parts.groups} groups as the layer has, got {want} in "
            f"{conv.groups}"
        )
    if conv.bias is not None and parts.last.bias is None:
        raise AnalysisError("the convolution has a bias, and the layer has no place for one")
    rank = min(parts.rank, full_rank(conv.weight, parts.order, conv.groups))
    factors = factorise(conv.weight, rank, order=parts.order, groups=conv.groups)
    with torch.no_grad():
        parts.write_(factors)
        for part in (parts.depthwise, *parts.pointwise):
            if part.bias is not None:
                part.bias.zero_()
        if conv.bias is not None:
            parts.last.bias.copy_(conv.bias)
    return relative_error(conv.weight, parts.factors().expand())


@dataclass(frozen=True)
class _Parts:
    """The convolutions in a separable layer."""

    order: Order
    depthwise: Any
    pointwise: list[Any]
    """In the order they run in."""
    rank: int

    @classmethod
    def of(cls, module: nn.Module) -> "_Parts":
        """Find them, or say why there are none."""
        leaves = [m for m in module.modules() if not list(m.children())]
        parts = [leaf for leaf in leaves if not isinstance(leaf, nn.Identity)]
        kind = type(module).__name__
        for leaf in parts:
            if not isinstance(leaf, nn.Conv2d | nn.Linear | DWConv):
                raise AnalysisError(f"{kind} is no separable layer: it has a {type(leaf).__name__}")
        first, last = (_is_depthwise(parts[i]) if parts else False for i in (0, -1))
        if len(parts) < 2 or first == last or sum(map(_is_depthwise, parts)) != 1:
            raise AnalysisError(
                f"expected one depthwise part at the beginning or the end of {kind} and pointwise "
                f"ones, got {', '.join(type(p).__name__ for p in parts) or 'nothing'}"
            )
        depthwise: Any = parts[0] if first else parts[-1]
        pointwise: list[Any] = parts[1:] if first else parts[:-1]
        if isinstance(depthwise, DWConv) and (depthwise.residual or depthwise.activation):
            raise AnalysisError(f"the depthwise part of {kind} has a residual or an activation")
        if any(_strided(part) for part in pointwise):
            raise AnalysisError(f"a pointwise part of {kind} is no 1x1 convolution with stride 1")
        if len(pointwise) > 1 and any(getattr(part, "groups", 1) > 1 for part in pointwise):
            raise AnalysisError(f"one of several pointwise parts of {kind} has groups")
        order = Order.DW_PW if first else Order.PW_DW
        kernels, per_kernel = depthwise.weight.shape[:2]
        dim = getattr(depthwise, "groups", kernels)
        return cls(order, depthwise, pointwise, kernels // dim if first else per_kernel)

    @property
    def last(self) -> Any:
        """The part that runs last."""
        return self.pointwise[-1] if self.order is Order.DW_PW else self.depthwise

    @property
    def groups(self) -> int:
        """Of the pointwise parts."""
        return getattr(self.pointwise[0], "groups", 1)

    @property
    def spatial(self) -> dict[str, Any]:
        """What ``nn.Conv2d`` takes besides widths."""
        conv = self.depthwise
        if isinstance(conv, DWConv):
            padding = conv.dilation * (conv.kernel_size // 2)
            return {
                "kernel_size": conv.kernel_size, "padding": padding, "dilation": conv.dilation,
            }  # fmt: skip
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        return {name: getattr(conv, name) for name in names}

    def factors(self) -> Factors:
        """The kernel."""
        pointwise = self.pointwise[0].weight.flatten(1)
        for part in self.pointwise[1:]:
            pointwise = part.weight.flatten(1) @ pointwise
        return Factors.of_weights(self.order, self.depthwise.weight, pointwise, self.rank)

    def write_(self, factors: Factors) -> None:
        """Take a kernel over; several pointwise parts share it by its singular vectors."""
        factors = factors.padded(self.rank)
        self.depthwise.weight.copy_(factors.depthwise_weight)
        rest = factors.pointwise_weight.flatten(1)
        for part in self.pointwise[:-1]:
            left, values, right = torch.linalg.svd(rest.double(), full_matrices=False)
            inner = len(part.weight)
            right = F.pad(right[:inner], (0, 0, 0, max(0, inner - len(right))))
            part.weight.copy_(right.reshape_as(part.weight))
            left = left[:, :inner] * values[:inner]
            rest = F.pad(left, (0, max(0, inner - left.shape[1])))
        self.pointwise[-1].weight.copy_(rest.reshape_as(self.pointwise[-1].weight))

    def bias(self) -> Tensor | None:
        """What the layer adds to every output."""
        front = [self.depthwise] if self.order is Order.DW_PW else self.pointwise
        if self.order is Order.PW_DW:
            if any(part.bias is not None and part.bias.any() for part in front):
                raise AnalysisError(
                    "a pointwise part in front of the depthwise one has a bias: near the borders "
                    "it adds less, so the layer is no convolution; see expand_mlp"
                )
            return self.depthwise.bias
        bias = self.depthwise.bias
        for part in self.pointwise:
            if bias is not None:
                bias = part.weight.flatten(1) @ bias
            if part.bias is not None:
                bias = part.bias if bias is None else bias + part.bias
        return bias


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, DWConv) or (isinstance(module, nn.Conv2d) and is_depthwise(module))


def _strided(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and (
        module.kernel_size != (1, 1) or module.stride != (1, 1) or module.padding not in ((0, 0), 0)
    )
