"""``torch.nn.functional.conv2d`` on a channels-last view of the tokens."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenconv.grid import TokenGrid, map_to_tokens, tokens_to_map


def depthwise_conv_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: TokenGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``; copies nothing around the convolution without prefix tokens."""
    fmap = tokens_to_map(x, grid)
    video = fmap.ndim == 5
    if video:
        fmap = rearrange(fmap, "b c t h w -> (b t) c h w")
    padding = dilation * (weight.shape[-1] // 2)
    out = F.conv2d(fmap, weight, bias, padding=padding, dilation=dilation, groups=x.shape[-1])
    if residual:
        # In place, because a new tensor of this size costs more than the addition; not under an
        # autocast that made the convolution coarser than x.
        out = out.add_(fmap) if out.dtype == fmap.dtype else fmap + out
    if video:
        out = rearrange(out, "(b t) c h w -> b c t h w", t=grid.size[0])
    if not grid.num_prefix_tokens:
        return map_to_tokens(out)
    prefix = x[:, : grid.num_prefix_tokens]
    return map_to_tokens(out, prefix.to(out.dtype))  # autocast may have changed the dtype
