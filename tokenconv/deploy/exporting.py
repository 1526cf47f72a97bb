"""Export a model, compare the file with it, and keep the file only if they agree."""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenconv.deploy.programs import brief, program_of
from tokenconv.deploy.quantization import Calibration, QuantizationReport, keep_float_of, unwrapped
from tokenconv.deploy.sizes import Sizes, sizes_for
from tokenconv.deploy.targets import Run, Target, flat, writer
from tokenconv.errors import ExportError

Images = Callable[[tuple[int, ...]], Tensor]
"""Images of a shape."""
_TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_INT8_TOLERANCE = 0.2


@dataclass(frozen=True)
class Checked:
    """One comparison of the file with the model."""

    shape: tuple[int, ...]
    """Of the images."""
    difference: float
    """The largest one, relative to the largest output of the model."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked; print it to read it."""

    path: Path
    target: Target
    dtype: torch.dtype
    dynamic: tuple[str, ...]
    """What is open: ``batch``, ``hw``."""
    multiple_of: tuple[int, int] | None
    """What H and W are multiples of where they are open."""
    traced: tuple[int, ...]
    """The shape of the images with which the program was made."""
    tolerance: float
    checked: tuple[Checked, ...]
    quantization: QuantizationReport | None = None
    """Which layers have eight bits, if any has."""

    @property
    def difference(self) -> float:
        """The largest of all."""
        return max(one.difference for one in self.checked)

    def __str__(self) -> str:
        opened = " and ".join(self.dynamic) or "nothing"
        steps = ""
        if self.multiple_of is not None:
            rows, cols = self.multiple_of
            steps = f"; sizes from {2 * rows}x{2 * cols} on, in steps of {rows}x{cols}"
        size = self.path.stat().st_size / 2**20 if self.path.exists() else 0.0
        dtype = str(self.dtype)[6:]
        lines = [
            f"{self.path}: {self.target}, {dtype}{' and int8' * bool(self.quantization)}, "
            f"{size:.1f} MiB",
            f"  open: {opened}{steps}",
            *(f"  {line}" for line in str(self.quantization or "").splitlines()),
            f"  largest difference from the model: {self.difference:.1e} of its largest output "
            f"(allowed: {self.tolerance:.0e})",
        ]
        for one in self.checked:
            shape = "x".join(str(side) for side in one.shape)
            lines.append(f"    {shape:<18} {one.difference:.1e}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_size: Sequence[int],
    to: Target | str = Target.ONNX,
    dynamic: Sequence[str] = ("batch",),
    multiple_of: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
    calibration: Tensor | None = None,
    keep_float: Sequence[str] = (),
) -> ExportReport:
    """Export a model that takes images, and check the file against it.

    A copy in evaluation mode is traced; the model itself is not touched. The file is read back as
    its users will read it, run on images of several sizes, and put in place only if all outputs
    agree with the model's. It holds standard operators alone: nothing of tokenconv is needed to run
    it. Call ``fold_`` first to export a hybrid in its simplest form.

    Args:
        model: Any module that takes images ``(B, C, H, W)``, such as a timm model or a hybrid.
        path: The file, ending in ``.onnx``, ``.pt2`` for ``pt2`` and ``aoti``, or ``.pte`` for
            ``executorch``. An older one is replaced.
        input_size: ``(C, H, W)`` of an image.
        to: ``onnx``, ``pt2``, ``aoti`` or ``executorch``; see ``Target``.
        dynamic: What stays open: ``batch``, ``hw`` or both. timm's ViTs take images of any size if
            they were made with ``dynamic_img_size=True``.
        multiple_of: With ``hw``, what H and W are multiples of; None takes it from the patches and
            stages of a timm model.
        batch_size: Images of a batch, where ``batch`` is not open.
        dtype: Convert the copy to it; None keeps the model's own.
        opset: Of an ONNX file; None takes torch's choice.
        tolerance: Largest difference allowed, relative to the largest output; None takes 1e-4 in
            float32, more in 16 bits, 1e-8 in float64, and 0.2 with ``calibration``.
        calibration: Images ``(N, C, H, W)`` in float32, prepared as for the model, to write an ONNX
            file of eight bits: layers with weights compute in int8, with a scale per channel for
            weights, and for activations the range that these images bring forth. Some dozens of
            what the model will see are enough. The file is then compared with the model on these
            images, resized where sizes are open.
        keep_float: With ``calibration``, layers that stay in float: ``depthwise``, ``ends`` (the
            first and the last) or both.

    Returns:
        Which sizes were checked, and the largest difference.

    Raises:
        ExportError: If the model cannot be exported so, or the file does not agree with it; no file
            is left then, and an older one stays.
    """
    target, path = Target.of(to), Path(path)
    int8 = _calibration(calibration, keep_float, target)
    how = writer(target, opset, int8)
    if target == Target.EXECUTORCH and dynamic:
        raise ExportError(
            f"{target} plans its memory for one shape of images: pass dynamic=(), and batch_size"
        )
    if path.suffix != target.suffix:
        raise ExportError(f"{target} is written to a file ending in {target.suffix}, got {path}")
    if not path.parent.is_dir() or path.is_dir():
        raise ExportError(f"{path} cannot be a file: its folder is missing, or it is a folder")
    sizes = sizes_for(model, input_size, dynamic, multiple_of, batch_size)
    if dtype not in (None, *_TOLERANCES):
        raise ExportError(f"expected a dtype of floats to export in, got {dtype}")
    try:
        model = unwrapped(copy.deepcopy(model).eval())
    except RuntimeError as error:  # it keeps what it has computed with gradients
        raise ExportError(
            f"this {type(model).__name__} cannot be copied; run it once under torch.no_grad(), or "
            f"go through model.train().eval(): {brief(error)}"
        ) from error
    if dtype is not None:
        model = model.to(dtype)
    like = _like(model)
    if int8 is not None:
        _check_fit(int8.images, sizes, like)
    images: Images = partial(images_of if int8 is None else int8.resized, like=like)
    if tolerance is None:
        tolerance = _TOLERANCES[like.dtype] if int8 is None else _INT8_TOLERANCE
    # A copy of its own: models may keep what they computed for the last size, as rotary ones do.
    expected = _outputs(copy.deepcopy(model), sizes, images)
    program = program_of(model, images(sizes.traced), sizes)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        try:
            quantization = how.write(program, written)
            run = how.load(written)
        except ExportError:
            raise
        except Exception as error:  # whatever the exporters raise
            raise ExportError(f"cannot be written as {target}: {brief(error)}") from error
        checked = tuple(
            Checked(shape, _difference(run, images(shape), outputs))
            for shape, outputs in expected.items()
        )
        _judge(checked, tolerance, target)
        os.replace(written, path)  # noqa: PTH105  # whole, or not at all
    return ExportReport(
        path, target, like.dtype, sizes.dynamic, sizes.multiple_of, sizes.traced, tolerance,
        checked, quantization,
    )  # fmt: skip


