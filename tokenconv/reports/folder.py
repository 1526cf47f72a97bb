"""The folder of a report: written whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenconv.errors import MeasurementError


@contextmanager
def report_folder(out: Path, *, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write into; what is in it appears in ``out`` only if nothing failed.

    Args:
        out: Made if missing. Files of the same names in it are replaced, others are left.
        instead_of: Patterns of an earlier report's files, which go when those of this one come.

    Raises:
        MeasurementError: If ``out`` cannot be written, before anything else is done.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
            raise PermissionError("it is there and is no folder that can be written")
        beside = out if out.is_dir() else out.parent  # on the same disk, and known to be writable
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=beside))
    except OSError as error:
        raise MeasurementError(f"cannot write a report to {out}: {error}") from error
    try:
        yield staging
        for stale in [path for pattern in instead_of for path in out.glob(pattern)]:
            stale.unlink()
        _place(staging, out)
    except OSError as error:
        raise MeasurementError(f"cannot write a report to {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _place(staging: Path, out: Path) -> None:
    for made in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = out / made.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)
