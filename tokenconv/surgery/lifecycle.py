"""Insert blocks into a live model and take them out again."""

from typing import Any

from torch import nn

from tokenconv.errors import SurgeryError
from tokenconv.surgery.edits import carry_out, take_back
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


def remove_(model: nn.Module) -> nn.Module:
    """Take out everything that ``insert_`` put in, in place; the model's own modules return.

    Args:
        model: A model that ``insert_`` has changed.

    Returns:
        The same model.

    Raises:
        SurgeryError: If nothing is inserted.
    """
    take_back(model)
    return model
