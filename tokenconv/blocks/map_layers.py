"""What blocks on maps ``(B, C, H, W)`` are made of: convolutions, rows and branches, norms."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.starts import silence_
from tokenconv.layers import GlobalResponseNorm


def in_a_row(steps: Steps) -> nn.Sequential:
    """Steps one after another; None is left out."""
    return nn.Sequential(OrderedDict((k, v) for k, v in steps.items() if v is not None))


# --- convolutions ---


def conv(
    dim: int,
    out_dim: int,
    side: int | tuple[int, int] = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """A convolution, zero-padded by half its reach; ``side`` may be rows and columns.

    Raises:
        ValueError: If a number is not positive, or ``groups`` does not divide both widths.
    """
    if min(dim, out_dim, groups, dilation) < 1:
        raise ValueError(
            f"expected positive widths, groups and dilation, got {dim=}, {out_dim=}, {groups=}, "
            f"{dilation=}"
        )
    if dim % groups or out_dim % groups:
        raise ValueError(f"expected groups to divide {dim=} and {out_dim=}, got {groups=}")
    rows, cols = (side, side) if isinstance(side, int) else side
    return nn.Conv2d(
        dim,
        out_dim,
        (rows, cols),
        stride=stride,
        padding=(dilation * (rows // 2), dilation * (cols // 2)),
        dilation=dilation,
        groups=groups,
        bias=bias,
    )


def depthwise(dim: int, side: int | tuple[int, int] = 3, **kwargs: Any) -> nn.Conv2d:
    """A convolution in which channels do not see each other."""
    return conv(dim, dim, side, groups=dim, **kwargs)


def conv_norm(
    dim: int, out_dim: int, side: int = 1, *, act: nn.Module | None = None, **kwargs: Any
) -> nn.Sequential:
    """A convolution, a norm, and an activation if there is one."""
    kernel = conv(dim, out_dim, side, **kwargs)
    return in_a_row({"conv": kernel, "norm": nn.BatchNorm2d(out_dim), "act": act})


def depthwise_norm(dim: int, side: int, *, act: nn.Module | None = None, **kwargs: Any) -> Any:
    """The same with a depthwise convolution."""
    return conv_norm(dim, dim, side, act=act, groups=dim, **kwargs)


def divisible(width: float, divisor: int = 8, limit: float = 0.9) -> int:
    """The nearest multiple of a number, at least that, and not below ``limit`` of the width."""
    near = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return near + divisor if near < limit * width else near


def squeeze_excite(dim: int, width: int, act: nn.Module) -> nn.Module:
    """Squeeze-and-excitation, https://arxiv.org/abs/1709.01507."""
    return Gated(
        OrderedDict(
            reduce=conv(dim, width, bias=True),
            act=act,
            expand=conv(width, dim, bias=True),
            gate=nn.Sigmoid(),
        )
    )


# --- rows and branches ---


class Gated(nn.Sequential):
    """``x * steps(mean of x over the map)``, as in squeeze-and-excitation."""

    def forward(self, input: Tensor) -> Tensor:
        """Scale the channels."""
        return input * super().forward(input.mean((2, 3), keepdim=True))


class Residual(nn.Sequential):
    """``x`` plus what the steps make of it."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the steps, and add."""
        return input + super().forward(input)


class Parallel(nn.Module):
    """What several modules make of the same map, one behind the other in the channels, or added.

    Args:
        *branches: The modules.
        add: Add the maps.
    """

    def __init__(self, *branches: nn.Module, add: bool = False):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.add = add

    def init_neutral_(self) -> None:
        """Make the output zero."""
        for branch in self.branches:
            silence_(branch)

    def forward(self, x: Tensor) -> Tensor:
        """Run all on the same map."""
        outs = [branch(x) for branch in self.branches]
        return reduce(torch.add, outs) if self.add else torch.cat(outs, dim=1)


class Split(nn.Module):
    """Each of several modules on channels of its own.

    Args:
        widths: Channels that each is given.
        *branches: The modules.
    """

    def __init__(self, widths: Sequence[int], *branches: nn.Module):
        super().__init__()
        self.widths = list(widths)
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Cut the channels, run, and put them together again."""
        parts = x.split(self.widths, dim=1)
        outs = [branch(parts[i]) for i, branch in enumerate(self.branches)]
        return torch.cat(outs, dim=1)


class ChannelShuffle(nn.Module):
    """Channel ``i`` of every group, then channel ``i + 1`` of every group, and so on.

    Args:
        groups: Number of groups.
    """

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Put the channels in another order."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


# --- norms, scales and products ---


class LayerNorm2d(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of every pixel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm2d(GlobalResponseNorm):
    """``GlobalResponseNorm`` on a map."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let the channels compete."""
        rows, cols = x.shape[2], x.shape[3]
        tokens = super().forward(x.flatten(2).transpose(1, 2), rows, cols)
        return tokens.transpose(1, 2).unflatten(2, (rows, cols))


class LayerScale2d(nn.Module):
    """``gamma * x``, a number per channel.

    Args:
        dim: Channels C.
        value: What the numbers start from.
    """

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the one value."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        return x * self.gamma[:, None, None]


class Modulated(nn.Module):
    """``context(x) * value(x)``, common to all convolutional modulation.

    Args:
        context: What gives the weights; its convolutions see the neighbours.
        value: What is weighed; None takes ``x``.
    """

    def __init__(self, context: nn.Module, value: nn.Module | None = None):
        super().__init__()
        self.context = context
        self.value = nn.Identity() if value is None else value

    def forward(self, x: Tensor) -> Tensor:
        """Modulate."""
        return self.context(x) * self.value(x)
