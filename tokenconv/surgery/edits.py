"""One change at one site, and how changes are made to a live model and taken back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenconv.blocks import block_info
from tokenconv.errors import GridError, SurgeryError
from tokenconv.layers import DWConv
from tokenconv.surgery.binding import (
    GridBinding,
    NoteGrid,
    become,
    can_capture,
    capture,
    release,
)
from tokenconv.surgery.dropping import watch_dropout
from tokenconv.surgery.fragments import (
    AroundAct,
    MergedConv,
    RemovedConv,
    ReplacedAttention,
    ReplacedPatchEmbed,
    Replacement,
    SparingLayerScale,
    attach,
)
from tokenconv.surgery.layouts import CarriedGrid, ChannelsLastMap, Layout, MaskUnits
from tokenconv.surgery.places import Place, has_values
from tokenconv.surgery.sites import SITES, locate

NONE = "none"
"""The name that stands for no block: it takes out the convolution that an MLP has."""

CHILDREN = {
    "before": "before",
    "after": "after",
    "beside": "beside",
    "replace": "instead",
    "merge": "added",
}
"""From the first word of a site to the name of the inserted child."""


TAKES_THE_PLACE = ("replace_", "merge_", "remove_")
"""How sites begin that put something in the place of a module; such edits are made first."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change at one site of a model."""

    site: str
    """Such as ``before_act``; a key of ``sites.SITES``."""
    place: Place
    block: str
    """A key of ``BLOCKS``, or ``"none"``."""
    kwargs: Mapping[str, Any]
    """Keyword arguments of the block."""
    exact: bool
    """Whether the output of the model stays as it was."""
    added_params: int = 0
    """Parameters added; negative where something is taken out."""
    added_macs: int = 0
    """Multiply-accumulates added for one image."""

    @property
    def inserted(self) -> str | None:
        """Name of the module that is inserted; None where something is only taken out."""
        child = CHILDREN.get(self.site.partition("_")[0])
        return f"{self.place.host}.{child}" if child else None


def edit_for(model: nn.Module, place: Place, site: str, block: str, kwargs: dict[str, Any]) -> Edit:
    """What it takes to put a block at a site.

    Raises:
        SurgeryError: If the block does not fit the site.
        ValueError: If an argument does not fit the block.
    """
    exact = not site.startswith(("replace_", "remove_"))
    if (block == NONE) != (site == "remove_conv"):
        raise SurgeryError(
            f'{block!r} has no form for {site} at {place.host}; only "none" goes to remove_conv'
        )
    if block == NONE:
        if kwargs:
            raise SurgeryError(f'"none" takes no arguments, got {", ".join(kwargs)}')
    else:
        added = _build(place, site, block, kwargs)
        if site == "merge_conv":
            own: Any = model.get_submodule(place.host)
            side = own.kernel_size[0]
            if not isinstance(added, DWConv) or added.kernel_size < side:
                raise SurgeryError(
                    f"{added} cannot be added to the convolution of side {side} at {place.host}; "
                    f"take kernel_size >= {side}"
                )
            exact = added.dilation == own.dilation[0]
    return Edit(site=site, place=place, block=block, kwargs=kwargs, exact=exact)


@dataclass
class Insertion:
    """What a model under surgery remembers, as its attribute ``_tokenconv``."""

    plan: Any
    """The plan that was carried out."""
    base: str | None = None
    """The architecture of the model before, where the hybrid is one with a name of its own."""
    folded: bool = False
    """Whether ``fold_`` has changed values of what was inserted."""
    binding: GridBinding | None = None
    """What carries the grid, where all blocks have the same one."""
    domains: Any = None
    """The values of each domain, where the model has domains."""
    attached: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Modules that were given a child, and its name."""
    handles: list[RemovableHandle] = field(default_factory=list)


def insertion_of(model: nn.Module) -> Insertion:
    """What was inserted into a model.

    Raises:
        SurgeryError: If nothing was.
    """
    if "_tokenconv" not in vars(model):
        raise SurgeryError(
            "nothing is inserted in this model; if it is wrapped, pass the module that insert_ got"
        )
    return vars(model)["_tokenconv"]


def inserted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The inserted blocks in a model, by name."""
    return {name: m for name, m in model.named_modules() if "tokenconv_site" in vars(m)}


