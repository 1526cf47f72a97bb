"""Where something can be put into a model, found by running a weightless copy of it once.

A *site* is a place and a position: ``before_act``, ``beside_mlp``, ``replace_attn``, ... Every
site of every block is either a list of places or the reason why there is none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from timm.layers import LayerScale
from torch import nn

from tokenconv.costs import meta_copy, run_meta
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.surgery.binding import can_capture
from tokenconv.surgery.families import Family, family_of
from tokenconv.surgery.places import BATCH, Look, Place, Seen

SITES = {
    "before_act": "act",
    "after_act": "act",
    "merge_conv": "conv",
    "remove_conv": "conv",
    "before_mlp": "mlp",
    "beside_mlp": "mlp",
    "before_attn": "attn",
    "beside_attn": "attn",
    "replace_attn": "attn",
    "before_block": "block",
    "after_block": "block",
    "replace_patch_embed": "embed",
}
"""From a site to the kind of module it belongs to; an ``embed`` belongs to no Transformer block."""

_MLP = re.compile(r"mlp(_channels|\d)?")
_ATTENTION = ("attn", "attn_out", "token_mixer", "factoratt_crpe")
_NO_BLOCK = {"attn", "rel_pos"}  # have MLPs of their own, over other things than tokens


@dataclass
class BlockSites:
    """What can be done at one Transformer block."""

    name: str
    kinds: set[str] = field(default_factory=set)
    """What it consists of: values of ``SITES``."""
    places: dict[str, list[Place]] = field(default_factory=dict)
    """By site."""
    refusals: dict[str, str] = field(default_factory=dict)
    """Why not, by site."""


@dataclass(frozen=True)
class Survey:
    """What a model offers."""

    meta: nn.Module
    """Weightless copy of the module that was given."""
    root: str
    """Name of the timm model inside it; empty if it is that module."""
    family: Family
    input_size: tuple[int, int, int]
    """``(C, H, W)`` of the image that was run."""
    blocks: list[BlockSites]
    embeds: list[BlockSites]
    """The patch embeddings, in the same form."""
    sizes: dict[str, tuple[int, int]]
    """Rows and columns that each of them makes of that image."""


def survey(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    *,
    otherwise: tuple[int, int, int] | None = None,
) -> Survey:
    """Find the blocks of a model and what can be put where.

    Args:
        model: A timm model, or a module that holds one.
        input_size: ``(C, H, W)`` of the image to run; None takes the one it was built for.
        otherwise: What to take where the model does not tell.

    Raises:
        SurgeryError: If the model is, or holds, no timm model that tokenconv can change.
    """
    root, family = locate(model)
    try:
        copy = meta_copy(model)
    except MeasurementError as error:
        raise SurgeryError(str(error)) from error
    meta = copy.get_submodule(root)
    hosts = list(_hosts(meta, family))
    if not hosts:
        raise SurgeryError(
            f"this {type(meta).__name__} ({family.name}) has no Transformer block with an MLP over "
            f"tokens"
        )
    size = input_size or _input_size(meta, family, otherwise)
    scales = {name for name, module in meta.named_modules() if type(module) is LayerScale}
    sources = {source.module for source in family.sources.values()}
    sizes, seen = _run(meta, family, size, {name for _, _, name in hosts} | scales | sources)
    blocks: dict[str, BlockSites] = {}
    look = Look(meta, family, sizes, seen)
    prefix = f"{root}." if root else ""
    for block, kind, name in hosts:
        found = blocks.setdefault(block, BlockSites(prefix + block))
        found.kinds.add(kind)
        for site in (site for site, of in SITES.items() if of == kind):
            try:
                place = look.place(block, kind, name, site, prefix)
            except SurgeryError as error:
                found.refusals[site] = str(error)
            else:
                found.places.setdefault(site, []).append(place)
    embeds: dict[str, BlockSites] = {}
    for key, source in family.sources.items():
        found = embeds.setdefault(prefix + source.module, BlockSites(prefix + source.module))
        try:
            found.places["replace_patch_embed"] = [look.embed(key, size, prefix)]
        except SurgeryError as error:
            found.refusals["replace_patch_embed"] = str(error)
    for found in [*blocks.values(), *embeds.values()]:
        for site in SITES:
            if site in found.refusals:
                found.places.pop(site, None)
            elif site not in found.places:
                found.refusals[site] = f"{found.name} has no {_WHAT[SITES[site]]}"
    grids = {prefix + family.sources[key].module: grid for key, grid in sizes.items()}
    return Survey(copy, root, family, size, list(blocks.values()), list(embeds.values()), grids)


_WHAT = {
    "act": "activation inside an MLP",
    "conv": "convolution inside its MLP",
    "mlp": "MLP",
    "attn": "attention",
    "block": "block",
    "embed": "patch embedding",
}


def locate(model: nn.Module) -> tuple[str, Family]:
    """The timm model that a module is, or holds: its name and family.

    Raises:
        SurgeryError: If there is none, or several.
    """
    found: dict[str, Family] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") or not outer for outer in found) and (
            family := family_of(module)
        ):
            found[name] = family
    if len(found) == 1:
        ((name, family),) = found.items()
        if family.refusal:
            raise SurgeryError(
                f"{type(model.get_submodule(name)).__name__} ({family.name}) cannot take a "
                f"convolution: {family.refusal}"
            )
        return name, family
    if found:
        raise SurgeryError(
            f"{type(model).__name__} holds several timm models ({', '.join(found)}); take one"
        )
    raise SurgeryError(
        f"{type(model).__name__} is not a model that tokenconv can change: expected a timm model "
        f"with Transformer blocks (`tokenconv list --families` lists them). One built with "
        f"features_only=True may have lost its class: insert first, wrap then"
    )


def _hosts(model: nn.Module, family: Family) -> Iterator[tuple[str, str, str]]:
    """Block, kind and name of every module that a site may belong to; first block first."""
    modules = dict(model.named_modules())
    met: set[str] = set()
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        parallel = isinstance(getattr(module, "mlp_act", None), nn.Module)
        if not parallel and not (
            _MLP.fullmatch(last) and isinstance(getattr(module, "act", None), nn.Module)
        ):
            continue
        block = name if parallel else parent
        while can_capture(modules[block]) and block:
            block = block.rpartition(".")[0]
        if not block or _NO_BLOCK & set(block.split(".")) or not _container_above(modules, block):
            continue
        if family.skipped and re.search(family.skipped, block):
            continue
        if block not in met:
            met.add(block)
            yield block, "block", block
            for attention in _ATTENTION:
                if isinstance(getattr(modules[block], attention, None), nn.Module):
                    yield block, "attn", f"{block}.{attention}"
        if parallel:
            yield block, "act", f"{name}.mlp_act"
            continue
        yield block, "mlp", name
        yield block, "act", f"{name}.act"
        if isinstance(getattr(module, "dwconv", None), nn.Module):
            yield block, "conv", f"{name}.dwconv"


def _container_above(modules: dict[str, nn.Module], name: str) -> bool:
    while name := name.rpartition(".")[0]:
        if can_capture(modules[name]):
            return True
        if isinstance(modules[name], (nn.Sequential, nn.ModuleList)):
            raise SurgeryError(
                f"{name} is a {type(modules[name]).__name__}; expected a plain nn.Sequential or "
                f"nn.ModuleList, whose blocks can be bound to their grid"
            )
    return False


def _run(
    meta: nn.Module, family: Family, size: tuple[int, int, int], names: set[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, Seen]]:
    """One forward pass: the sizes that the sources tell, and what the modules see."""
    sizes: dict[str, tuple[int, int]] = {}
    seen = {name: Seen() for name in names}

    def note(key: str, source: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            rows, cols = source.size(module, args, out)
            sizes[key] = (int(rows), int(cols))

        return hook

    def watch(record: Seen) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            record.calls += 1
            record.given = args[0] if args else None
            record.returns_more = isinstance(out, (tuple, list))
            record.gave, *record.beside = out if record.returns_more else (out,)

        return hook

    hooks = [
        meta.get_submodule(source.module).register_forward_hook(note(key, source))
        for key, source in family.sources.items()
    ]
    for name, record in seen.items():
        hooks.append(meta.get_submodule(name).register_forward_hook(watch(record)))
    try:
        run_meta(meta, BATCH, size)
    except MeasurementError as error:
        raise SurgeryError(
            f"{error}. If it was built for another size, pass input_size=(C, H, W)"
        ) from error
    for hook in hooks:
        hook.remove()
    return sizes, seen


def _input_size(
    model: nn.Module, family: Family, otherwise: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """The image size ``(C, H, W)`` that the model was built for."""
    size = getattr(model, "img_size", None)
    if family.rerolls:
        known: Any = model
        size = [n * s for n, s in zip(known.tokens_spatial_shape, known.patch_stride, strict=True)]
    for source in family.sources.values():
        size = size or getattr(model.get_submodule(source.module), "img_size", None)
    if not size and otherwise:
        return otherwise
    config = getattr(model, "pretrained_cfg", None) or {}
    size = size or config.get("input_size", (3, 224, 224))[1:]
    size = (size, size) if isinstance(size, int) else size
    if len(size) != 2:
        raise SurgeryError(
            f"this {type(model).__name__} is for inputs of size {tuple(size)}; expected images"
        )
    rows, cols = size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return family.in_chans or (first.in_channels if first else 3), rows, cols


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """``(C, H, W)`` of the images that a model of any library was built for."""
    for name, module in model.named_modules():
        if family := family_of(module):
            return _input_size(model.get_submodule(name), family, None)
    config = getattr(model, "config", None)  # as transformers' models have it
    side = getattr(config, "image_size", None) or 224
    rows, cols = (side, side) if isinstance(side, int) else side
    return getattr(config, "num_channels", 3), rows, cols
