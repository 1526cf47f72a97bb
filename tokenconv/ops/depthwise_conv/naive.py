"""Tokens copied to NCHW and back, as most code has it: a control, to be measured against."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import TokenGrid


def depthwise_conv_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``; two copies around the convolution, and two for prefix tokens."""
    *frames, rows, cols = grid.size
    num_prefix, (batch, _, dim) = grid.num_prefix_tokens, x.shape
    prefix, spatial = x[:, :num_prefix], x[:, num_prefix:]
    # (B, T*H*W, C) -> (B*T, C, H, W); a plain grid is one frame
    tokens = spatial.reshape(batch * math.prod(frames), rows * cols, dim)
    fmap = tokens.transpose(1, 2).contiguous().unflatten(2, (rows, cols))
    padding = dilation * (weight.shape[-1] // 2)
    out = F.conv2d(fmap, weight, bias, padding=padding, dilation=dilation, groups=dim)
    if residual:
        out = out + fmap
    back = out.flatten(2).transpose(1, 2).contiguous().reshape(spatial.shape)
    return torch.cat([prefix.to(back.dtype), back], dim=1) if num_prefix else back
