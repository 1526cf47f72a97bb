"""Files of a run: written beside the last ones and then named, so that one is always whole."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torchvision.utils import save_image

import tokenconv as tc
from tokenconv.surgery import inserted_modules
from training.errors import ResumeError, TrainingError
from training.hybrids import backbone_of, head_state

_PROGRESS, _AVERAGE = "progress.json", "average.safetensors"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder of a run.

    Raises:
        TrainingError: If another run trains in it, or it cannot be written.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # What loads the data of a run that was killed ends some seconds later.
            held.enter_context(FileLock(folder / ".lock", timeout=10))
        except Timeout as error:
            raise TrainingError(
                f"another run trains in {folder}: wait for it, or take another --out"
            ) from error
        except OSError as error:
            raise TrainingError(f"cannot write to {folder}: {error}") from error
        yield


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    progress: Mapping[str, Any],
    average: nn.Module | None,
) -> None:
    """Keep everything that the run needs to go on: weights as safetensors, optimizer, generators.

    All processes call it. A run that is killed while it is written has the one before; the last two
    are kept.

    Args:
        accelerator: Has prepared model, optimizer and scheduler.
        folder: Of all checkpoints.
        step: Names this one.
        progress: Where the run is, ready for JSON.
        average: Of the weights, if there is one.

    Raises:
        TrainingError: If it cannot be written; what was there is as it was.
    """
    staging = folder / ".writing"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(staging))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Accelerate would pickle what is registered with it.
            (staging / _PROGRESS).write_text(json.dumps(progress))
            if average is not None:
                save_model(average, str(staging / _AVERAGE))
            _publish(staging, folder / f"step-{step:08d}", kept=2)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises what is no OSError
        shutil.rmtree(staging, ignore_errors=True)  # or a full disk would stay full
        raise TrainingError(
            f"cannot write a checkpoint to {folder} at step {step}: {error}; "
            f"{last(folder) or 'none'} is the last one"
        ) from error
    accelerator.wait_for_everyone()


def load_state(
    accelerator: Accelerator, checkpoint: Path, average: nn.Module | None
) -> dict[str, Any]:
    """Go on from a checkpoint; nothing in it can run code.

    Args:
        accelerator: Has prepared model, optimizer and scheduler.
        checkpoint: What ``save_checkpoint`` has kept.
        average: Of the weights, if there is one.

    Returns:
        Where the run was.

    Raises:
        ResumeError: If it cannot be read, or is of another run.
    """
    try:
        progress = json.loads((checkpoint / _PROGRESS).read_text())
        accelerator.load_state(str(checkpoint))
        if average is not None:
            load_model(average, checkpoint / _AVERAGE)
    except Exception as error:  # torch, safetensors and json each have their own
        raise ResumeError(
            f"cannot resume from {checkpoint}: {error}: remove it to go on from the one before"
        ) from error
    return progress


def save_weights(model: nn.Module, folder: Path, epoch: int) -> None:
    """Keep what is to be used: all weights, and of a hybrid the plan and what was added or trained.

    ``model.safetensors`` is the whole. ``plan.json`` and ``delta.safetensors`` are what
    ``tokenconv.load_`` takes, and ``head.safetensors`` what stands on the backbone. The last ones
    are replaced.

    Args:
        model: On this process alone, with whole tensors.
        folder: Of all weights.
        epoch: Names these.

    Raises:
        TrainingError: If they cannot be written; what was there is as it was.
    """
    staging = folder / ".writing"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        save_model(model, str(staging / "model.safetensors"))
        head = head_state(model)
        if head:
            save_file(head, staging / "head.safetensors")
        if inserted_modules(backbone_of(model)):
            tc.save(backbone_of(model), staging)
        _publish(staging, folder / f"epoch-{epoch:04d}", kept=1)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(f"cannot write weights to {folder}: {error}") from error


def last(folder: Path) -> Path | None:
    """The newest checkpoint, or the newest weights; None if there are none."""
    return next(reversed(_all(folder)), None)


def _all(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"(step|epoch)-\d+", path.name))


def _publish(staging: Path, target: Path, kept: int) -> None:
    """Give what is written its name, once it is on the disk, and drop older ones."""
    for path in (staging, *staging.rglob("*")):
        _to_disk(path)
    replaced = target.with_name(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():  # written again by a run that goes on
        target.rename(replaced)
    staging.rename(target)
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _all(target.parent)[:-kept]:
        shutil.rmtree(old)


def write_json(content: Any, path: Path) -> None:
    """Write a file whole, or not at all."""
    with _written(path) as staging:
        staging.write_text(json.dumps(content, indent=1, default=str) + "\n")


def write_picture(picture: Tensor, path: Path) -> None:
    """Write a picture ``(3, H, W)`` in 0 to 1 whole, or not at all."""
    with _written(path) as staging:
        save_image(picture, staging)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A place to write, which takes the file's once it is on the disk."""
    staging = path.with_name(f".{path.name}")
    try:
        staging.unlink(missing_ok=True)  # a link would be followed
        yield staging
        _to_disk(staging)
        staging.replace(path)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error}") from error


def check_same(now: Mapping[str, Any], path: Path, may_change: set[str]) -> None:
    """Compare the settings of a run with those it began with.

    Args:
        now: Settings by name.
        path: JSON file of those it began with.
        may_change: Names that do not matter.

    Raises:
        ResumeError: If others differ.
    """
    try:
        then = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(f"cannot resume: {path} cannot be read: {error}") from error
    now = json.loads(json.dumps(now, default=str))
    differing = [
        f"--{name.replace('_', '-')} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*then, *now} - may_change)
        if then.get(name) != now.get(name)
    ]
    if differing:
        raise ResumeError(
            f"cannot resume {path.parent}: {'; '.join(differing)}: use the same, or another --out"
        )


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
