"""The slow and obvious way: one shifted multiply-add per kernel tap."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import TokenGrid


def depthwise_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``; written without fold, unfold or a convolution routine."""
    *frames, rows, cols = grid.size
    num_prefix, dim = grid.num_prefix_tokens, x.shape[-1]
    prefix, spatial = x[:, :num_prefix], x[:, num_prefix:]
    # (B, T*H*W, C) -> (B, T, H, W, C); a plain grid is one frame
    fmap = spatial.reshape(x.shape[0], *(frames or [1]), rows, cols, dim)
    side = weight.shape[-1]
    reach = dilation * (side // 2)
    padded = F.pad(fmap, (0, 0, reach, reach, reach, reach))
    out = torch.zeros_like(fmap)
    for i in range(side):
        for j in range(side):
            top, left = i * dilation, j * dilation
            out = out + padded[:, :, top : top + rows, left : left + cols] * weight[:, 0, i, j]
    if bias is not None:
        out = out + bias
    if residual:
        out = out + fmap
    return torch.cat([prefix, out.reshape(spatial.shape)], dim=1)
