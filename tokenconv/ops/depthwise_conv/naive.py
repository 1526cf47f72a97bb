"""Tokens copied to NCHW and back, as most code has it: a control, to be measured against."""

import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import TokenGrid, behind_prefix, frames_to_tokens, tokens_to_frames


def depthwise_conv_naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``; two copies around the convolution, and two for prefix tokens."""
    fmap, padding = tokens_to_frames(x, grid).contiguous(), dilation * (weight.shape[-1] // 2)
    out = F.conv2d(fmap, weight, bias, padding=padding, dilation=dilation, groups=x.shape[-1])
    if residual:
        out = out + fmap
    tokens = frames_to_tokens(out, grid).contiguous()
    return behind_prefix(tokens, x, grid.num_prefix_tokens)
