"""What all attention has in common: heads, where prefix tokens go, the projection that comes last.

Shape letters: B batch, N tokens = P prefix + grid, M keys that a query sees, C channels, n heads.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks import layout
from tokenconv.blocks.chain import Chain
from tokenconv.blocks.folding import fold_convs_
from tokenconv.blocks.starts import init_linears_
from tokenconv.grid import Grid, PrefixTokens
from tokenconv.layers import DWConv, GridModule


class Attention(GridModule):
    """``proj(mix(x))``, without a residual; common to all attention.

    Convolutions see the grid alone, the frames of a ``(T, H, W)`` grid as images by themselves;
    attention sees all tokens of all frames. Prefix tokens attend and are attended to without being
    convolved, unless the block says otherwise.

    Args:
        dim: Channels C, in and out.
        num_heads: Heads n; None takes one per 64 channels, or the fewest that fit.
        qkv_bias: Learn offsets of queries, keys and values; None does as the paper.
        attn_drop: Dropout probability of the attention weights.
        proj_drop: Dropout probability of what comes out.
        **own: Arguments that only one block has.

    Raises:
        ValueError: If the heads do not divide ``dim``, or an argument does not fit the block.
        GridError: If ``x`` does not fill the grid, or the grid is too small for the block.
        TypeError: If the block has no such argument.
    """

    qkv_bias: ClassVar[bool] = False
    """The paper's."""
    heads_by: ClassVar[int] = 1
    """What the number of heads is a multiple of."""
    last: tuple[str, ...] = ("proj",)
    """The layers that come last, which ``init_neutral_`` makes zero."""
    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_linears_)
    """How the paper's code starts the weights."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        qkv_bias: bool | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        **own: Any,
    ):
        super().__init__()
        self.dim, self.num_heads = dim, self.heads(dim, num_heads)
        self.attn_drop = attn_drop
        self.build(self.qkv_bias if qkv_bias is None else qkv_bias, **own)
        if "proj" not in self._modules:
            self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def heads(self, dim: int, num_heads: int | None) -> int:
        """The number of heads, where None was asked for or not."""
        return heads_of(dim, num_heads, self.heads_by)

    def build(self, bias: bool) -> None:
        """Make the layers; those of queries, keys and values with a ``bias`` or without."""
        raise NotImplementedError

    def mix(self, x: Tensor, *grid: Grid) -> Tensor:
        """What is projected: every token made from those that it attends to."""
        raise NotImplementedError

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Attend; see ``GridModule``."""
        return self.proj_drop(self.proj(self.mix(layout.checked(x, grid, self.dim), *grid)))

    @property
    def drop(self) -> float:
        """Dropout probability of the attention weights, as things are."""
        return self.attn_drop if self.training else 0.0

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)

    def init_neutral_(self) -> None:
        """Make the output zero, by the last layer; the others start anew."""
        type(self).reset_parameters(self)
        for name in self.last:
            for parameter in self.get_submodule(name).parameters():
                nn.init.zeros_(parameter)

    fold_ = fold_convs_

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.dim}, num_heads={self.num_heads}"


class LocalBranch(Chain):
    """A depthwise convolution beside attention, which prefix tokens get nothing from."""

    prefix_tokens = PrefixTokens.ZERO

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__(conv=DWConv(dim, kernel_size))


def heads_of(dim: int, num_heads: int | None, multiple: int = 1) -> int:
    """The number of heads: what was asked for, or one per 64 channels.

    Raises:
        ValueError: If it does not divide ``dim``, or is no multiple of ``multiple``.
    """
    if num_heads is None:
        most = max(dim // 64, multiple)
        fitting = [n for n in range(multiple, most + 1, multiple) if dim > 0 and dim % n == 0]
        num_heads = max(fitting, default=multiple)
    if min(dim, num_heads) < 1 or dim % num_heads or num_heads % multiple:
        among = f", a multiple of {multiple}," if multiple > 1 else ""
        raise ValueError(f"expected num_heads{among} that divides dim, got {dim=}, {num_heads=}")
    return num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, N, C) -> (B, n, N, C/n)``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``(B, n, N, C/n) -> (B, N, C)``."""
    return x.transpose(1, 2).flatten(2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    """``softmax(q @ k.T * scale + bias) @ v`` in every head, by torch's own kernel.

    Args:
        q: ``(B, N, C)``.
        k: ``(B, M, C)``.
        v: ``(B, M, C)``.
        num_heads: Heads n.
        scale: Of the products; None takes ``(C/n) ** -0.5``.
        bias: Added to them, or False where a key is not seen; fits ``(B, n, N, M)``.
        drop: Dropout probability of the weights.

    Returns:
        ``(B, N, C)``.
    """
    q, k, v = split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=scale)
    return merge_heads(out)
