"""One gather per kernel tap, for tokens that do not fill their grid, with static shapes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.errors import GridError
from tokenconv.grid import SparseGrid, behind_prefix

_SIDE = 1 << 20  # of the square, or cube, in which a position has a number
_NOWHERE = -(1 << 62)
_COMPILES = torch.__version__ >= (2, 14)  # pyright: ignore[reportOperatorIssue]  # TorchVersion
"""Whether compiled gradients are right: those of torch 2.11 are silently wrong, 2.14's are not."""


def depthwise_conv_gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: SparseGrid,
    dilation: int,
    residual: bool,
) -> Tensor:
    """See ``api.depthwise_conv``."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and not _COMPILES:
        # Breaks the graph, so that this runs eagerly; an error where the graph must be whole.
        raise GridError(
            f"torch {torch.__version__} gives wrong gradients when it compiles convolutions where "
            f"tokens are missing: expected torch 2.14 or newer, no_grad(), or no fullgraph=True"
        )
    num_prefix_tokens = grid.num_prefix_tokens
    tokens = x[:, num_prefix_tokens:]
    numbers = _numbers(grid.coords)
    empty = numbers == _NOWHERE
    index = _neighbours(numbers, weight.shape[-1], dilation)
    index = index.masked_fill(empty[..., None], tokens.shape[0] * tokens.shape[1])
    precision = torch.promote_types(x.dtype, torch.float32)
    out = _SumOfTaps.apply(tokens, weight.flatten(1).T.to(precision), index)
    if bias is not None:
        out = out + bias
    if residual:
        out = out + tokens
    out = torch.where(empty[..., None], tokens, out.to(x.dtype))
    return behind_prefix(out, x, num_prefix_tokens)


class _SumOfTaps(torch.autograd.Function):
    """``out[p] = sum_k weight[k] * x[index[p, k]]``, in the dtype of ``weight``.

    A token is under tap k of another exactly when that one is under the opposite tap of the first.
    So the gradient is a gather as well, and only ``x`` is kept for it.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:  # pyright: ignore
        table = _rows(x)
        out = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
        for i, kernel in zip(index.unbind(-1), weight.unbind(0), strict=True):
            out = out.addcmul_(F.embedding(i, table).to(weight.dtype), kernel)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, index = ctx.saved_tensors
        of_x, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_x = _SumOfTaps.apply(grad, weight.flip(0), index).to(x.dtype)
        if ctx.needs_input_grad[1]:
            table = _rows(x)
            of_weight = torch.stack(
                [(F.embedding(i, table) * grad).sum((0, 1)) for i in index.unbind(-1)]
            )
        return of_x, of_weight, None


def _rows(x: Tensor) -> Tensor:
    """``(B*L + 1, C)``; the last row is zero, for positions without a token."""
    return F.pad(x.flatten(0, 1), (0, 0, 0, 1))


def _numbers(coords: Tensor) -> Tensor:
    """One number ``(B, L)`` for every position; ``_NOWHERE`` for empty slots."""
    numbers = torch.zeros_like(coords[..., 0], dtype=torch.int64)
    for axis in range(coords.shape[-1]):  # not unbind: checkpointed graphs cannot keep a tuple
        numbers = numbers * _SIDE + coords[..., axis]
    return numbers.masked_fill((coords < 0).any(-1), _NOWHERE)


def _neighbours(numbers: Tensor, side: int, dilation: int) -> Tensor:
    """Row of the token under every tap of a kernel ``(B, L, K*K)``; ``B*L`` where there is none."""
    images, slots = numbers.shape
    reach = torch.arange(side, device=numbers.device) * dilation - dilation * (side // 2)
    offsets = (reach[:, None] * _SIDE + reach).flatten()
    wanted = (numbers[..., None] + offsets).flatten(1)
    present, order = numbers.sort(dim=1)
    found = torch.searchsorted(present, wanted).clamp(max=slots - 1)
    first = slots * torch.arange(images, device=numbers.device)[:, None]
    rows = first + order.gather(1, found)
    rows = rows.masked_fill(present.gather(1, found) != wanted, images * slots)
    return rows.unflatten(1, (slots, side * side))
