"""Insert blocks into a live model, use them where tokens are missing, and take them out again."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.errors import GridError, SurgeryError
from tokenconv.surgery.accelerate import check_not_accelerated
from tokenconv.surgery.edits import carry_out, insertion_of, take_back
from tokenconv.surgery.plans import Plan, check_fits, check_untouched, plan


def insert_(
    model: nn.Module, block: Plan | str, *, allow_change: bool = False, **plan_kwargs: Any
) -> nn.Module:
    """Insert a block into a timm model, in place.

    Unless the plan says otherwise the output stays bit-equal in eager mode, and gradients reach
    every new weight. Parameters of the model keep their keys, and checkpoints of the unmodified
    model still load with ``strict=True``. Insertion is all or nothing.

    Args:
        model: A live timm model.
        block: A plan, or the name of a block, which is short for ``plan(model, block, ...)``.
        allow_change: Permit a plan that changes the output of the model.
        **plan_kwargs: Arguments of ``plan``, where ``block`` is a name.

    Returns:
        The same model.

    Raises:
        SurgeryError: If the plan does not fit the model, or changes its output without permission.
        UnknownNameError: If there is no such block.
    """
    if isinstance(block, str):
        block = plan(model, block, allow_change=allow_change, **plan_kwargs)
    else:
        if plan_kwargs:
            raise SurgeryError(f"a plan is complete: cannot add {', '.join(plan_kwargs)} to it")
        check_untouched(model)
        block = check_fits(model, block)
    if not (block.exact or block.allow_change or allow_change):
        changed = next(edit for edit in block.edits if not edit.exact)
        raise SurgeryError(
            f"{changed.block} at {changed.place.host} changes the output of the model; "
            f"pass allow_change=True if that is wanted"
        )
    carry_out(model, block.edits, block)
    return model


def keep_tokens(model: nn.Module, kept: Tensor) -> None:
    """Tell a hybrid which tokens are left, in code that drops or masks them by itself.

    To be called in every forward pass, between the patch embedding and the blocks::

        x = model.patch_embed(images) + model.pos_embed
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        tokenconv.keep_tokens(model, kept)
        x = model.blocks(x)

    timm's own patch dropout and NaFlexViT's packed images need no call.

    Args:
        model: A model that ``insert_`` has changed, whose tokens keep one grid.
        kept: For every token behind the prefix, its index on the grid, row by row: integers
            ``(B, L)``, each one once, negative where a slot holds no token. Or booleans
            ``(B, H*W)``, false where a token is masked: it stays in the sequence, unchanged, and
            counts as zero to others. Where tokens are missing already, both are about those left.

    Raises:
        SurgeryError: If nothing is inserted, the patch embedding has not run, or not all inserted
            blocks see tokens of one grid.
        GridError: If ``kept`` has another shape or type, or, not checked when compiled, an index
            is too large or there twice.
    """
    if (binding := insertion_of(model).binding) is None:
        raise SurgeryError(
            f"the blocks of this {type(model).__name__} cannot be told: not all see tokens of one "
            f"grid, or freeze_grid_ has fixed it"
        )
    noted = binding.noted("")
    full = noted.is_floating_point()
    available = noted.shape[1] * noted.shape[2] if full else noted.shape[1]
    binding.narrow("", _indices(kept, available))


def _indices(kept: Tensor, available: int) -> Tensor:
    """Indices into as many tokens as are available, checked."""
    if not isinstance(kept, Tensor) or kept.dtype not in (torch.bool, torch.int64, torch.int32):
        got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise GridError(f"expected integers (B, L) or booleans (B, {available}), got {got}")
    if kept.ndim != 2 or (kept.dtype == torch.bool and kept.shape[1] != available):
        raise GridError(
            f"expected integers (B, L) or booleans (B, {available}), got a {kept.dtype} tensor of "
            f"shape {tuple(kept.shape)}"
        )
    if kept.dtype == torch.bool:
        return torch.arange(available, device=kept.device).where(kept, -1)
    if not torch.compiler.is_compiling():  # the one place where values are read
        ordered = kept.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if (kept >= available).any() or twice.any():
            raise GridError(
                f"expected different indices below {available} in every image, got some above or "
                f"twice; the prefix does not count, and a mask is boolean"
            )
    return kept


def remove_(model: nn.Module) -> nn.Module:
    """Take out everything that ``insert_`` put in, in place; the model's own modules return.

    Args:
        model: A model that ``insert_`` has changed.

    Returns:
        The same model.

    Raises:
        SurgeryError: If nothing is inserted, or the model is accelerated.
    """
    check_not_accelerated(model)
    take_back(model)
    return model
