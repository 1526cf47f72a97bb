"""Ways of writing depthwise convolution with its activation on tokens, on the same weights.

``naive`` copies the tokens to NCHW and back, ``timm`` makes the calls that timm makes in PVTv2,
``ours`` is ``tokenconv.depthwise_conv`` and ``triton`` the same with our kernel. Class tokens skip
the convolution: the first two slice and concatenate. Where only some tokens are left, other ones in
every image, they put them on a map of zeros and pick them from the result, and ours gathers.
``copy`` (of the input) and ``activation`` (alone) read and write as many bytes as the whole must,
at least: they are the limit, and what a Transformer's MLP without convolution spends there.

Shape letters: B batch, N tokens = P prefix + H*W grid, C channels, K kernel side.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from common import DTYPES, compiled
from torch import Tensor, nn

import tokenconv as tc

Arm = Callable[[Tensor], Tensor]
Buffer = tuple[Tensor, Tensor]
"""Tokens, and the gradient of what is made of them."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


@dataclass(frozen=True)
class Case:
    """One shape, written ``BxHxWxC``, with ``+P`` prefix tokens, or with ``/L`` tokens left."""

    batch_size: int
    rows: int
    cols: int
    dim: int
    num_prefix_tokens: int = 0
    left: int | None = None
    """Tokens that are left of every image; None for all."""

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read ``8x14x14x1536``, ``8x14x14x1536+1``, ``8x14x14x1536/98`` or ``...+1/98``."""
        shape, _, left = text.partition("/")
        shape, _, prefix = shape.partition("+")
        batch_size, rows, cols, dim = (int(number) for number in shape.split("x"))
        return cls(batch_size, rows, cols, dim, int(prefix or 0), int(left) if left else None)

    def __str__(self) -> str:
        prefix = f"+{self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        left = "" if self.left is None else f"/{self.left}"
        return f"{self.batch_size}x{self.rows}x{self.cols}x{self.dim}{prefix}{left}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, N, C)``."""
        left = self.rows * self.cols if self.left is None else self.left
        return self.batch_size, self.num_prefix_tokens + left, self.dim

    def kept(self, device: torch.device) -> Tensor:
        """Indices ``(B, L)`` of the tokens that are left, always the same ones."""
        drawn = torch.Generator().manual_seed(1)
        order = torch.rand(self.batch_size, self.rows * self.cols, generator=drawn).argsort(1)
        return order[:, : self.left].to(device)


@dataclass(frozen=True)
class Layer:
    """The weights that all arms of a case share, and the activation behind them."""

    case: Case
    conv: nn.Conv2d
    activation: str

    @classmethod
    def of(cls, case: Case, args: argparse.Namespace) -> "Layer":
        """A new one."""
        dim, side = case.dim, args.kernel_size
        conv = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim)
        return cls(case, conv.to(args.device, DTYPES[args.dtype]), args.activation)

    @cached_property
    def act(self) -> nn.Module:
        """The activation as torch has it."""
        return ACTIVATIONS[self.activation]()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.conv.weight.device

    def buffers(self, count: int) -> list[Buffer]:
        """Random tokens and gradients."""
        drawn = torch.Generator(self.device).manual_seed(0)
        make = partial(
            torch.randn, self.case.shape, generator=drawn, device=self.device,
            dtype=self.conv.weight.dtype,
        )  # fmt: skip
        return [(make().requires_grad_(), make()) for _ in range(count)]


# --- arms ---


def naive(layer: Layer) -> Arm:
    """As most code has it: real NCHW copies on both sides."""
    case, conv = layer.case, layer.conv

    def run(x: Tensor) -> Tensor:
        fmap = x.transpose(1, 2).reshape(len(x), case.dim, case.rows, case.cols).contiguous()
        return conv(fmap).contiguous().flatten(2).transpose(1, 2).contiguous()

    return _around(layer, run)


def timm(layer: Layer) -> Arm:
    """The calls that ``timm.models.pvt_v2.MlpWithDepthwiseConv`` makes around its convolution."""
    case, conv = layer.case, layer.conv

    def run(x: Tensor) -> Tensor:
        B, _, C = x.shape
        x = x.transpose(1, 2).view(B, C, case.rows, case.cols)
        x = conv(x)
        return x.flatten(2).transpose(1, 2)

    return _around(layer, run)


def ours(layer: Layer, impl: str | None = None) -> Arm:
    """``tokenconv.depthwise_conv``."""
    case, conv = layer.case, layer.conv
    grid: Any = tc.TokenGrid((case.rows, case.cols), case.num_prefix_tokens)
    if case.left is not None:
        kept = case.kept(layer.device)
        coords = torch.stack([kept // case.cols, kept % case.cols], dim=-1)
        grid = tc.SparseGrid(coords, case.num_prefix_tokens)
    activation = None if layer.activation == "none" else layer.activation
    return lambda x: tc.depthwise_conv(
        x, conv.weight, conv.bias, grid, activation=activation, impl=impl
    )


def _around(layer: Layer, run: Arm) -> Arm:
    """What code for full grids without prefix tokens does to be used elsewhere; activates."""
    case, act = layer.case, layer.act
    if case.left is not None:
        run = _on_zeros(case, case.kept(layer.device), run)
    P = case.num_prefix_tokens
    if P:
        return lambda x: act(torch.cat([x[:, :P], run(x[:, P:])], dim=1))
    return lambda x: act(run(x))


def _on_zeros(case: Case, kept: Tensor, run: Arm) -> Arm:
    index = kept[..., None].expand(-1, -1, case.dim)

    def around(x: Tensor) -> Tensor:
        whole = x.new_zeros(len(x), case.rows * case.cols, case.dim).scatter(1, index, x)
        return run(whole).gather(1, index)

    return around


COMPARED: dict[str, Callable[[Layer], Arm]] = {
    "naive": naive,
    "timm": timm,
    "timm_compiled": lambda layer: compiled(timm(layer)),
    "ours": ours,
    "ours_compiled": lambda layer: compiled(ours(layer)),
    "triton": partial(ours, impl="triton"),
    "triton_compiled": lambda layer: compiled(ours(layer, "triton")),
}
LIMITS: dict[str, Callable[[Layer], Arm]] = {
    "copy": lambda layer: Tensor.clone,
    "activation": lambda layer: layer.act,
}
"""They compute something else."""


def own_arm(device: str) -> str:
    """The arm that others are divided by."""
    return "triton" if device == "cuda" else "ours"


def arms_of(layer: Layer, mode: str, args: argparse.Namespace) -> dict[str, Arm]:
    """Those that were asked for, without those that have nothing to do here."""
    without = {name for name in args.arms if name.startswith("triton") and layer.case.left}
    if mode != "forward":
        without.add("copy")  # a gradient is handed on and not copied
    if layer.activation == "none":
        without.add("activation")
    makers = COMPARED | LIMITS
    return {name: makers[name](layer) for name in makers if name in {*args.arms} - without}
