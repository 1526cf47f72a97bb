"""Two files that belong together: values, and a manifest that says what they are.

The manifest states the checksum of its values, and replacing it is the one moment at which a new
pair takes the place of an older one: the new values lie ready under a name of their own before, and
take their place after. A reader takes the values that have the checksum, so a crash at any moment
leaves the old pair or the new one. One process writes at a time, the others wait for it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from tokenconv.errors import CheckpointError
from tokenconv.locks import locked

FORMAT = 1
"""Version of the files that are written."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``plan.json`` says."""

    architecture: str | None
    """Name of the timm architecture; None where the model does not know it."""
    plan: dict[str, Any]
    tensors: dict[str, str]
    """Shape and dtype of every saved value, such as ``"7x48 float32"``."""
    base: dict[str, str]
    """Shape and some values of every parameter that is not saved."""
    domain: str | None = None
    """The domain that was saved; None for a hybrid."""
    sha256: str = ""
    """Checksum of the file of values."""

    def to_json(self) -> str:
        """The text of ``plan.json``."""
        content = {"format": FORMAT, "tokenconv": _version(), **asdict(self)}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """What ``to_json`` wrote; ``CheckpointError`` where it is something else."""
        try:
            content = json.loads(text)
            number, writer = content.pop("format"), content.pop("tokenconv")
            if isinstance(number, int) and number > FORMAT:
                raise CheckpointError(
                    f"written in format {number} by tokenconv {writer}, and this tokenconv "
                    f"{_version()} reads format {FORMAT}; update tokenconv"
                )
            made = cls(**content)
            texts = [made.sha256, *made.tensors.values(), *made.base.values()]
            if number != FORMAT or not all(isinstance(text, str) for text in texts):
                raise TypeError("its entries are not what tokenconv writes")
            for text in made.base.values():
                noted(text)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"no checkpoint of tokenconv, or damaged: {error!r}") from error
        return made


def _version() -> str:
    try:
        return version("tokenconv")
    except PackageNotFoundError:  # a source tree on the path
        return "not installed"


@dataclass(frozen=True)
class Files:
    """A manifest, and the values that belong to it."""

    manifest: Path
    delta: Path

    @property
    def next_delta(self) -> Path:
        """Where new values wait until the manifest is theirs."""
        return self.delta.with_name(self.delta.name + ".new")

    @property
    def next_manifest(self) -> Path:
        """Where the next manifest waits until its values are there."""
        return self.manifest.with_name(self.manifest.name + ".new")

    @property
    def lock(self) -> Path:
        """Held by who writes."""
        return self.manifest.with_name(f".{self.manifest.name}.lock")


def write(files: Files, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Write values and their manifest, in place of an older pair where there is one.

    There is no cleaning up: what an interrupted call leaves behind, the next one replaces.

    Raises:
        CheckpointError: If there are files of these names that are no checkpoint.
        OSError: If the files cannot be written.
    """
    data = tensors_to_bytes({key: _unshared(value) for key, value in tensors.items()})
    text = replace(manifest, sha256=_checksum(data)).to_json()
    folder = files.manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    with locked(files.lock):
        _finish_interrupted(files)
        _write_through(files.next_delta, data)
        _write_through(files.next_manifest, text.encode())
        _sync(folder)
        os.replace(files.next_manifest, files.manifest)  # noqa: PTH105  # from here on the new pair
        _sync(folder)
        os.replace(files.next_delta, files.delta)  # noqa: PTH105
        _sync(folder)


def read(files: Files) -> tuple[Manifest, dict[str, Tensor]]:
    """The pair that ``write`` wrote, also while another process writes the next one.

    Raises:
        CheckpointError: If a file is missing, damaged, of a newer version or of another pair.
    """
    manifest, data = _read_pair(files)
    try:
        tensors = tensors_from_bytes(data)
    except SafetensorError as error:
        raise CheckpointError(f"{files.delta} is no file of safetensors: {error}") from error
    if {key: form_of(value) for key, value in tensors.items()} != manifest.tensors:
        raise CheckpointError(f"{files.delta} has other keys or shapes than {files.manifest} says")
    return manifest, tensors


def _read_pair(files: Files) -> tuple[Manifest, bytes]:
    """A manifest and the values that have its checksum.

    Where none have, it looks again until nothing has changed: somebody may just have written.
    """
    seen: tuple[Manifest, dict[Path, str]] | None = None
    while True:
        manifest, sums = _read_manifest(files), dict[Path, str]()
        for path in (files.delta, files.next_delta):  # the second one of an interrupted ``write``
            if (data := _bytes_of(path)) is not None:
                sums[path] = _checksum(data)
                if sums[path] == manifest.sha256:
                    return manifest, data
        if seen == (manifest, sums):
            break
        seen = manifest, sums
    path = next(iter(sums), files.delta)
    got = _checksum(_read_bytes(path))
    raise CheckpointError(
        f"{path} is truncated, or not the file that {files.manifest.name} describes: expected "
        f"the checksum {manifest.sha256[:12]}, got {got[:12]}. Copy both again"
    )


def _finish_interrupted(files: Files) -> None:
    """Let values that wait take their place, and refuse to overwrite what is no checkpoint."""
    if not (files.manifest.exists() or files.delta.exists()):
        return
    try:
        present = _read_manifest(files)
    except CheckpointError as error:
        raise CheckpointError(
            f"{files.manifest.parent} holds a {files.manifest.name} or {files.delta.name} that "
            f"cannot be replaced safely: {error}. Take another folder, or delete them"
        ) from error
    waiting = files.next_delta
    if waiting.exists() and _checksum(_read_bytes(waiting)) == present.sha256:
        os.replace(waiting, files.delta)  # noqa: PTH105
        _sync(files.delta.parent)


def _read_manifest(files: Files) -> Manifest:
    try:
        return Manifest.from_json(_read_bytes(files.manifest).decode())
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{files.manifest}: {error}") from error


def _read_bytes(path: Path) -> bytes:
    if (data := _bytes_of(path)) is None:
        raise CheckpointError(
            f"cannot read {path}: there is no such file. Expected a folder that tokenconv has saved"
        )
    return data


def _bytes_of(path: Path) -> bytes | None:
    """The content of a file; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error}. Expected a folder that tokenconv has saved"
        ) from error


def _unshared(value: Tensor) -> Tensor:
    """A plain copy: safetensors takes no shared memory and no strides."""
    return value.detach().to("cpu", copy=True).contiguous()


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_through(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:  # never through a link that a copied folder has brought along
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shape_of(value: Tensor) -> str:
    """Such as ``"7x48"``."""
    return "x".join(str(side) for side in value.shape) or "scalar"


def form_of(value: Tensor) -> str:
    """Such as ``"7x48 float32"``."""
    return f"{shape_of(value)} {str(value.dtype).removeprefix('torch.')}"


def noted(text: str) -> list[float]:
    """The values in a note on a parameter that is not saved."""
    return [float(v) for v in text.partition(":")[2].split()]
