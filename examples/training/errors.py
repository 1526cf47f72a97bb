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
        text = str(error).strip() or type(error).__name__
        if "Traceback (most recent call last)" in text:  # of a process that loads
            text = text.splitlines()[-1].rpartition("Error: ")[2]
        text = " ".join(text.split())
        sys.exit(f"{Path(sys.argv[0]).name}: error: {text}")
