"""Models without memory: copies on the meta device, and what is in them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.blocks.ffn import MultiScaleFFN
from tokenconv.blocks.maps import MapBlock
from tokenconv.costs.meter import AttentionAsOne, Meter
from tokenconv.errors import MeasurementError
from tokenconv.layers import GridModule

_HOOKS = ("tokenconv.", "transformers.")
"""Whose hooks are part of a model; transformers collects hidden states by them."""


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model whose parameters and buffers take no memory.

    Hooks of users stay behind: they may read values, which a meta tensor does not have.

    Raises:
        MeasurementError: If the model cannot be copied.
    """
    weightless: dict[int, Any] = {}
    try:
        with torch.inference_mode(False):
            for parameter in model.parameters():
                weightless[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), parameter.requires_grad
                )
            for tensor in (*model.buffers(), *_plain_tensors(model)):
                weightless[id(tensor)] = torch.empty_like(tensor, device="meta")
            meta = copy.deepcopy(model, weightless)
    except RuntimeError as error:
        raise MeasurementError(f"the model cannot be copied: {error}") from error
    for module in meta.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if not getattr(hook, "__module__", "").startswith(_HOOKS):
                    del hooks[key]
    return meta


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What modules compute with and keep as an attribute: ConViT before timm 1.0.31.

    Without those of one number, which go with tensors of any device.
    """
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
                yield value


def run_meta(
    meta: nn.Module,
    batch: int,
    input_size: Sequence[int],
    meter: Meter | None = None,
    *,
    training: bool = False,
) -> None:
    """Run a model on the meta device on a batch of images.

    Args:
        meta: What ``meta_copy`` gave.
        batch: Number of images.
        input_size: ``(C, H, W)`` of one image; see ``cost`` for blocks on tokens.
        meter: What prices it; no dispatch mode sees attention here.
        training: In training mode; else in evaluation mode.

    Raises:
        MeasurementError: If it refuses them.
    """
    floating = next((p.dtype for p in meta.parameters() if p.is_floating_point()), torch.float32)
    x, *grid = _batch_for(meta, batch, input_size)
    try:
        x = torch.empty(x, device="meta", dtype=floating)
        if meter:
            meter.is_image(x, wants_grad=isinstance(meta, GridModule))
        with torch.inference_mode(False), torch.no_grad(), AttentionAsOne(meter):
            meta.train(training)(x, *grid)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        size = "x".join(str(s) for s in input_size)
        raise MeasurementError(f"the model refuses an image of {size}: {error}") from error


def _batch_for(meta: nn.Module, batch: int, input_size: Sequence[int]) -> tuple[Any, ...]:
    """Shape of what a module takes, and the sides of the grid if it takes tokens."""
    if not isinstance(meta, GridModule) or isinstance(meta, MapBlock):
        return ((batch, *input_size),)
    dim, *sides = input_size
    count = torch.Size(sides).numel()
    if isinstance(meta, MultiScaleFFN):  # and maps of twice and half the sides
        count = 21 * count // 4
    return ((batch, count, dim), *sides)


# --- what is in a model ---


def num_params(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def own_modules(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the outermost tokenconv modules, looking through what only holds them."""
    names: list[str] = []
    for name, child in model._modules.items():
        if child is None:
            continue
        if _does_the_work(child):
            names.append(prefix + name)
        else:
            names.extend(own_modules(child, f"{prefix}{name}."))
    return names


def _does_the_work(module: nn.Module) -> bool:
    """Whether it is ours, and no mere place in a model where ours stand."""
    room = type(module).__module__
    if not room.startswith("tokenconv.surgery."):
        return room.startswith("tokenconv.")
    holds_ours = any(type(m).__module__.startswith("tokenconv.layers.") for m in module.children())
    return holds_ours and bool(module._parameters)


def depthwise_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules that convolve every channel by itself."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if not inside and _is_depthwise(module):
            names.append(name)
    return names


def _is_depthwise(module: nn.Module) -> bool:
    """One kernel per channel: a weight (C, 1, K, K)."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 4 or not weight.shape[1] == 1 < weight.shape[0]:
        return False
    groups = getattr(module, "groups", weight.shape[0])  # ours need not say
    return groups == weight.shape[0]