def _calibration(
    images: Tensor | None, keep_float: Sequence[str], target: Target
) -> Calibration | None:
    kept = keep_float_of(keep_float)
    if images is None:
        if kept:
            raise ExportError("keep_float is about files of eight bits: pass calibration as well")
        return None
    if target != Target.ONNX:
        raise ExportError(
            f"calibration is for ONNX files, not for {target}: use quantize_ on the model before"
        )
    if images.ndim != 4 or not len(images):
        raise ExportError(
            f"expected images (N, C, H, W) to calibrate with, one or more, got {(*images.shape,)}"
        )
    return Calibration(images.detach().cpu(), kept)


def _check_fit(images: Tensor, sizes: Sizes, like: Tensor) -> None:
    """Refuse images that the file will not take."""
    if like.dtype != torch.float32 or images.dtype != torch.float32:
        raise ExportError(
            f"files of eight bits are made from models and images in float32, got "
            f"{str(like.dtype)[6:]} and {str(images.dtype)[6:]}"
        )
    channels, *size = images.shape[1:]
    steps = sizes.multiple_of
    wanted = f"{'x'.join(map(str, sizes.checked[0][2:]))}"
    fits = [*size] == [*sizes.checked[0][2:]]
    if steps is not None:
        wanted = f"multiples of {steps[0]}x{steps[1]} (two or more)"
        fits = all(
            side % step == 0 and side >= 2 * step for side, step in zip(size, steps, strict=True)
        )
    if not fits or channels != sizes.traced[1]:
        raise ExportError(
            f"expected images of {sizes.traced[1]} channels and {wanted} pixels to calibrate with, "
            f"got {channels} channels and {'x'.join(map(str, size))}"
        )


