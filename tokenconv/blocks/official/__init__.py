"""Weights from the papers' own repositories, under our keys."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.blocks.catalogue import BLOCKS
from tokenconv.blocks.official import attention, feed_forwards, mixers, separable, stems
from tokenconv.blocks.official.renames import Renames, Source
from tokenconv.errors import CheckpointError, UnknownNameError

__all__ = ["SOURCES", "load_official"]


_PARTS = (feed_forwards, mixers, attention, stems, separable)
SOURCES: Mapping[str, Source] = {
    name: {block: keys for part in _PARTS for block, keys in part.SOURCES.get(name, {}).items()}
    for name in dict.fromkeys(name for part in _PARTS for name in part.SOURCES)
}
"""By the name of a model: the blocks it has, and what its keys are called in them. Read in the
official code, or in timm's and transformers', whose names fit as well."""


def load_official(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str) -> nn.Module:
    """Load weights under the keys of a paper's own repository, in place.

    1x1 convolutions of the source become linear layers, which are the same. Everything must fit,
    or nothing is loaded.

    Args:
        module: A block, or a model that holds blocks where the source's model holds its own. What
            is not in a block of ours keeps its keys.
        state_dict: Keys and values of the source, for the whole of ``module``.
        source: The model they come from, a key of ``tokenconv.blocks.official.SOURCES``.

    Returns:
        ``module``.

    Raises:
        UnknownNameError: If there is no such source; the nearest names are listed.
        CheckpointError: If ``module`` has no block of that source, or a key or a shape does not
            fit: what was expected and what came.
    """
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    _check_values(state_dict)
    rows = _rows_of(module, source)
    wanted = module.state_dict()
    values: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _our_key(key, rows)
        if name is None:
            continue
        if name not in wanted:
            prefix = "; take 'module.' away first" if key.startswith("module.") else ""
            raise CheckpointError(
                f"{key} is no key of {source} for this module{prefix}. Expected those of "
                f"{' and '.join(path or 'the block itself' for path, _ in rows)}, such as "
                f"{_some([path + theirs for path, names in rows for theirs in names])}"
            )
        if name in values:
            raise CheckpointError(f"{key} comes a second time, under another name: both are {name}")
        values[name] = _fit(key, value, wanted[name])
    for name, value in wanted.items():
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device: call module.to_empty(...) first")
        if name in values:
            continue
        if not name.endswith(".num_batches_tracked"):
            raise CheckpointError(
                f"the state dict of {source} has nothing for {name}; it has "
                f"{_some(list(state_dict)) or 'nothing at all'}"
            )
        values[name] = torch.zeros_like(value)  # from before torch counted
    module.load_state_dict(values, strict=True)
    return module


def _check_values(state_dict: Mapping[str, Any]) -> None:
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"expected a state dict, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            raise CheckpointError(
                f"expected tensors by key, got a {type(value).__name__} under {key!r}: pass the "
                f"state dict that is inside, such as checkpoint['model']"
            )
        if not isinstance(value, Tensor) or value.is_meta or value.is_complex():
            what = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value)
            raise CheckpointError(f"expected real tensors with values, got {what} under {key!r}")


def _rows_of(module: nn.Module, source: str) -> list[tuple[str, Renames]]:
    """Where blocks of a source are, and their names there."""
    kinds: dict[type[nn.Module], Any] = {
        _class_of(name): row for name, row in SOURCES[source].items()
    }
    rows: list[tuple[str, Renames]] = []
    for path, part in module.named_modules(remove_duplicate=False):
        row = kinds.get(type(part))
        if row is not None:
            rows.append(
                (f"{path}." if path else "", row if isinstance(row, Mapping) else row(part))
            )
    if not rows:
        raise CheckpointError(
            f"weights of {source} are for {' and '.join(SOURCES[source])}, and this "
            f"{type(module).__name__} has none of them"
        )
    return rows


def _class_of(name: str) -> Any:
    return BLOCKS[name].factory


def _our_key(key: str, rows: list[tuple[str, Renames]]) -> str | None:
    for path, names in rows:
        if not key.startswith(path):
            continue
        inside = key.removeprefix(path)
        for theirs, ours in names.items():
            if inside == theirs or inside.startswith(f"{theirs}."):
                return None if ours is None else path + ours + inside.removeprefix(theirs)
        return path + "?" + inside  # no key of that source: found nowhere
    return key


def _fit(key: str, value: Tensor, like: Tensor) -> Tensor:
    """The value in our shape, which may lack sides of one in front and behind."""
    if _core(value) != _core(like) or value.is_floating_point() != like.is_floating_point():
        raise CheckpointError(
            f"{key} is {value.dtype} {tuple(value.shape)}, expected {like.dtype} "
            f"{tuple(like.shape)}"
        )
    return value.reshape(like.shape)


def _core(value: Tensor) -> list[int]:
    """The shape without sides of one at its ends."""
    sides = list(value.shape)
    while sides and sides[-1] == 1:
        sides.pop()
    while sides and sides[0] == 1:
        sides.pop(0)
    return sides


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