def carry_out(model: nn.Module, edits: Sequence[Edit], plan: Any = None) -> None:
    """Make the changes; either all of them or, after an error, none.

    Raises:
        SurgeryError: If the model does not look as the edits expect.
    """
    binding = GridBinding()
    edits = sorted(edits, key=lambda edit: not edit.site.startswith(TAKES_THE_PLACE))
    with torch.inference_mode(False):  # or the new parameters could never be trained
        blocks = [_block_for(model, edit) for edit in edits]
    insertion = Insertion(plan)
    vars(model)["_tokenconv"] = insertion
    try:
        for edit, block in zip(edits, blocks, strict=True):
            _place(model, edit, block, binding, insertion)
        tokens = [edit.place for edit in edits if SITES[edit.site] != "embed"]
        _bind(model, tokens, binding, insertion)
        insertion.handles.append(model.register_load_state_dict_pre_hook(_accept_plain_checkpoint))
    except BaseException:
        take_back(model)
        raise


def take_back(model: nn.Module) -> None:
    """Put the model's own modules back, with their parameters as they are now."""
    insertion = insertion_of(model)
    modules = dict(model.named_modules())
    originals = {n: m.release() for n, m in modules.items() if isinstance(m, Replacement)}
    for name, original in originals.items():
        model.set_submodule(name, original)
    for module in modules.values():
        release(module)
    for handle in insertion.handles:
        handle.remove()
    for host, child in insertion.attached:
        host._modules.pop(child, None)  # it may be gone already, or not have come
        vars(host).pop(child, None)
    vars(model).pop("_tokenconv", None)


def _layout(model: nn.Module, place: Place, binding: GridBinding) -> Layout:
    if place.rolled is not None:
        return MaskUnits(model.get_submodule(locate(model)[0]).reroll, place.rolled)
    if place.source is None:
        return ChannelsLastMap()
    return CarriedGrid(
        binding, place.source, place.halvings, place.rounds_up, place.num_prefix_tokens
    )


def _place(
    model: nn.Module,
    edit: Edit,
    block: nn.Module | None,
    binding: GridBinding,
    insertion: Insertion,
) -> None:
    layout = _layout(model, edit.place, binding)
    name = edit.place.host
    host = model.get_submodule(name)
    if edit.site == "remove_conv":
        model.set_submodule(name, RemovedConv(host).train(host.training))
        return
    assert block is not None
    block.train(host.training)
    if edit.site in ("before_act", "after_act") and not has_values(_activation(host)):
        if not isinstance(host, AroundAct):
            host = AroundAct(host, layout).train(host.training)
            model.set_submodule(name, host)
        setattr(host, edit.site.partition("_")[0], block)
    elif edit.site == "merge_conv":
        assert isinstance(host, nn.Conv2d)
        assert isinstance(block, DWConv)
        model.set_submodule(name, MergedConv(host, block).train(host.training))
    elif edit.site == "replace_attn":
        replaced = ReplacedAttention(host, block, layout)
        model.set_submodule(name, replaced.train(host.training))
    elif edit.site == "replace_patch_embed":
        replaced = ReplacedPatchEmbed(host, block, edit.place.returns)
        model.set_submodule(name, replaced.train(host.training))
    else:
        position = edit.site.partition("_")[0]
        if hasattr(host, position):
            raise SurgeryError(f"{name} has an attribute {position!r} already")
        insertion.attached.append((host, position))
        scale = edit.place.layer_scale
        insertion.handles.append(attach(host, position, block, layout, scaled=scale is not None))
        if scale is not None:
            become(SparingLayerScale, model.get_submodule(scale), binding)


def _activation(host: nn.Module) -> nn.Module:
    return host.act if isinstance(host, AroundAct) else host


