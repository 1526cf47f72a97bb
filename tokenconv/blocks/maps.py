"""What blocks on maps are composed of; they take tokens as well.

Shape letters: B batch, C channels, N tokens = P prefix + grid, K kernel side.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tokenconv.blocks.chain import Steps, check_foldable, init_torch_
from tokenconv.errors import GridError
from tokenconv.grid import Grid, TokenGrid
from tokenconv.layers import GridModule


class MapBlock(GridModule):
    """Steps on maps, one after another; common to the classic depthwise separable blocks.

    ``block(fmap)`` takes ``(B, C, H, W)`` and gives a map. ``block(x, *grid)`` lays tokens out as
    one, runs on it, and gives tokens; with a stride it gives ``(tokens, TokenGrid)``. Frames of a
    ``(T, H, W)`` grid are images by themselves. Prefix tokens pass unchanged, so the width must
    stay where there are some. Convolutions are zero-padded by half their reach.

    Args:
        dim: Channels C.
        out_dim: Channels that come out; None takes ``dim``.
        kernel_size: Odd kernel side K, several where the block has several; None takes the paper's.
        stride: Step of the convolution over the grid: ``ceil(H / stride)`` rows come out.
        residual: Add the input where width and size stay; None does as the paper.
        **own: Arguments that only one block has.

    Raises:
        ValueError: If a width or the stride is not positive, the kernel is even, or a width does
            not fit the block.
        GridError: If tokens do not fill the grid, or prefix tokens would change their width.
        TypeError: If the block has no such argument.
    """

    kernel_size: int | tuple[int, ...] = 3
    """Of the class: the paper's."""
    adds_input: ClassVar[bool] = False
    """Whether the paper adds the input."""
    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_torch_)
    """How the paper's code starts the weights."""
    prefix_tokens: Literal["pass", "vanish"] = "pass"
    """What prefix tokens do: pass unchanged, or become zero."""

    def __init__(
        self,
        dim: int,
        *,
        out_dim: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int = 1,
        residual: bool | None = None,
        **own: Any,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if min(dim, out_dim, stride) < 1:
            raise ValueError(
                f"expected positive dim, out_dim and stride, got {dim=}, {out_dim=}, {stride=}"
            )
        self.dim, self.out_dim, self.stride = dim, out_dim, stride
        self.kernel_size = self._sides(kernel_size)
        steps = self.steps(dim, out_dim, self.kernel_size, stride, **own)
        self.body = nn.Sequential(OrderedDict((k, v) for k, v in steps.items() if v is not None))
        adds_input = self.adds_input if residual is None else residual
        self.skip = self.shortcut(dim, out_dim, stride) if adds_input else None
        self.after = self.behind(out_dim)
        self.reset_parameters()

    def _sides(self, kernel_size: int | Sequence[int] | None) -> Any:
        """One kernel side, or several where the paper's block has several."""
        sides = self.kernel_size if kernel_size is None else kernel_size
        many = isinstance(self.kernel_size, tuple)
        row = tuple(sides) if isinstance(sides, Sequence) else (sides,)
        if not row or any(side < 1 or side % 2 == 0 for side in row) or not (many or len(row) == 1):
            wanted = "odd kernel_size, one or several" if many else "odd kernel_size"
            raise ValueError(f"expected an {wanted}, got {kernel_size}")
        return row if many else row[0]

    def steps(self, dim: int, out_dim: int, side: Any, stride: int) -> Steps:
        """The paper's steps, in their order."""
        raise NotImplementedError

    def shortcut(self, dim: int, out_dim: int, stride: int) -> nn.Module | None:
        """What the input goes through before it is added; None adds nothing."""
        return nn.Identity() if stride == 1 and out_dim == dim else None

    def behind(self, out_dim: int) -> nn.Module | None:
        """What follows the addition."""
        return None

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)

    def init_neutral_(self) -> None:
        """Make what the steps give zero, by the last of them; the others start anew."""
        type(self).reset_parameters(self)
        silence_(self.body)

    def run(self, fmap: Tensor) -> Tensor:
        """Run on a map."""
        out = self.body(fmap)
        if self.skip is not None:
            out = out + self.skip(fmap)
        return out if self.after is None else self.after(out)

    def forward(self, x: Tensor, *grid: Grid) -> Any:
        """Run on a map, or on tokens and their grid; see the class."""
        if not grid:
            return self.run(checked(x, self.dim))
        fmap = self.run(lay_out(x, grid, self.dim))
        tokens = line_up(fmap, x, grid, self.prefix_tokens)
        return tokens if self.stride == 1 else (tokens, grid_behind(fmap, grid))

    def fold_(self) -> bool:
        """Fold every ``BatchNorm`` into the convolution in front of it, in place, for inference.

        Branches that merge become one convolution first. Equal in real arithmetic; the keys of
        what is folded go with it.

        Returns:
            Whether anything changed.

        Raises:
            ValueError: In training mode, or if values are stored in fewer than 32 bits.
        """
        return fold_convs_(self)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.dim}, {self.out_dim}, stride={self.stride}"


