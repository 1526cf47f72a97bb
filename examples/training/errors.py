"""What stops a run, with one line that says why."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenconv import TokenConvError


class TrainingError(RuntimeError):
    """Training cannot begin or go on; what was written before is whole."""


class ResumeError(TrainingError):
    """A run cannot go on from a checkpoint."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the process with status 1 and one line, where what was asked for cannot be done."""
    try:
        yield
    except (TrainingError, TokenConvError, OSError) as error:
        # What a worker raised comes with its traceback in front.
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        text = line.rpartition("Error: ")[2]
        sys.exit(f"{Path(sys.argv[0]).name}: error: {text}")