def _bind(
    model: nn.Module, places: Sequence[Place], binding: GridBinding, insertion: Insertion
) -> None:
    """Hook the sources, and the containers on the way from the model to the places."""
    _capture_above(model, places, binding)
    carried = [place for place in places if place.source is not None]
    if not carried:
        return
    root_name, family = locate(model)
    root = model.get_submodule(root_name)
    for key in sorted({place.source or "" for place in carried}):
        source = family.sources[key]
        hook = NoteGrid(binding, key, source)
        module = root.get_submodule(source.module)
        insertion.handles.append(module.register_forward_hook(hook, with_kwargs=True))
    if family.stage is None and len(carried) == len(places):
        insertion.binding = binding
        prefix = {place.num_prefix_tokens for place in places}
        insertion.handles += watch_dropout(root, binding, prefix)
    insertion.handles += [
        root.register_forward_pre_hook(binding.clear),
        root.register_forward_hook(binding.clear),
    ]


def _capture_above(model: nn.Module, places: Sequence[Place], binding: GridBinding) -> None:
    """Capture the containers above the places.

    Also where no grid is carried: a graph that was compiled before sees the new class and is
    compiled anew, while new hooks alone would not be noticed.
    """
    for name in sorted({above for place in places for above in _above(place.host)}):
        container = model.get_submodule(name)
        # A list of lists is indexed or zipped before its grids are made; the inner lists bind.
        nested = all(isinstance(child, nn.ModuleList) for child in container.children())
        if can_capture(container) and not nested:
            capture(container, binding)


def _above(name: str) -> Iterable[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _block_for(model: nn.Module, edit: Edit) -> nn.Module | None:
    """The block to insert, on the device and in the dtype of the module it is for."""
    if edit.block == NONE:
        return None
    above = [edit.place.host, *_above(edit.place.host)]
    like = next(p for name in above for p in model.get_submodule(name).parameters())
    block = _build(edit.place, edit.site, edit.block, edit.kwargs)
    block = block.to(like.dtype).to_empty(device=like.device)
    vars(block)["tokenconv_site"] = edit.site
    if edit.site.startswith("replace_"):
        block.reset_parameters()  # pyright: ignore[reportCallIssue]
    else:
        # timm's model.init_weights() calls one of them last, and would leave random kernels
        vars(block)["init_weights"] = vars(block)["reset_parameters"] = block.init_neutral_
        block.init_neutral_()  # pyright: ignore[reportCallIssue]
    return block


def _build(place: Place, site: str, block: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A fragment without values, so that planning draws no random numbers."""
    fragments = block_info(block).sites
    if site not in fragments:
        raise SurgeryError(
            f"{block} has no form for {site}; it goes {' or '.join(fragments) or 'nowhere'}"
        )
    if SITES[site] == "embed":
        kwargs = {"in_chans": place.in_chans, **kwargs}
    try:
        with torch.device("meta"):
            return fragments[site](place.dim, **kwargs)
    except (TypeError, OverflowError, RuntimeError) as error:  # the last of a size beyond torch's
        raise SurgeryError(
            f"{block} at {place.host} does not take these arguments: {error}"
        ) from error


def check_stem(edit: Edit, image: tuple[int, int, int], grid: tuple[int, int]) -> None:
    """Refuse a stem that makes another grid of an image than the patch embedding.

    Raises:
        SurgeryError: If it does, or cannot take the image.
    """
    stem = _build(edit.place, edit.site, edit.block, edit.kwargs)
    about = f"{edit.block} in place of {edit.place.host}: expected {grid[0]}*{grid[1]} tokens"
    try:
        made = tuple(stem.run(torch.empty(2, *image, device="meta")).shape[2:])  # pyright: ignore
    except (GridError, RuntimeError) as error:
        raise SurgeryError(f"{about}, but it does not run: {error}") from error
    if made != grid:
        raise SurgeryError(
            f"{about} of an image of {image[1]}x{image[2]}, got {made[0]}*{made[1]}; take other "
            f"strides"
        )


def _accept_plain_checkpoint(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Let a checkpoint of the unmodified model load with ``strict=True``.

    It has no key of any inserted module, which then keeps its values. A checkpoint with some of
    them is one of a hybrid and has to have them all.
    """
    inserted = {
        f"{prefix}{name}.{key}": value
        for name, module in inserted_modules(model).items()
        for key, value in module.state_dict().items()
    }
    weightless = any(value.is_meta for value in inserted.values())
    if not weightless and not inserted.keys() & state_dict.keys():
        state_dict.update(inserted)
