"""Batches that depend on seed and epoch alone: not on workers, processes or where a run went on."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from training.errors import TrainingError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Of pictures, whatever their names end in: Pillow would run Ghostscript for others."""


def pictures_in(folder: Path) -> list[Path]:
    """Files that may be pictures, by name; none where there is no folder."""
    known = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix.lower() in known and path.is_file())


def read_picture(source: Any, name: object, mode: str | None) -> Image.Image:
    """A picture: of a path, of an open file, which is closed then, or one that is there already.

    Raises:
        TrainingError: If it is of no known format, cannot be read to its end, or is so large that
            it may be made to fill the memory.
    """
    try:
        if isinstance(source, Image.Image):
            return source if mode is None else source.convert(mode)
        with Path(source).open("rb") if isinstance(source, str | Path) else source as file:
            image = Image.open(file, formats=FORMATS)
            image.load()
        return image if mode is None else image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingError(f"cannot read {name}: {error}") from error


class Indexed(Protocol):
    """A data set with a length."""

    def __getitem__(self, index: int) -> Any: ...

    def __len__(self) -> int: ...


class Augmented(Dataset[Any]):
    """Samples and what a transform makes of them, with random numbers of its own for each.

    Args:
        dataset: The samples.
        transform: Given a sample; may use ``random``, numpy's and torch's global generators.
        seed: Of the random numbers.
    """

    def __init__(self, dataset: Indexed, transform: Callable[[Any], Any], seed: tuple[int, ...]):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with seeded(*self.seed, epoch, index):
            return self.transform(self.dataset[index])


class EpochSampler(Sampler[tuple[int, int]]):
    """Indices of an epoch with its number, shuffled for training; can begin in the middle.

    Args:
        length: Of the data set.
        seed: Of the order; None keeps the order.
        group: Indices beyond a multiple of it are left out.
    """

    def __init__(self, length: int, *, seed: int | None, group: int = 1):
        self.samples = length - length % group
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Iterate over this epoch next, and leave out its first indices."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.samples - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.seed is not None:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        return ((self.epoch, int(index)) for index in order[self.start : self.samples])


def make_loader(
    dataset: Dataset[Any], sampler: EpochSampler | None, *, batch_size: int, workers: int
) -> "DataLoader[Any]":
    """Batches in the order of the sampler or of a stream, made ahead by other processes."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_stand_apart,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that loading draws nothing from the global one
    )


def _stand_apart(_: int) -> None:
    """What is sent to the group of processes is for the loop: the last step needs its batch."""
    os.setsid()


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Global generators that begin anew, and go on where they were afterwards."""
    numpys: Any = np.random  # quicker to exchange than to copy, and it is done for every sample
    bits = np.random.PCG64(seed)
    drawn = int(bits.random_raw() >> 1)
    state = random.getstate(), numpys.get_bit_generator(), torch.get_rng_state()
    try:
        random.seed(drawn)
        numpys.set_bit_generator(bits)
        torch.default_generator.manual_seed(drawn)
        yield
    finally:
        random.setstate(state[0])
        numpys.set_bit_generator(state[1])
        torch.set_rng_state(state[2])