class Mixer(MapBlock):
    """A block on maps that keeps width and size, as what stands in place of attention does.

    Args besides those of ``MapBlock``, without ``out_dim`` and ``stride``:
        **own: Arguments that only one block has.

    Raises:
        ValueError: As ``MapBlock``, and if ``out_dim`` is not ``dim`` or the stride is not one.
    """

    def steps(self, dim: int, out_dim: int, side: Any, stride: int, **own: Any) -> Steps:
        """See ``mix``."""
        if out_dim != dim or stride != 1:
            raise ValueError(
                f"expected out_dim == dim and stride 1, since {type(self).__name__} keeps width "
                f"and size, got {dim=}, {out_dim=}, {stride=}"
            )
        return self.mix(dim, side, **own)

    def mix(self, dim: int, side: Any) -> Steps:
        """The paper's steps, in their order."""
        raise NotImplementedError


def silence_(part: Any) -> None:
    """Make what a module gives zero, by the last layers that have parameters."""
    if hasattr(part, "init_neutral_"):
        part.init_neutral_()
    elif type(part) is nn.Sequential:
        silence_([step for step in part if next(step.parameters(), None) is not None][-1])
    else:
        for parameter in part.parameters():
            nn.init.zeros_(parameter)


def fold_convs_(module: nn.Module) -> bool:
    """Merge branches, and fold every norm behind a convolution into it; see ``MapBlock.fold_``."""
    check_foldable(module)
    merged = [_merge_(row) for row in _rows(module)]
    return any(merged + [_fold_norms_(row) for row in _rows(module)])


def _rows(block: nn.Module) -> list[nn.Sequential]:
    return [part for part in block.modules() if isinstance(part, nn.Sequential)]


def _merge_(row: nn.Sequential) -> bool:
    mergeable = {name: step for name, step in row.named_children() if hasattr(step, "merged")}
    for name, step in mergeable.items():
        row._modules[name] = step.merged()  # pyright: ignore[reportCallIssue]
    return bool(mergeable)


def _fold_norms_(row: nn.Sequential) -> bool:
    steps: Any = row._modules
    norms = [
        (name, following)
        for name, following in pairwise(steps)
        if type(steps[name]) is nn.Conv2d and isinstance(steps[following], nn.BatchNorm2d)
    ]
    for name, following in norms:
        with torch.inference_mode(False):
            steps[name] = fuse_conv_bn_eval(steps[name], steps[following])
        del steps[following]
    return bool(norms)


def checked(fmap: Tensor, dim: int) -> Tensor:
    """A map, if it is one of this width."""
    if fmap.ndim != 4 or fmap.shape[1] != dim:
        raise GridError(
            f"expected a map (B, {dim}, H, W), or tokens and their grid, block(x, H, W); got a "
            f"tensor of shape {tuple(fmap.shape)}"
        )
    return fmap


def lay_out(x: Tensor, grid: tuple[Grid, ...], dim: int) -> Tensor:
    """Tokens as maps, the frames of a video as images by themselves."""
    known = TokenGrid.of(*grid)
    known.check(x)
    *frames, rows, cols = known.size
    spatial = x[:, known.num_prefix_tokens :]
    # (B, T*H*W, C) -> (B*T, H, W, C) -> (B*T, C, H, W); a plain grid is one frame
    fmaps = spatial.reshape(x.shape[0] * math.prod(frames), rows, cols, x.shape[2])
    return checked(fmaps.permute(0, 3, 1, 2), dim)


def line_up(fmap: Tensor, x: Tensor, grid: tuple[Grid, ...], policy: str) -> Tensor:
    """Maps as tokens, behind the prefix tokens of ``x``."""
    known = TokenGrid.of(*grid)
    count = math.prod((*known.size[:-2], *fmap.shape[2:]))
    tokens = fmap.permute(0, 2, 3, 1).reshape(x.shape[0], count, fmap.shape[1])
    prefix = x[:, : known.num_prefix_tokens]
    if not prefix.shape[1]:
        return tokens
    if prefix.shape[2] != tokens.shape[2]:
        raise GridError(
            f"prefix tokens pass a block unchanged, which needs out_dim == dim, got "
            f"{tokens.shape[2]} and {prefix.shape[2]}: take them away first, or keep the width"
        )
    first = prefix if policy == "pass" else torch.zeros_like(prefix)
    return torch.cat([first.to(tokens.dtype), tokens], dim=1)


def grid_behind(fmap: Tensor, grid: tuple[Grid, ...]) -> TokenGrid:
    """The grid of tokens that a map was made of."""
    known = TokenGrid.of(*grid)
    return TokenGrid((*known.size[:-2], *fmap.shape[-2:]), known.num_prefix_tokens)


for _checks in ("checked", "lay_out", "line_up", "grid_behind"):  # they cannot be traced
    torch.fx.wrap(_checks)


# --- parts ---


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
    steps = {"conv": conv(dim, out_dim, side, **kwargs), "norm": nn.BatchNorm2d(out_dim)}
    return nn.Sequential(OrderedDict(steps if act is None else {**steps, "act": act}))


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


def projection(dim: int, out_dim: int, stride: int) -> nn.Module:
    """The input where width and size stay, and else a 1x1 convolution of it and a norm."""
    if stride == 1 and dim == out_dim:
        return nn.Identity()
    return nn.Sequential(conv(dim, out_dim, stride=stride), nn.BatchNorm2d(out_dim))


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
