"""One change at one site, and how it is made to a live model and taken back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenconv.blocks.registry import block_info
from tokenconv.errors import SurgeryError
from tokenconv.layers import DWConv
from tokenconv.surgery.binding import CaptureSequential, GridBinding
from tokenconv.surgery.families import Site, family_of
from tokenconv.surgery.fragments import ConvAct, MergedConv, RemovedConv, Replacement

NONE = "none"
"""The name that stands for no block: it takes out the convolution that an MLP has."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change at one site of a model."""

    name: str
    """The module that is replaced."""
    block: str
    """A key of ``BLOCKS``, or ``"none"``."""
    kwargs: dict[str, Any]
    """Keyword arguments of the block."""
    mode: Literal["inside", "merge", "remove"]
    """``inside``: the block stands in front of the MLP's activation. ``merge``: its kernel is added
    to the convolution that the MLP has. ``remove``: that convolution is taken out."""
    dim: int
    """Hidden width of the MLP."""
    exact: bool
    """Whether the output of the model stays as it was."""
    added_params: int = 0
    """Parameters added; negative where a convolution is taken out."""
    added_macs: int = 0
    """Multiply-accumulates added for one image."""


def edit_for(site: Site, block: str, kwargs: dict[str, Any]) -> Edit:
    """What it takes to put a block at a site.

    Raises:
        SurgeryError: If the block does not fit the site.
        ValueError: If an argument does not fit the block.
    """
    if block == NONE:
        if kwargs:
            raise SurgeryError(f'"none" takes no arguments, got {", ".join(kwargs)}')
        if site.conv is None:
            raise SurgeryError(f"{site.name} is no convolution, so there is nothing to take out")
        mode, exact = "remove", False
    elif site.conv is None:
        mode, exact = "inside", True
    else:
        mode = "merge"
        added = _build(site.name, block, mode, site.dim, kwargs)
        own_side = site.conv.kernel_size[0]
        if not isinstance(added, DWConv) or added.kernel_size < own_side:
            raise SurgeryError(
                f"{added} cannot be added to the convolution of side {own_side} at {site.name}; "
                f"take kernel_size >= {own_side}"
            )
        exact = added.dilation == site.conv.dilation[0]
    return Edit(name=site.name, block=block, kwargs=kwargs, mode=mode, dim=site.dim, exact=exact)


@dataclass
class Insertion:
    """What a model under surgery remembers, as its attribute ``_tokenconv``."""

    edits: tuple[Edit, ...]
    handles: list[RemovableHandle] = field(default_factory=list)


def carry_out(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Make the changes; either all of them or, after an error, none.

    Raises:
        SurgeryError: If the model does not look as the edits expect.
    """
    source = family_of(model).grid_source(model)
    binding = GridBinding(source.num_prefix_tokens) if source else None
    container = model.get_submodule(source.container) if source else None
    if container is not None and type(container) is not nn.Sequential:
        raise SurgeryError(
            f"{source.container if source else ''} is a {type(container).__name__}; expected a "
            f"plain nn.Sequential, whose blocks can be bound to their grid"
        )
    with torch.inference_mode(False):  # or the new parameters could never be trained
        replacements = {edit.name: _replacement(model, edit, binding) for edit in edits}
    insertion = model._tokenconv = Insertion(tuple(edits))  # pyright: ignore
    try:
        for name, replacement in replacements.items():
            model.set_submodule(name, replacement)
        if source and binding and isinstance(container, nn.Sequential):
            CaptureSequential.capture(container, binding)
            insertion.handles += [
                model.get_submodule(source.module).register_forward_hook(binding.note),
                model.register_forward_pre_hook(binding.clear),
                model.register_forward_hook(binding.clear),
            ]
        insertion.handles.append(model.register_load_state_dict_pre_hook(_accept_plain_checkpoint))
    except BaseException:
        take_back(model)
        raise


def take_back(model: nn.Module) -> None:
    """Put the model's own modules back, with their parameters as they are now."""
    insertion: Insertion = model._tokenconv  # pyright: ignore[reportAssignmentType]
    modules = dict(model.named_modules())
    originals = {n: m.release() for n, m in modules.items() if isinstance(m, Replacement)}
    for name, original in originals.items():
        model.set_submodule(name, original)
    for module in modules.values():
        if isinstance(module, CaptureSequential):
            module.release()
    for handle in insertion.handles:
        handle.remove()
    del model._tokenconv


def _replacement(model: nn.Module, edit: Edit, binding: GridBinding | None) -> Replacement:
    """What will stand at the site, on the device and in the dtype of its MLP."""
    mlp = model.get_submodule(edit.name.rpartition(".")[0])
    own = model.get_submodule(edit.name)
    if edit.mode == "remove":
        assert isinstance(own, nn.Conv2d)
        return RemovedConv(own).train(model.training)
    like = next(mlp.parameters())
    added = _build(edit.name, edit.block, edit.mode, edit.dim, edit.kwargs)
    added = added.to(like.dtype).to_empty(device=like.device)
    if edit.mode == "merge":
        assert isinstance(own, nn.Conv2d)
        assert isinstance(added, DWConv)
        return MergedConv(own, added).train(model.training)
    assert binding is not None
    return ConvAct(own, added, binding).train(model.training)


def _build(name: str, block: str, mode: str, dim: int, kwargs: dict[str, Any]) -> nn.Module:
    """A fragment without values, so that no random numbers are drawn."""
    factories = block_info(block).sites
    if mode not in factories:
        raise SurgeryError(f"{block} has no form that fits {name}, which takes {mode!r}")
    try:
        with torch.device("meta"):
            return factories[mode](dim, **kwargs)
    except TypeError as error:
        raise SurgeryError(f"{block} at {name} does not take these arguments: {error}") from error


def _accept_plain_checkpoint(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Let a checkpoint of the unmodified model load with ``strict=True``.

    It has no key of any inserted module, which then keeps its values. A checkpoint with some of
    them is one of a hybrid and has to have them all.
    """
    inserted = {
        f"{prefix}{name}.{module.fragment}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, Replacement) and module.fragment
        for key, value in module.get_submodule(module.fragment).state_dict().items()
    }
    has_values = not any(value.is_meta for value in inserted.values())
    if has_values and not inserted.keys() & state_dict.keys():
        state_dict.update(inserted)
