"""What a price is: parameters, multiply-accumulates and bytes, and whose they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class Price:
    """What something costs for one image.

    A multiply-accumulate counts once; convolutions and matrix products are counted and nothing
    else, as in the papers. Prices add up.
    """

    params: int
    """Parameters."""
    macs: int
    """Multiply-accumulates of a forward pass."""
    backward_macs: int
    """Multiply-accumulates of the backward pass that belongs to it."""
    bytes: int
    """Bytes that the operators of a forward pass read and write."""

    @property
    def intensity(self) -> float:
        """Multiply-accumulates per byte of a forward pass; half its FLOPs per byte."""
        return self.macs / self.bytes if self.bytes else 0.0

    def __add__(self, other: "Price") -> "Price":
        return Price(
            params=self.params + other.params,
            macs=self.macs + other.macs,
            backward_macs=self.backward_macs + other.backward_macs,
            bytes=self.bytes + other.bytes,
        )


class Category(StrEnum):
    """What an operator does."""

    DEPTHWISE = "depthwise convolution"
    """Every kernel sees one channel."""
    POINTWISE = "pointwise convolution"
    """1x1, and all channels see each other."""
    CONVOLUTION = "convolution"
    """Any other: standard, grouped, transposed."""
    LINEAR = "linear"
    """Products of a matrix that does not depend on the image."""
    ATTENTION = "attention"
    """Products of two matrices that both depend on it, and the softmax between them."""
    NORM = "norm"
    ACTIVATION = "activation"
    OTHER = "other"
    """Additions, copies, pooling, embeddings; and parameters that nothing reads."""


@dataclass(frozen=True, kw_only=True)
class SiteCost(Price):
    """What one module inside a model costs."""

    calls: int
    """How often it runs in one forward pass."""
    input_shape: tuple[int, ...]
    """Shape of what it is given, for one image; empty if it never runs."""


@dataclass(frozen=True, kw_only=True)
class Cost(Price):
    """What a model costs for one image.

    ``bytes`` is the traffic of eager execution: every operator reads its tensors once and writes
    its results once, views are free.

    ``backward_macs`` follows ``requires_grad``: a product costs what it costs forward for each of
    its two factors that wants a gradient. So it is twice the forward pass, less what the first
    layer would need for the gradient of the image, and less what frozen weights and the layers in
    front of the first trainable one would need. The input of a block or layer of tokenconv, when it
    is priced by itself, wants a gradient, as inside a network. All of the output is taken to have a
    gradient, and nothing to be computed anew, as checkpoints and fused attention do.
    """

    sites: Mapping[str, SiteCost]
    """The modules that were asked for, by name."""
    categories: Mapping[Category, Price]
    """What operators of a kind cost, of the kinds that occur; they add up to the whole. A parameter
    belongs to the first operator in which it meets the image."""
