"""One gather per kernel tap, for tokens that do not fill their grid, with static shapes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import SparseGrid

_SIDE = 1 << 20  # of the square, or cube, in which a position has a number
_NOWHERE = -(1 << 62)


def depthwise_conv_gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: SparseGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``; takes K*K times the memory of a convolution in training."""
    num_prefix_tokens, dim = grid.num_prefix_tokens, x.shape[-1]
    tokens = x[:, num_prefix_tokens:]
    numbers = _numbers(grid.coords)
    neighbours = _neighbours(numbers, weight.shape[-1], dilation)
    padded = F.pad(tokens, (0, 0, 0, 1))  # the last row is zero, for positions without a token
    taps = weight.flatten(1).unbind(1)
    out = torch.zeros_like(tokens) if bias is None else bias.expand_as(tokens)
    for tap, kernel in enumerate(taps):
        rows = neighbours[:, :, tap, None].expand(-1, -1, dim)
        out = out + padded.gather(1, rows) * kernel
    if residual:
        out = out + tokens
    # Autocast leaves all this in the dtype of the kernel; where the slot is empty, nothing changes
    out = torch.where((numbers == _NOWHERE)[..., None], tokens, out.to(x.dtype))
    return torch.cat([x[:, :num_prefix_tokens], out], dim=1) if num_prefix_tokens else out


def _numbers(coords: Tensor) -> Tensor:
    """One number ``(B, L)`` for every position; ``_NOWHERE`` for empty slots."""
    numbers = torch.zeros_like(coords[..., 0], dtype=torch.int64)
    for axis in coords.unbind(-1):
        numbers = numbers * _SIDE + axis
    return numbers.masked_fill((coords < 0).any(-1), _NOWHERE)


def _neighbours(numbers: Tensor, side: int, dilation: int) -> Tensor:
    """Index of the token under every tap of a kernel ``(B, L, K*K)``; L where there is none."""
    reach = torch.arange(side, device=numbers.device) * dilation - dilation * (side // 2)
    offsets = (reach[:, None] * _SIDE + reach).flatten()
    wanted = (numbers[..., None] + offsets).flatten(1)
    present, order = numbers.sort(dim=1)
    found = torch.searchsorted(present, wanted).clamp(max=numbers.shape[1] - 1)
    index = order.gather(1, found).masked_fill(present.gather(1, found) != wanted, numbers.shape[1])
    return index.unflatten(1, (numbers.shape[1], -1))