def images_of(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random images, always the same ones, of the device and dtype of a tensor."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(like)


def _like(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype that the model wants."""
    found = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    like = next(found, torch.empty(0)).detach()
    if like.is_meta:
        raise ExportError("the model is on the meta device, and has no weights to export")
    if like.dtype not in _TOLERANCES:
        raise ExportError(f"expected a model in float32 or like it, got {like.dtype}")
    return like[:0]


@torch.no_grad()
def _outputs(model: nn.Module, sizes: Sizes, images: Images) -> dict[tuple[int, ...], list[Tensor]]:
    """What the model returns for the images of every size to be checked."""
    found = {}
    for shape in (sizes.traced, *sizes.checked):
        try:
            found[shape] = flat(model(images(shape)))
        except Exception as error:  # as models say that they do not take a size
            size = "x".join(map(str, shape))
            advice = ""
            if "hw" in sizes.dynamic and shape != sizes.checked[0]:
                advice = (
                    "; to leave sizes open, make it so that it takes others (timm: "
                    "dynamic_img_size=True or strict_img_size=False), or say its steps with "
                    "multiple_of; else leave 'hw' out of dynamic"
                )
            raise ExportError(
                f"this {type(model).__name__} does not take images of {size}{advice}: "
                f"{brief(error)}"
            ) from error
    if sizes.traced not in sizes.checked:
        del found[sizes.traced]
    return found


@torch.no_grad()
def _difference(run: Run, images: Tensor, expected: list[Tensor]) -> float:
    """The largest relative one; infinite where there is nothing to compare."""
    try:
        got = run(images)
    except Exception as error:  # of the runtime
        size = "x".join(map(str, images.shape))
        raise ExportError(f"the file does not take images of {size}: {brief(error)}") from error
    return largest_difference(got, expected)


def largest_difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Between outputs, relative to the largest of each; infinite where shapes do not fit."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    found = [_relative(*pair) for pair in zip(got, expected, strict=True)]
    if any(math.isnan(one) for one in found):  # which ``max`` may pass over
        return float("nan")
    return max(found, default=float("inf"))


def _relative(got: Tensor, expected: Tensor) -> float:
    ours, theirs = (t.detach().cpu().double() for t in (got, expected))
    if not theirs.numel():
        return 0.0
    largest = theirs.abs().max().item()
    off = (ours - theirs).abs().max().item()
    if off == 0:
        return 0.0
    return off / largest if largest else float("inf")


def _judge(checked: Sequence[Checked], allowed: float, target: Target) -> None:
    """Refuse a file that does not agree, or whose agreement cannot be told."""
    for one in checked:
        if not one.difference <= allowed:  # NaN included
            size = "x".join(map(str, one.shape))
            raise ExportError(
                f"the {target} file does not agree with the model on images of {size}: it is off "
                f"by {one.difference:.1e} of the largest output, and {allowed:.0e} is allowed; "
                f"nothing was written"
            )
