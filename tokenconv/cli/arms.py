"""The arms of a comparison: a model without convolution, with blocks, and others beside them."""

import copy
import math
import operator
import re
from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch import nn

from tokenconv.cli.inputs import build_model
from tokenconv.costs import cost, depthwise_modules
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.layers import DWConv
from tokenconv.ops.depthwise_conv import Impl
from tokenconv.surgery import insert_, plan

POSITION, NAIVE = "position", "naive"
"""What ``--beside`` takes besides names of timm models."""


def build_arms(
    model: nn.Module,
    names: Sequence[str],
    *,
    beside: Sequence[str] = (),
    image_size: tuple[int, int],
    **options: Any,
) -> tuple[dict[str, nn.Module], str]:
    """The models to compare, the first is the baseline; all but timm's from the same weights.

    A model that has a convolution in its MLPs is compared without it as well: ``attention_only``
    is then the baseline, and ``original`` the model as timm has it.

    Args:
        model: As timm has it.
        names: Blocks, an arm each.
        beside: Further arms: ``position`` is the baseline with a learned position embedding in
            front of every stage, ``naive`` a hybrid whose tokens are copied to maps and back, and
            anything else a timm model.
        image_size: Rows and columns of the images.
        **options: For ``insert_``.

    Returns:
        The arms by name, and the name of the arm that is the model as timm has it.

    Raises:
        SurgeryError: If a block does not go into the model.
        UnknownNameError: If there is no block or model of a name.
        MeasurementError: If there is nothing to be naive about.
    """
    arms: dict[str, nn.Module] = {}
    reference = "baseline"
    try:
        arms["attention_only"] = insert_(copy.deepcopy(model), "none", allow_change=True)
        reference = "original"
    except SurgeryError:
        if "none" in names:
            raise
    arms[reference] = model
    for block in dict.fromkeys(names):
        if block != "none":
            arms[block] = insert_(copy.deepcopy(model), block, **options)
    hybrids = {name: arm for name, arm in arms.items() if depthwise_modules(arm)}
    for name in dict.fromkeys(beside):
        if name == POSITION:
            baseline = next(iter(arms))
            arms[f"{baseline}_{POSITION}"] = _with_positions(model, baseline, image_size)
        elif name == NAIVE:
            if not hybrids:
                raise MeasurementError("no arm has a depthwise convolution to copy tokens for")
            hybrid, arm = next(reversed(hybrids.items()))
            arms[f"{hybrid}_{NAIVE}"] = _naive(arm)
        else:
            arms[name] = build_model(name, image_size)
    return arms, reference


def _with_positions(model: nn.Module, baseline: str, image_size: tuple[int, int]) -> nn.Module:
    """The baseline with a learned position embedding in front of the first block of every stage."""
    plans = [plan(model, "none", allow_change=True)] if baseline == "attention_only" else []
    firsts = [n for n, _ in model.named_modules() if re.fullmatch(r"(.+\.)?blocks\.0", n)]
    if not firsts:
        raise MeasurementError(
            "no blocks.0 in the model, in front of which positions could be added"
        )
    for name, site in cost(model, (3, *image_size), sites=firsts).sites.items():
        made = plan(
            model,
            "abs_pos_embed",
            blocks=rf"(^|\.){re.escape(name)}$",
            site="before_block",
            input_size=(3, *image_size),
            size=_grid(site.input_shape, image_size),
        )
        plans.append(made)
    return insert_(copy.deepcopy(model), reduce(operator.add, plans))


def _grid(shape: tuple[int, ...], image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens ``(1, N, C)`` with few of a prefix, or of a map of any layout."""
    height, width = image_size
    if len(shape) == 4:
        rows, cols = shape[1:3] if shape[1] * width == shape[2] * height else shape[2:]
        return rows, cols
    stride = round(math.sqrt(height * width / shape[1]))
    return height // stride, width // stride


def _naive(model: nn.Module) -> nn.Module:
    """A copy that does around every depthwise convolution what most code does."""
    model = copy.deepcopy(model)
    for name in depthwise_modules(model):
        module = model.get_submodule(name)
        if isinstance(module, DWConv):
            module.impl = Impl.NAIVE
        else:
            module.register_forward_pre_hook(_copy_in)
            module.register_forward_hook(_copy_out)
    return model


def _copy_in(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])


def _copy_out(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    return out.contiguous()
