"""``torch.nn.functional.conv2d`` on a channels-last view of the tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.grid import TokenGrid, behind_prefix, frames_to_tokens, tokens_to_frames

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
    """See ``api.depthwise_conv``; copies nothing around the convolution without prefix tokens."""
    if x.device.type == "cpu" and not _IS_NATIVE.get(x.dtype, True):
        wide = (x.float(), weight.float(), None if bias is None else bias.float())
        return depthwise_conv_conv2d(*wide, grid, dilation, residual).to(x.dtype)
    fmap, padding = tokens_to_frames(x, grid), dilation * (weight.shape[-1] // 2)
    out = F.conv2d(fmap, weight, bias, padding=padding, dilation=dilation, groups=x.shape[-1])
    if residual:
        # In place, because a new tensor of this size costs more than the addition; not under an
        # autocast that made the convolution coarser than x.
        out = out.add_(fmap) if out.dtype == fmap.dtype else fmap + out
    return behind_prefix(frames_to_tokens(out, grid), x, grid.num_prefix_tokens)
