"""``torch.nn.functional.conv2d`` on a channels-last view of the tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import TokenGrid

_IS_NATIVE = {
    dtype: torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, name)())
    for dtype, name in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
}
"""Whether CPUs convolve in this dtype here; if not, PyTorch goes channel by channel."""


def depthwise_conv_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``; copies nothing around the convolution without prefix tokens.

    Takes the views of ``grid.tokens_to_map`` and ``map_to_tokens`` by itself: einops spends more
    Python on them than a small convolution can hide.
    """
    if x.device.type == "cpu" and not _IS_NATIVE.get(x.dtype, True):
        wide = (x.float(), weight.float(), None if bias is None else bias.float())
        return depthwise_conv_conv2d(*wide, grid, dilation, residual).to(x.dtype)
    num_prefix_tokens, dim = grid.num_prefix_tokens, x.shape[-1]
    *frames, rows, cols = grid.size
    spatial = x[:, num_prefix_tokens:] if num_prefix_tokens else x
    # (B, T*H*W, C) -> (B*T, H, W, C) -> (B*T, C, H, W); a plain grid is one frame
    fmap = spatial.reshape(x.shape[0] * math.prod(frames), rows, cols, dim).permute(0, 3, 1, 2)
    padding = dilation * (weight.shape[-1] // 2)
    out = F.conv2d(fmap, weight, bias, padding=padding, dilation=dilation, groups=dim)
    if residual:
        # In place, because a new tensor of this size costs more than the addition; not under an
        # autocast that made the convolution coarser than x.
        out = out.add_(fmap) if out.dtype == fmap.dtype else fmap + out
    tokens = out.permute(0, 2, 3, 1).reshape(spatial.shape)
    if not num_prefix_tokens:
        return tokens
    prefix = x[:, :num_prefix_tokens]
    return torch.cat([prefix.to(out.dtype), tokens], dim=1)  # autocast may have changed the dtype
