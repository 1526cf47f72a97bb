"""The arms of a comparison: a model without convolution, with blocks, and others beside them."""

import copy
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn

from tokenconv.blocks import BLOCKS
from tokenconv.cli.inputs import build_model
from tokenconv.costs import cost, depthwise_modules
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.layers import DWConv
from tokenconv.ops.depthwise_conv import Impl
from tokenconv.surgery import Plan, insert_, plan

POSITION, NAIVE = "position", "naive"
"""What ``--beside`` takes besides names of timm models."""


@dataclass(frozen=True)
class Arms:
    """What is to be compared."""

    models: dict[str, nn.Module]
    """By name; the first is the baseline."""
    descriptions: dict[str, str]
    """What each is, for readers who know the name only."""
    reference: str
    """The arm that is the model as timm has it."""


def build_arms(
    model: nn.Module,
    names: Sequence[str],
    *,
    beside: Sequence[str] = (),
    image_size: tuple[int, int],
    **options: Any,
) -> Arms:
    """The models to compare; all but timm's from the same weights.

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

    Raises:
        SurgeryError: If a block does not go into the model.
        UnknownNameError: If there is no block or model of a name.
        MeasurementError: If there is nothing to be naive about.
    """
    models: dict[str, nn.Module] = {}
    told: dict[str, str] = {}
    reference = "baseline"
    timm_name = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    told[reference] = f"{timm_name} as timm has it"
    try:
        models["attention_only"] = insert_(copy.deepcopy(model), "none", allow_change=True)
        reference = "original"
        told = {
            "attention_only": f"{timm_name} without the convolutions in its MLPs",
            "original": f"{timm_name} as timm has it, with convolutions in its MLPs",
        }
    except SurgeryError:
        if "none" in names:
            raise
    models[reference] = model
    for block in dict.fromkeys(names):
        if block != "none":
            made = plan(model, block, **options)
            models[block] = insert_(copy.deepcopy(model), made)
            told[block] = f"{reference} with {_blocks(block, made)}"
    hybrids = {name: arm for name, arm in models.items() if depthwise_modules(arm)}
    for name in dict.fromkeys(beside):
        if name == POSITION:
            baseline = next(iter(models))
            arm = f"{baseline}_{POSITION}"
            models[arm] = _with_positions(model, baseline, image_size)
            told[arm] = f"{baseline} with a learned position embedding in front of every stage"
        elif name == NAIVE:
            if not hybrids:
                raise MeasurementError("no arm has a depthwise convolution to copy tokens for")
            hybrid, made = next(reversed(hybrids.items()))
            arm = f"{hybrid}_{NAIVE}"
            models[arm] = _naive(made)
            told[arm] = f"{hybrid}, whose depthwise convolutions copy tokens to maps and back"
        else:
            classes: Any = getattr(model, "num_classes", None)  # timm's models have it
            models[name] = build_model(name, image_size, num_classes=classes)
            told[name] = f"{name} as timm has it, of other size and weights"
    return Arms(models, told, reference)


def _blocks(name: str, made: Plan) -> str:
    """What was inserted, how often, and where."""
    sites = ", ".join(dict.fromkeys(edit.site for edit in made.edits))
    info = BLOCKS[name]
    return f"{len(made.edits)} {name} ({info.formula}; {info.papers[0].name}) at {sites}"


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
