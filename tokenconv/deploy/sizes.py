"""Which image sizes a program is traced at, and at which others it is checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenconv.errors import ExportError

AXES = ("batch", "hw")
"""What can be left open in an exported program."""
_BATCHES = (1, 3)
_TRACED_BATCH = 2  # a batch of one would become a constant


@dataclass(frozen=True)
class Sizes:
    """Shapes of images ``(B, C, H, W)``, and what may change in them."""

    traced: tuple[int, int, int, int]
    """With which the program is made; other than the size asked for where sizes are open."""
    checked: tuple[tuple[int, int, int, int], ...]
    """With which it is compared with the model."""
    dynamic: tuple[str, ...]
    """Of ``AXES``."""
    multiple_of: tuple[int, int] | None
    """What H and W are multiples of where they are open."""


def sizes_for(
    model: nn.Module,
    input_size: Sequence[int],
    dynamic: Sequence[str],
    multiple_of: int | tuple[int, int] | None,
    batch_size: int,
) -> Sizes:
    """Choose sizes.

    Where H and W are open, the program is traced at a size of its own: models ask whether an image
    has the size they were made for, and the answer would become part of the program.

    Raises:
        ExportError: If the size fits neither the model nor what is to be open.
    """
    dynamic = _axes(dynamic)
    if len(input_size) != 3 or min(input_size) < 1:
        raise ExportError(f"expected an input size (C, H, W), got {tuple(input_size)}")
    if batch_size < 1:
        raise ExportError(f"expected a batch of one image or more, got {batch_size}")
    channels, height, width = input_size
    batches = _BATCHES if "batch" in dynamic else (batch_size,)
    traced_batch = _TRACED_BATCH if "batch" in dynamic else batch_size
    if "hw" not in dynamic:
        if multiple_of is not None:
            raise ExportError("multiple_of is about open image sizes: add 'hw' to dynamic")
        checked = tuple((batch, channels, height, width) for batch in batches)
        return Sizes((traced_batch, channels, height, width), checked, dynamic, None)
    step = _multiple(model, multiple_of)
    rows, cols = _units((height, width), step)
    traced = (traced_batch, channels, (rows + 1) * step[0], (cols + 2) * step[1])
    others = ((rows + 2, cols + 1), (rows, cols + 3), (rows + 4, cols), (rows + 3, cols + 5))
    found = [(r * step[0], c * step[1]) for r, c in others]
    oblong = [(h, w) for h, w in found if h != w and (h, w) != traced[2:]]
    pixels = [(height, width), *oblong[:3]]
    checked = tuple((batch, channels, h, w) for h, w in pixels for batch in batches)
    return Sizes(traced, checked, dynamic, step)


def _axes(dynamic: Sequence[str]) -> tuple[str, ...]:
    names = (dynamic,) if isinstance(dynamic, str) else dynamic
    if unknown := [name for name in names if name not in AXES]:
        raise ExportError(f"dynamic takes {' and '.join(map(repr, AXES))}, got {unknown[0]!r}")
    return tuple(name for name in AXES if name in names)


def _multiple(model: nn.Module, given: int | tuple[int, int] | None) -> tuple[int, int]:
    """What H and W must be multiples of: as told, or as the model says of itself.

    timm's models have a ``feature_info`` that says how much smaller than the image each stage is.
    A ``patch_embed`` has a ``patch_size``; patches may overlap, so it is asked last.
    """
    if given is not None:
        rows, cols = (given, given) if isinstance(given, int) else given
        if min(rows, cols) < 1:
            raise ExportError(f"expected multiple_of of 1 or more, got {given}")
        return rows, cols
    info: Any = getattr(model, "feature_info", None)
    stages = info if isinstance(info, list) else []
    if reductions := [r for stage in stages if isinstance(r := stage.get("reduction"), int)]:
        least = math.lcm(*reductions)
        return least, least
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        raise ExportError(
            f"a {type(model).__name__} does not say which image sizes it takes: with 'hw' in "
            f"dynamic, say what H and W are multiples of, with multiple_of"
        )
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def _units(size: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    counts = []
    for side, unit, name in zip(size, step, "HW", strict=True):
        if side % unit:
            raise ExportError(
                f"sizes are open in steps of {step[0]}x{step[1]}, and {name}={side} is no multiple "
                f"of {unit}: choose another input_size, or say the steps with multiple_of"
            )
        if side < 2 * unit:
            raise ExportError(
                f"sizes are open from two steps of {step[0]}x{step[1]} on, as exporters take a "
                f"single one for a constant; {name}={side} is too small"
            )
        counts.append(side // unit)
    return counts[0], counts[1]
