"""Training data beyond one disk: WebDataset shards, each read by one process only.

A pattern such as ``https://.../{split}-{000000..000146}.tar`` or ``/data/{split}-*.tar`` names
them.
A sample is a picture (``.jpg``, ``.jpeg``, ``.png`` or ``.webp``) with a ``.cls``, its class, or a
``.mask.png`` of class ids.
"""

import argparse
import io
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from webdataset import utils as webdataset_utils
from webdataset.compat import WebDataset
from webdataset.shardlists import expand_urls, split_by_node
from webdataset.utils import pytorch_worker_info

from training.errors import TrainingError
from training.loading import read_picture, seeded

# Or a name that begins with "pipe:" would run a shell.
webdataset_utils.enforce_security = True  # pyright: ignore[reportAttributeAccessIssue]
_PICTURES = "jpg;jpeg;png;webp"
_SHUFFLED = 1000
"""Samples that are held to be given in random order."""


class Shards:
    """The shards of a split.

    Args:
        pattern: Names them, with ``{split}`` in it.
        split: ``train``, ``val`` or what else stands there.
        is_mask: Whether targets are masks.
        samples: Of an epoch; only for what is trained on.

    Raises:
        TrainingError: If the pattern does not say where the split's name stands, names nothing, or
            is a command.
    """

    def __init__(self, pattern: str, split: str, *, is_mask: bool, samples: int = 0):
        if pattern.startswith("pipe:"):
            raise TrainingError(
                f"shards are files or addresses, not what a command gives: {pattern}"
            )
        if "{split}" not in pattern:
            raise TrainingError(f"expected {{split}} in the pattern of the shards, got {pattern}")
        named = pattern.replace("{split}", split)
        self.names: list[str] = (
            sorted(map(str, Path(named).parent.glob(Path(named).name)))
            if "*" in named
            else expand_urls(named)
        )
        if not self.names:
            raise TrainingError(f"no shards match {named}")
        self.is_mask = is_mask
        self.samples = samples

    def read(self, rng: random.Random | None) -> Iterator[tuple[Any, Any]]:
        """Pictures with their class or mask.

        Args:
            rng: Shuffles the process's own share of the shards, again and again; None reads every
                sample once, in order.
        """
        names = list(self.names)
        if rng is not None:
            rng.shuffle(names)  # every process in the same way, before they share them out
        nodes = split_by_node if rng else _keep
        found: Any = WebDataset(names, shardshuffle=False, nodesplitter=nodes)
        if rng is not None:
            found = found.repeat().shuffle(_SHUFFLED, rng=rng)
        target = "mask.png" if self.is_mask else "cls"
        try:
            for key, picture, value in found.to_tuple("__key__", _PICTURES, target):
                image = read_picture(io.BytesIO(picture), key, "RGB")
                if self.is_mask:
                    yield image, read_picture(io.BytesIO(value), f"{key}.mask.png", None)
                else:
                    yield image, _class_of(value, key)
        except (tarfile.TarError, ValueError, KeyError) as error:  # what a shard lacks
            raise TrainingError(f"cannot read the shards {names[0]}, ...: {error}") from error


def open_shards(args: argparse.Namespace, splits: Sequence[str], *, is_mask: bool) -> list[Shards]:
    """Shards to train on, and shards to be judged by.

    Args:
        args: Say the pattern as ``data``, and ``num_classes`` and ``samples``.
        splits: Their names.
        is_mask: Whether targets are masks.

    Raises:
        TrainingError: If something is not said, or the pattern names nothing.
    """
    if args.num_classes is None or args.samples is None:
        raise TrainingError("shards do not say how much they hold: say --num-classes, --samples")
    return [Shards(args.data, split, is_mask=is_mask, samples=args.samples) for split in splits]


class Streamed(IterableDataset[Any]):
    """Samples of shards, transformed, with random numbers of their own for each.

    Args:
        shards: Where they are read.
        transform: Given a picture and its target; may use the global generators.
        seed: Of order and transforms; None keeps the order and gives each sample once.
    """

    def __init__(self, shards: Shards, transform: Callable[[Any], Any], seed: int | None):
        self.shards = shards
        self.transform = transform
        self.seed = seed
        self.samples = shards.samples
        self._key = torch.zeros(2, dtype=torch.long).share_memory_()  # workers see it change

    def begin(self, epoch: int, start: int = 0) -> None:
        """Shuffle for this epoch; one that goes on in its middle is shuffled in another way."""
        self._key[:] = torch.tensor((epoch, start))

    def __iter__(self) -> Iterator[Any]:
        rank, _, worker, _ = pytorch_worker_info()
        key = (self.seed or 0, *self._key.tolist())
        rng = None if self.seed is None else random.Random(str(key))
        for number, sample in enumerate(self.shards.read(rng)):
            with seeded(*key, rank, worker, number):
                yield self.transform(sample)


def _keep(names: Iterator[Any]) -> Iterator[Any]:
    """Every process reads all."""
    return names


def _class_of(value: bytes, key: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise TrainingError(f"{key}.cls is no class: {value[:20]!r}") from error
