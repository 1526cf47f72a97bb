"""Full and grouped convolution on tokens as a module, and depthwise on those of a video.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.errors import GridError
from tokenconv.grid import Grid, TokenGrid, behind_prefix, map_to_tokens, tokens_to_map
from tokenconv.layers.base import GridModule


class GridConv(GridModule):
    """``nn.Conv2d`` on tokens ``(B, N, C)``, stride 1, zero padding that keeps the size.

    Prefix tokens are convolved as images of one pixel: the centre of the kernel acts on them, and
    the bias. Parameters: ``out_dim * dim/groups * K*K``, plus ``out_dim`` with bias; initialised as
    ``nn.Conv2d``, with its keys.

    Args:
        dim: Channels C.
        out_dim: Channels that come out.
        kernel_size: Odd kernel side K.
        groups: Blocks of channels that do not see each other.
        bias: Learn one offset per channel that comes out.

    Raises:
        ValueError: If the kernel is even, or ``groups`` does not divide both widths.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int = 3, *, groups: int = 1, bias: bool = True
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size, got {kernel_size}")
        if min(dim, out_dim, groups) < 1 or dim % groups or out_dim % groups:
            raise ValueError(f"expected groups to divide {dim=} and {out_dim=}, got {groups=}")
        self.dim = dim
        self.out_dim = out_dim
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_dim, dim // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d`` does."""
        _init_as_torch_(self.weight, self.bias)

    def init_centre_(self) -> None:
        """Make it the identity, as far as the widths permit."""
        nn.init.dirac_(self.weight, self.groups)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Convolve the tokens; see ``GridModule``."""
        return _convolve(x, self.weight, self.bias, grid, self.groups)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.dim}, {self.out_dim}, kernel_size={self.weight.shape[-1]}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


class DWConv3d(GridModule):
    """Depthwise convolution on video tokens, over frames, rows and columns.

    Prefix tokens pass unchanged; zero padding keeps the size. ``DWConv`` on a ``(T, H, W)`` grid
    convolves every frame by itself. Parameters: ``C * Kt*K*K``, plus C with bias; initialised as
    ``nn.Conv3d``, with its keys.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K, for all three; or ``(Kt, K, K)``, the frames first.
        bias: Learn one offset per channel.
        residual: Return ``x + conv(x)`` instead of ``conv(x)``.

    Raises:
        ValueError: If ``dim`` is not positive, or a side of the kernel is even.

    References:
        https://arxiv.org/abs/1904.02811
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int, int] = 3,
        *,
        bias: bool = True,
        residual: bool = False,
    ):
        super().__init__()
        sides = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sides) != 3 or any(side < 1 or side % 2 == 0 for side in sides):
            raise ValueError(f"expected one or three odd kernel sides, got {kernel_size}")
        if dim < 1:
            raise ValueError(f"expected dim >= 1, got {dim}")
        self.dim = dim
        self.residual = residual
        self.weight = nn.Parameter(torch.empty(dim, 1, *sides))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv3d`` does."""
        _init_as_torch_(self.weight, self.bias)

    def init_neutral_(self) -> None:
        """Make the convolution zero, so that with ``residual`` the output equals the input."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Convolve the tokens of a ``(T, H, W)`` grid; see ``GridModule``."""
        return _convolve_video(x, self.weight, self.bias, grid, self.residual)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.dim}, kernel_size={tuple(self.weight.shape[2:])}, "
            f"bias={self.bias is not None}, residual={self.residual}"
        )


def _init_as_torch_(weight: Tensor, bias: Tensor | None) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound)


@torch.fx.wrap
def _convolve_video(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[Grid, ...], residual: bool
) -> Tensor:
    """One fx node: the checks in it cannot be traced symbolically."""
    known = TokenGrid.of(*grid)
    if len(known.size) != 3:
        raise GridError(f"expected a grid (T, H, W), got {known.size}; DWConv takes (H, W)")
    video = tokens_to_map(x, known)
    padding = [side // 2 for side in weight.shape[2:]]
    out = F.conv3d(video, weight, bias, padding=padding, groups=len(weight))
    tokens = map_to_tokens(out + video if residual else out)
    return behind_prefix(tokens, x, known.num_prefix_tokens)


@torch.fx.wrap
def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[Grid, ...], groups: int
) -> Tensor:
    """One fx node: the checks in it cannot be traced symbolically."""
    known = TokenGrid.of(*grid)
    centre = weight.shape[-1] // 2
    fmap = F.conv2d(tokens_to_map(x, known), weight, bias, padding=centre, groups=groups)
    if not known.num_prefix_tokens:
        return map_to_tokens(fmap)
    prefix = x[:, : known.num_prefix_tokens].transpose(1, 2)
    out = F.conv1d(prefix, weight[:, :, centre, centre, None], bias, groups=groups)
    return map_to_tokens(fmap, out.transpose(1, 2))
