"""Attention between channels instead of tokens; its cost grows with N and not with its square.

Shape letters: B batch, N tokens, C channels, n heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks.attention.base import Attention, split_heads
from tokenconv.blocks.starts import init_torch_
from tokenconv.grid import Grid
from tokenconv.layers import DWConv


class CrossCovarianceAttention(Attention):
    """Attention of XCiT (XCA): channels attend to the channels of their head.

    ``q, k, v = qkv(x)``; ``softmax(q/|q| @ (k/|k|).T * temperature) @ v`` with channels as rows,
    lengths over all tokens, prefix tokens included; ``proj``. No convolution: XCiT's is the LPI
    behind it. The temperature of every head starts from 1. Parameters: ``4*C*C + C + n``, and
    ``3*C`` with ``qkv_bias``.

    References:
        https://arxiv.org/abs/2106.09681
    """

    def build(self, bias: bool) -> None:
        """See the class."""
        self.temperature = nn.Parameter(torch.empty(self.num_heads, 1, 1))
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        nn.init.ones_(self.temperature)

    def no_weight_decay(self) -> set[str]:
        """Parameters that XCiT keeps out of weight decay."""
        return {"temperature"}

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return attend_channels(q, k, v, self.temperature, drop=self.drop)


class TransposedAttention(Attention):
    """Attention of Restormer (MDTA): XCA behind a depthwise convolution of q, k and v.

    ``q, k, v = DWConv(qkv(x))``; ``softmax(q/|q| @ (k/|k|).T * temperature) @ v`` with channels as
    rows, lengths over all tokens; ``proj``. The paper has no prefix tokens: here they skip the
    convolution. The temperature of every head starts from 1. Parameters: ``4*C*C + 27*C + n``, and
    ``7*C`` with ``qkv_bias``.

    Args besides those of ``Attention``:
        qkv_bias: Learn offsets, also of the convolution and of the projection.

    References:
        https://arxiv.org/abs/2111.09881
    """

    init = staticmethod(init_torch_)

    def build(self, bias: bool) -> None:
        """See the class."""
        self.temperature = nn.Parameter(torch.empty(self.num_heads, 1, 1))
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)
        self.dwconv = DWConv(3 * self.dim, bias=bias)
        self.proj = nn.Linear(self.dim, self.dim, bias=bias)

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        nn.init.ones_(self.temperature)

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q, k, v = self.dwconv(self.qkv(x), *grid).chunk(3, dim=-1)
        return attend_channels(q, k, v, self.temperature, drop=self.drop)


def attend_channels(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *, drop: float = 0.0
) -> Tensor:
    """``softmax(q/|q| @ (k/|k|).T * temperature) @ v`` in every head, channels as rows.

    Args:
        q: ``(B, N, C)``, as k and v.
        k: See q.
        v: See q.
        temperature: ``(n, 1, 1)``, one for every head.
        drop: Dropout probability of the weights.

    Returns:
        ``(B, N, C)``.
    """
    heads = temperature.shape[0]
    # (B, N, C) -> (B, n, C/n, N)
    q, k, v = (split_heads(x, heads).transpose(2, 3) for x in (q, k, v))
    q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=1.0)
    return out.permute(0, 3, 1, 2).flatten(2)
