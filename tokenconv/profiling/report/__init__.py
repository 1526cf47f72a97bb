"""The files of a comparison: written whole, or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenconv.errors import MeasurementError
from tokenconv.profiling.report.figure import write_figure
from tokenconv.profiling.report.markdown import changes_table, to_markdown
from tokenconv.profiling.results import Comparison

__all__ = ["changes_table", "report_folder", "write_report"]


@contextmanager
def report_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; what is in it appears in ``out`` only if nothing failed.

    Args:
        out: Made if missing. Files of the same names in it are replaced, others are left.

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
        _place(staging, out)
    except OSError as error:
        raise MeasurementError(f"cannot write a report to {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _place(staging: Path, out: Path) -> None:
    """Move what was made; traces of an earlier run go, since they belong to no report then."""
    for stale in out.glob("traces/*/*.pt.trace.json.gz"):
        stale.unlink()
    for made in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = out / made.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.replace(target)


def write_report(comparison: Comparison, folder: Path, *, about: dict[str, Any]) -> None:
    """Write ``compare.json``, ``report.md`` and ``compare.png``.

    Args:
        comparison: What was measured.
        folder: Exists already, see ``report_folder``.
        about: What the comparison does not know itself, such as ``model`` and ``command``; goes
            into the JSON as it is, and into the report as a list.
    """
    content = {**comparison.to_dict(), **about}
    (folder / "compare.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "report.md").write_text(to_markdown(comparison, about))
    write_figure(comparison, str(about.get("model", "comparison")), folder / "compare.png")
