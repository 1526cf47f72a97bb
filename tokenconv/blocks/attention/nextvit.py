"""The two mixers of Next-ViT: one by convolution, one by attention to averages of runs of tokens.

Shape letters: B batch, N tokens, C channels, n heads, s: s*s tokens become one key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.attention.base import Attention, attend
from tokenconv.blocks.attention.reduction import checked_ratio
from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import conv
from tokenconv.blocks.maps import MapBlock
from tokenconv.blocks.starts import init_truncated_
from tokenconv.errors import GridError
from tokenconv.grid import Grid, TokenGrid
from tokenconv.layers import BatchNorm


class ConvAttention(MapBlock):
    """Multi-head convolutional attention (MHCA) of Next-ViT; there is no attention in it.

    ``conv -> BN -> ReLU -> conv1x1``, the first in groups of ``head_dim`` channels, no bias. The
    residual is the model's. Parameters: ``K*K*C*head_dim + 2*C + C*O``.

    Args besides those of ``MapBlock``:
        head_dim: Channels of a group; None takes 32, or the most below that divide ``dim``.

    References:
        https://arxiv.org/abs/2207.05501
    """

    init = staticmethod(init_truncated_)

    def steps(
        self, dim: int, out_dim: int, side: int, stride: int, head_dim: int | None = None
    ) -> Steps:
        """See the class."""
        width = max(d for d in range(1, 33) if dim % d == 0) if head_dim is None else head_dim
        if width < 1 or dim % width:
            raise ValueError(f"expected head_dim that divides {dim=}, got {head_dim}")
        return {
            "conv": conv(dim, dim, side, stride=stride, groups=dim // width),
            "norm": nn.BatchNorm2d(dim),
            "act": nn.ReLU(),
            "project": conv(dim, out_dim),
        }


class EfficientAttention(Attention):
    """Efficient multi-head self-attention (E-MHSA) of Next-ViT: keys are averages of runs.

    ``q = Linear(x)``; ``k = Linear(y)``, ``v = Linear(y)`` of ``y = BN(mean)`` over runs of s*s
    tokens in row-major order, which are no squares; attention; ``proj``. Tokens that fill no run
    are not seen as keys, as in the paper's code. The paper has no prefix tokens: here they are
    queries, and keys that are neither averaged nor normed. Parameters: ``4*C*C + 4*C``, and ``2*C``
    if s > 1.

    Args besides those of ``Attention``:
        sr_ratio: s; with 1 nothing is averaged.

    References:
        https://arxiv.org/abs/2207.05501
    """

    qkv_bias = True
    init = staticmethod(init_truncated_)

    def build(self, bias: bool, sr_ratio: int = 2) -> None:
        """See the class."""
        self.sr_ratio, dim = checked_ratio(sr_ratio), self.dim
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.norm = BatchNorm(dim) if sr_ratio > 1 else None

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        y = x
        if self.norm is not None:
            y = layout.behind_prefix(self.norm(_runs(x, grid, self.sr_ratio**2)), x, grid)
        return attend(self.q(x), self.k(y), self.v(y), self.num_heads, drop=self.drop)


@torch.fx.wrap
def _runs(x: Tensor, grid: tuple[Grid, ...], length: int) -> Tensor:
    """Means of the tokens on the grid over runs of this length."""
    known = TokenGrid.of(*grid)
    if known.num_positions < length:
        raise GridError(
            f"expected a grid of at least {length} tokens, which become one key, got "
            f"{known.size}: take a smaller sr_ratio"
        )
    spatial = x[:, known.num_prefix_tokens :].transpose(1, 2)
    return F.avg_pool1d(spatial, length).transpose(1, 2)
