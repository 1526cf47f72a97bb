"""From samples and transforms to batches, for one process or many."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator
from torch.utils.data import DataLoader

from training.errors import TrainingError
from training.loading import Augmented, EpochSampler, Indexed, make_loader
from training.settings import Settings
from training.streams import Shards, Streamed


class Order(Protocol):
    """Which samples come when."""

    samples: int
    """Of an epoch, over all processes."""

    def begin(self, epoch: int, start: int = 0) -> None:
        """Give this epoch next, without the samples before ``start``."""
        ...


@dataclass
class Data:
    """Batches to train on and to be judged by."""

    train: "DataLoader[Any]"
    order: Order
    """Of the training data."""
    val: "DataLoader[Any]"
    is_stream: bool = False
    """Whether training data have no end, and each process reads its own already."""


def make_data(
    train: Indexed | Shards,
    val: Indexed | Shards,
    augment: Callable[[Any], Any],
    judge: Callable[[Any], Any],
    *,
    settings: Settings,
    accelerator: Accelerator,
    val_batch: int | None = None,
) -> Data:
    """Loaders of samples.

    Args:
        train: To be trained on, in random order.
        val: To be judged by.
        augment: From a sample to train on to what a batch is made of.
        judge: The same for one to be judged by.
        settings: Size of a batch and of its parts, workers, seed.
        accelerator: Knows how many processes there are.
        val_batch: Samples of a batch to be judged by in a process; None: as many as in training.

    Raises:
        TrainingError: If there are fewer shards than are read at a time.
    """
    part = settings.batch_size // settings.accumulate
    workers, seed, processes = settings.workers, settings.seed, accelerator.num_processes
    val_batch = processes * (val_batch or max(1, part // processes))
    if isinstance(val, Shards):
        judged = make_loader(Streamed(val, judge, None), None, batch_size=val_batch, workers=0)
    else:
        order = EpochSampler(len(val), seed=None)
        judged = make_loader(
            Augmented(val, judge, (seed, 1)), order, batch_size=val_batch, workers=workers
        )
    if isinstance(train, Shards):
        readers = processes * max(1, workers)
        if len(train.names) < readers:
            raise TrainingError(
                f"{len(train.names)} shards are too few for {readers} readers "
                f"({processes} processes, --workers {workers})"
            )
        stream = Streamed(train, augment, seed)
        own = max(1, part // processes)
        loader = make_loader(stream, None, batch_size=own, workers=workers)
        return Data(loader, stream, judged, is_stream=True)
    order = EpochSampler(len(train), seed=seed, group=settings.batch_size)
    augmented = Augmented(train, augment, (seed, 0))
    return Data(make_loader(augmented, order, batch_size=part, workers=workers), order, judged)
