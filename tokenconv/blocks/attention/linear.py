"""Attention without a softmax over pairs: keys and values are summed up before queries come.

Shape letters: B batch, N tokens, C channels, n heads, d channels of a head, K kernel side.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenconv.blocks.attention.base import Attention, LocalBranch, merge_heads, split_heads
from tokenconv.grid import Grid


class FactorisedAttention(Attention):
    """Attention of CoaT: factorised, with convolutional relative positions (CRPE).

    ``q, k, v = qkv(x)``; ``d**-0.5 * q @ (softmax(k).T @ v) + q * DWConv(v)`` in every head, the
    softmax over tokens; ``proj``. Heads have kernels of several sides. Prefix tokens take part in
    the softmax and get nothing from the convolution. CoaT shares the convolutions in a stage:
    assign ``crpe`` to the blocks. ``attn_drop`` does nothing, as in the paper's code. Parameters:
    ``4*C*C + C``, ``3*C`` with ``qkv_bias``, and ``K*K + 1`` per channel.

    Args besides those of ``Attention``:
        windows: Heads by kernel side; None shares them out as CoaT: of 8, two have side 3, three
            5 and three 7.

    References:
        https://arxiv.org/abs/2104.06399
    """

    def build(self, bias: bool, windows: Mapping[int, int] | None = None) -> None:
        """See the class."""
        heads = self.num_heads
        if windows is None:
            ends = [0, heads * 2 // 8, heads * 5 // 8, heads]
            windows = {side: ends[i + 1] - ends[i] for i, side in enumerate((3, 5, 7))}
        if sum(windows.values()) != heads or min(windows.values()) < 0:
            raise ValueError(f"expected windows for {heads} heads in all, got {dict(windows)}")
        self.windows = {side: count for side, count in windows.items() if count}
        self.qkv = nn.Linear(self.dim, 3 * self.dim, bias=bias)
        width = self.dim // heads
        self.crpe = nn.ModuleList(LocalBranch(n * width, k) for k, n in self.windows.items())

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        width = self.dim // self.num_heads
        parts = v.split([count * width for count in self.windows.values()], dim=-1)
        local = torch.cat([conv(parts[i], *grid) for i, conv in enumerate(self.crpe)], dim=-1)
        heads, keys, values = (split_heads(part, self.num_heads) for part in (q, k, v))
        factor = heads @ (keys.softmax(dim=2).transpose(2, 3) @ values)
        return width**-0.5 * merge_heads(factor) + q * local
