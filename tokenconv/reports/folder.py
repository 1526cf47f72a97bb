"""The folder of a report: written whole, or not at all, and by one run at a time."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tokenconv.errors import MeasurementError
from tokenconv.locks import locked


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other runs out of a folder, and remove what one that was killed left unfinished.

    Args:
        out: Made if missing, with the folders above it; they go again where nothing was written.

    Raises:
        MeasurementError: If another run writes there, or nobody can.
    """
    with ExitStack() as held:
        try:
            held.callback(_remove_empty, [f for f in (out, *out.parents) if not f.exists()])
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out / ".lock", wait_s=0))
        except TimeoutError as error:
            raise MeasurementError(
                f"another run is writing to {out}: wait for it, or take another --out"
            ) from error
        except OSError as error:
            raise MeasurementError(f"cannot write a report to {out}: {error}") from error
        for left in out.iterdir():
            if left.name.startswith(_staged(out)) and left.is_dir():
                shutil.rmtree(left)
        yield


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
        staging = Path(tempfile.mkdtemp(prefix=_staged(out), dir=beside))
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


def _staged(out: Path) -> str:
    """How the names of folders begin that are written into."""
    return f".{out.name}-"


def _place(staging: Path, out: Path) -> None:
    for made in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = out / made.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
