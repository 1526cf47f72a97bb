"""Where something can be put into a model, found by running a weightless copy of it once.

A *site* is a place and a position: ``before_act``, ``beside_mlp``, ``replace_attn``, ... Every
site of every block is either a list of places or the reason why there is none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from tokenconv.costs import meta_copy, run_meta
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.surgery.binding import can_capture
from tokenconv.surgery.families import Family, family_of
from tokenconv.surgery.layouts import halved

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
_BATCH = 2  # so that windows, which multiply the batch, show


@dataclass(frozen=True, kw_only=True)
class Place:
    """A module that a site belongs to, and how tokens lie there."""

    host: str
    """Name of the module, such as ``blocks.0.mlp.act``."""
    dim: int
    """Width of the tokens."""
    source: str | None = None
    """Key of the source of their grid; None where they are a map ``(B, H, W, C)``, or lie in the
    order of a Hiera block."""
    halvings: int = 0
    rounds_up: bool = True
    num_prefix_tokens: int = 0
    rolled: int | None = None
    """Index of the Hiera block in whose order the tokens lie."""
    layer_scale: str | None = None
    """Name of the LayerScale that takes what the module returns, for what stands beside it."""
    in_chans: int = 0
    """Channels of the image that a patch embedding is given."""
    returns: str = ""
    """How a patch embedding lays out its tokens: a key of ``layouts.RETURNS``."""


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


@dataclass
class _Seen:
    """What one module was given and gave."""

    calls: int = 0
    given: Any = None
    gave: Any = None
    returns_more: bool = False
    """Whether something besides tokens is returned."""
    beside: list[Any] = field(default_factory=list)
    """And what."""


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
    look = _Look(meta, family, sizes, seen)
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
) -> tuple[dict[str, tuple[int, int]], dict[str, _Seen]]:
    """One forward pass: the sizes that the sources tell, and what the modules see."""
    sizes: dict[str, tuple[int, int]] = {}
    seen = {name: _Seen() for name in names}

    def note(key: str, source: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            rows, cols = source.size(module, args, out)
            sizes[key] = (int(rows), int(cols))

        return hook

    def watch(record: _Seen) -> Any:
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
        run_meta(meta, _BATCH, size)
    except MeasurementError as error:
        raise SurgeryError(
            f"{error}. If it was built for another size, pass input_size=(C, H, W)"
        ) from error
    for hook in hooks:
        hook.remove()
    return sizes, seen


@dataclass(frozen=True)
class _Look:
    """Judges one site after another by what was seen."""

    model: nn.Module
    family: Family
    sizes: dict[str, tuple[int, int]]
    seen: dict[str, _Seen]

    def place(self, block: str, kind: str, name: str, site: str, prefix: str) -> Place:
        """The place that a site is, or a ``SurgeryError`` that says why it is none."""
        host, record = self.model.get_submodule(name), self.seen[name]
        if record.calls != 1:
            raise SurgeryError(f"{name} runs {record.calls} times in a forward pass, expected once")
        if kind == "conv":
            if type(host) is not nn.Conv2d:
                raise SurgeryError(
                    f"{name} is a {type(host).__name__}; expected the nn.Conv2d that timm has there"
                )
            if site == "merge_conv" and not _can_be_added_to(host):
                raise SurgeryError(
                    f"{name} is {host}; expected a depthwise convolution of stride 1 with an odd, "
                    f"square kernel and zero padding that keeps the size"
                )
            return Place(host=prefix + name, dim=host.out_channels)
        if kind == "act" and type(host).__module__.startswith("tokenconv."):
            raise SurgeryError(f"{name} is a {type(host).__name__} of tokenconv")
        if kind == "act" and has_values(host) and type(host).__module__.startswith("torch.nn"):
            raise SurgeryError(
                f"{name} ({type(host).__name__}) has parameters, whose checkpoint keys would change"
            )
        inside = vars(self.model.get_submodule(block))
        if kind == "attn" and (inside.get("window_size") or inside.get("partition_size")):
            raise SurgeryError(f"{name} sees windows, and not the whole grid")
        if kind in ("mlp", "attn", "block") and can_capture(host):
            raise SurgeryError(f"{name} is a {type(host).__name__}, to which nothing can be added")
        x = record.gave if site == "after_block" else record.given
        if not isinstance(x, Tensor):
            raise SurgeryError(f"{name} is not given tokens as its first argument")
        gave = record.gave
        if site not in ("before_block", "after_block", "before_attn", "before_mlp") and (
            record.returns_more or not isinstance(gave, Tensor) or gave.shape != x.shape
        ):
            raise SurgeryError(f"{name} does not return tokens of the shape that it is given")
        place = self._lay(block, kind, name, site, x, prefix)
        if site.startswith("beside_") and (scale := self._layer_scale(record)):
            return replace(place, layer_scale=prefix + scale)
        return place

    def embed(self, key: str, image: tuple[int, int, int], prefix: str) -> Place:
        """The place that a patch embedding is, or a ``SurgeryError`` that says why it is none."""
        source = self.family.sources[key]
        name, record = source.module, self.seen[source.module]
        if record.calls != 1 or source.coords is not None:
            raise SurgeryError(f"{name} is not given images alone, once in a forward pass")
        if not isinstance(record.given, Tensor) or record.given.shape != (_BATCH, *image):
            raise SurgeryError(f"{name} is not given the image")
        (rows, cols), beside = self.sizes[key], record.beside
        shape = record.gave.shape if isinstance(record.gave, Tensor) else torch.Size()
        if shape[:-1] == (_BATCH, rows * cols) and (not beside or _is_size(beside, rows, cols)):
            returns, dim = "tokens and size" if beside else "tokens", shape[2]
        elif shape[:-1] == (_BATCH, rows, cols) and not beside:
            returns, dim = "map, channels last", shape[3]
        elif shape[:1] + shape[2:] == (_BATCH, rows, cols) and not beside:
            returns, dim = "map", shape[1]
        else:
            raise SurgeryError(f"{name} does not return the {rows}*{cols} tokens of its grid alone")
        return Place(host=prefix + name, dim=dim, in_chans=image[0], returns=returns)

    def _layer_scale(self, record: _Seen) -> str | None:
        """The LayerScale that is given what a module returned."""
        for name, seen in self.seen.items():
            module = self.model.get_submodule(name)
            if type(module) is LayerScale and seen.calls == 1 and seen.given is record.gave:
                return name
        return None

    def _lay(self, block: str, kind: str, name: str, site: str, x: Tensor, prefix: str) -> Place:
        shape = tuple(x.shape)
        text = f"({', '.join(['B', *(str(s) for s in shape[1:])])})"
        if len(shape) in (3, 4) and shape[0] != _BATCH:
            raise SurgeryError(
                f"{name} sees {shape[0] // _BATCH} windows per image, and not the whole grid"
            )
        if len(shape) == 4:
            if not self._channels_last(block, kind, name, shape):
                raise SurgeryError(f"{name} sees maps (B, C, H, W), here {text}, and no tokens")
            return Place(host=prefix + name, dim=shape[3])
        if len(shape) != 3:
            raise SurgeryError(f"{name} sees {len(shape)} axes, here {text}; expected (B, N, C)")
        if self.family.rerolls:
            return self._rolled(block, kind, name, site, shape, prefix)
        source, halvings = self._stage(block)
        rows, cols = (halved(s, halvings, self.family.rounds_up) for s in self.sizes[source])
        num_prefix_tokens = shape[1] - rows * cols
        most = max(2, int(getattr(self.model, "num_prefix_tokens", 0)))
        if not 0 <= num_prefix_tokens <= most:
            raise SurgeryError(
                f"{name} sees {shape[1]} tokens, which are not the {rows}*{cols} of its grid"
            )
        return Place(
            host=prefix + name,
            dim=shape[2],
            source=source,
            halvings=halvings,
            rounds_up=self.family.rounds_up,
            num_prefix_tokens=num_prefix_tokens,
        )

    def _rolled(
        self, block: str, kind: str, name: str, site: str, shape: tuple[int, ...], prefix: str
    ) -> Place:
        """Tokens in the order of a block, or, in front of it, of the block before."""
        model: Any = self.model
        if model.patch_drop_rate > 0:
            raise SurgeryError(
                f"{name} sees some of the mask units in training, where no convolution can run; "
                f"build the model with patch_drop_rate=0"
            )
        index = int(block.rpartition(".")[2])
        if kind == "attn" or site == "before_block":
            index = max(0, index - 1)
        rows, cols = model.reroll.schedule[index][1]
        if shape[1] != rows * cols:
            raise SurgeryError(f"{name} sees {shape[1]} tokens, which are not {rows}*{cols}")
        return Place(host=prefix + name, dim=shape[2], rolled=index)

    def _channels_last(self, block: str, kind: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a map is ``(B, H, W, C)``, as one that goes through linear layers."""
        mlp = {"act": name.rpartition(".")[0], "mlp": name}.get(kind)
        widths = {
            width
            for m in self.model.get_submodule(mlp or block).modules()
            if isinstance(m, nn.Linear)
            for width in (m.in_features, m.out_features)
        }
        if mlp:
            return bool(widths)
        if shape[1] in widths and shape[3] in widths:
            raise SurgeryError(
                f"{name} sees maps of {shape[1]}x{shape[2]}x{shape[3]}, of which any side may be "
                f"the channels; plan with another input_size"
            )
        return shape[3] in widths

    def _stage(self, block: str) -> tuple[str, int]:
        """Key of the source of a block's grid, and how often that grid has been halved."""
        key = ""
        if self.family.stage:
            match = re.search(self.family.stage, f"{block}.")
            if match is None:
                raise SurgeryError(f"{block} belongs to no stage whose grid is known")
            key = match[1]
        if key in self.family.sources:
            return key, 0
        if "" not in self.family.sources or "" not in self.sizes:
            raise SurgeryError(f"{block} sees tokens, and it is not known where their grid is made")
        return "", int(key)


def _is_size(beside: list[Any], rows: int, cols: int) -> bool:
    """Whether what is returned besides tokens is their size."""
    return (
        len(beside) == 1 and isinstance(beside[0], (tuple, list)) and [*beside[0]] == [rows, cols]
    )


def _can_be_added_to(conv: nn.Conv2d) -> bool:
    """Whether a convolution is one that the kernel of a ``DWConv`` can be added to."""
    side, dilation = conv.kernel_size[0], conv.dilation[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (side, side)
        and side % 2 == 1
        and conv.dilation == (dilation, dilation)
        and conv.stride == (1, 1)
        and conv.padding == (dilation * (side // 2),) * 2
        and conv.padding_mode == "zeros"
    )


def has_values(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers."""
    return next(module.parameters(), next(module.buffers(), None)) is not None


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
