"""Training data beyond one disk: WebDataset shards, each read by one process only.

A pattern such as ``https://.../{split}-{000000..000146}.tar`` or ``/data/{split}-*.tar`` names them. A
sample is a picture (``.jpg``, ``.jpeg``, ``.png`` or ``.webp``) with a ``.cls``, its class, or a
``.mask.png`` of class ids.
"""

import glob
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import webdataset
from torch.utils.data import IterableDataset

from training.errors import TrainingError
from training.loading import read_picture, seeded

_PICTURES = "jpg;jpeg;png;webp"
_SHUFFLED = 1000
"""Samples that are held to be given in random order."""


def shards(pattern: str, split: str) -> list[str]:
    """Names of a split's shards.

    Raises:
        TrainingError: If the pattern does not say where the split's name stands, or names nothing.
    """
    if "{split}" not in pattern:
        raise TrainingError(f"expected {{split}} in the pattern of the shards, got {pattern}")
    named = pattern.replace("{split}", split)
    found = sorted(glob.glob(named)) if "*" in named else webdataset.shardlists.expand_urls(named)
    if not found:
        raise TrainingError(f"no shards match {named}")
    return found


class Stream(IterableDataset[Any]):
    """Samples of shards, transformed.

    Args:
        pattern: Of the shards.
        split: Whose are read.
        transform: Given a picture and its class or mask; may use the global generators.
        is_mask: Whether targets are masks.
        seed: Of the order, and of the random numbers; None keeps the order, and gives every
            process all samples once.
        samples: Of an epoch, over all processes; not used without a seed.
    """

    def __init__(
        self, pattern: str, split: str, transform: Callable[[Any], Any],
        *, is_mask: bool, seed: int | None, samples: int = 0,
    ):  # fmt: skip
        self.names = shards(pattern, split)
        self.transform = transform
        self.is_mask = is_mask
        self.seed = seed
        self.samples = samples
        self.epoch = torch.zeros(2, dtype=torch.long).share_memory_()  # workers see it change

    def begin(self, epoch: int, start: int = 0) -> None:
        """Shuffle for this epoch; one that goes on in its middle is shuffled in another way."""
        self.epoch[:] = torch.tensor((epoch, start))

    def __iter__(self) -> Iterator[Any]:
        key = (self.seed or 0, *self.epoch.tolist())
        rank, _, worker, _ = webdataset.utils.pytorch_worker_info()
        for number, sample in enumerate(self._samples(random.Random(str(key)))):
            with seeded(*key, rank, worker, number):
                yield self.transform(self._decoded(*sample))

    def _samples(self, rng: random.Random) -> Any:
        trains = self.seed is not None
        names = list(self.names)
        if trains:
            rng.shuffle(names)  # every process in the same way, before they share them out
        found = webdataset.WebDataset(
            names, shardshuffle=False, nodesplitter=webdataset.split_by_node if trains else None
        )
        if trains:
            found = found.repeat().shuffle(_SHUFFLED, rng=rng)
        return found.to_tuple("__key__", _PICTURES, "mask.png" if self.is_mask else "cls")

    def _decoded(self, key: str, picture: bytes, target: bytes) -> tuple[Any, Any]:
        image = read_picture(io.BytesIO(picture), key, "RGB")
        if self.is_mask:
            return image, read_picture(io.BytesIO(target), f"{key}.mask", None)
        try:
            return image, int(target)
        except ValueError as error:
            raise TrainingError(f"{key}.cls is no class: {target[:20]!r}") from error
