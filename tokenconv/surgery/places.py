"""Whether a site of a module is a place where tokens of a known grid lie, by what it was given."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from tokenconv.errors import SurgeryError
from tokenconv.layers import unlike_dwconv
from tokenconv.surgery.binding import can_capture
from tokenconv.surgery.families import Family
from tokenconv.surgery.layouts import halved

BATCH = 2
"""Images that the model is run on, so that windows, which multiply the batch, show."""


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
class Seen:
    """What one module was given and gave."""

    calls: int = 0
    given: Any = None
    gave: Any = None
    returns_more: bool = False
    """Whether something besides tokens is returned."""
    beside: list[Any] = field(default_factory=list)
    """And what."""


@dataclass(frozen=True)
class Look:
    """Judges one site after another by what was seen."""

    model: nn.Module
    family: Family
    sizes: dict[str, tuple[int, int]]
    seen: dict[str, Seen]

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
            if site == "merge_conv" and unlike_dwconv(host):
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
        if not isinstance(record.given, Tensor) or record.given.shape != (BATCH, *image):
            raise SurgeryError(f"{name} is not given the image")
        (rows, cols), beside = self.sizes[key], record.beside
        shape = record.gave.shape if isinstance(record.gave, Tensor) else torch.Size()
        if shape[:-1] == (BATCH, rows * cols) and (not beside or _is_size(beside, rows, cols)):
            returns, dim = "tokens and size" if beside else "tokens", shape[2]
        elif shape[:-1] == (BATCH, rows, cols) and not beside:
            returns, dim = "map, channels last", shape[3]
        elif shape[:1] + shape[2:] == (BATCH, rows, cols) and not beside:
            returns, dim = "map", shape[1]
        else:
            raise SurgeryError(f"{name} does not return the {rows}*{cols} tokens of its grid alone")
        return Place(host=prefix + name, dim=dim, in_chans=image[0], returns=returns)

    def _layer_scale(self, record: Seen) -> str | None:
        """The LayerScale that is given what a module returned."""
        for name, seen in self.seen.items():
            module = self.model.get_submodule(name)
            if type(module) is LayerScale and seen.calls == 1 and seen.given is record.gave:
                return name
        return None

    def _lay(self, block: str, kind: str, name: str, site: str, x: Tensor, prefix: str) -> Place:
        shape = tuple(x.shape)
        text = f"({', '.join(['B', *(str(s) for s in shape[1:])])})"
        if len(shape) in (3, 4) and shape[0] != BATCH:
            raise SurgeryError(
                f"{name} sees {shape[0] // BATCH} windows per image, and not the whole grid"
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


def has_values(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers."""
    return next(module.parameters(), next(module.buffers(), None)) is not None
