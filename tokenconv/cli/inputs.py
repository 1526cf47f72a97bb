"""What the commands work on: timm models by name, and photographs."""

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import tokenconv.models  # noqa: F401  so that timm knows hybrids by name
from tokenconv.errors import MeasurementError, UnknownNameError

_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)
"""How timm's models are asked to take images of any size, by family; others have no such word."""
_FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
"""What a photograph may be, whatever its name ends in: Pillow would run Ghostscript for others."""


def build_model(
    name: str,
    img_size: tuple[int, int] | None = None,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    any_size: bool = False,
) -> nn.Module:
    """Make a timm model for an image size.

    Args:
        name: Of the model.
        img_size: Rows and columns; None takes the model's own.
        num_classes: None takes the model's own.
        pretrained: Load its weights.
        any_size: Let it take images of every size, where its family can; ``img_size`` is then
            that of its position embedding.

    Raises:
        UnknownNameError: If timm has no such model.
        MeasurementError: If it cannot be built for this size, or its weights cannot be loaded.
    """
    if not timm.is_model(name):
        raise UnknownNameError("model", name, timm.list_models())
    torch.manual_seed(0)
    try:
        config = timm.get_pretrained_cfg(name)
        kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        own = [{"img_size": img_size}, {}] if img_size else [{}]
        for more, size in product(_ANY_SIZE if any_size else (), own):
            with suppress(TypeError):  # it has no such argument
                return timm.create_model(name, pretrained=pretrained, **kwargs, **more, **size)
        if img_size:
            kwargs["pretrained_cfg_overlay"] = {"input_size": (3, *img_size)}
            if config is not None and config.fixed_input_size:
                kwargs["img_size"] = img_size
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm and the hub raise whatever went wrong below them
        size = f" for images of {img_size[0]}x{img_size[1]}" if img_size else ""
        weights = " with pretrained weights" if pretrained else ""
        raise MeasurementError(f"cannot build {name}{weights}{size}: {error}") from error


def load_images(model: nn.Module, directory: Path | None, batch_size: int) -> Tensor:
    """A batch of photographs, through the model's own timm transform.

    Args:
        model: Says what input it expects.
        directory: Photographs, taken in order of name and repeated to fill the batch; None takes
            the two that ship with scikit-learn.
        batch_size: How many.

    Returns:
        ``(B, C, H, W)``, float32.

    Raises:
        MeasurementError: If there are no photographs, or one cannot be read.
    """
    if directory is None:
        found = _prepared(model, _sample_photographs())
    else:
        found = load_photographs(model, directory, batch_size)
    return found.repeat(math.ceil(batch_size / len(found)), 1, 1, 1)[:batch_size]


def load_photographs(
    model: nn.Module, directory: Path, most: int, input_size: tuple[int, int, int] | None = None
) -> Tensor:
    """Photographs of a folder in order of name, through the model's own timm transform.

    Args:
        model: Says what input it expects.
        directory: Where they are.
        most: How many at most.
        input_size: ``(C, H, W)``; None takes the model's own.

    Returns:
        ``(B, C, H, W)``, float32.

    Raises:
        MeasurementError: If there are none, or one cannot be read.
    """
    return _prepared(model, _read(directory, most), input_size)


def _prepared(
    model: nn.Module,
    photographs: Sequence[Image.Image],
    input_size: tuple[int, int, int] | None = None,
) -> Tensor:
    config = resolve_model_data_config(model)
    if input_size is not None:
        config["input_size"] = input_size
    transform: Any = create_transform(**config, is_training=False)
    return torch.stack([transform(photograph) for photograph in photographs])


def _sample_photographs() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise MeasurementError(
            "the default photographs ship with scikit-learn, which is not installed; "
            "pip install 'tokenconv[demo]', or pass --images DIR"
        ) from error
    return [Image.fromarray(image) for image in load_sample_images().images]


def _read(directory: Path, most: int) -> list[Image.Image]:
    if not directory.is_dir():
        raise MeasurementError(f"{directory} is not a folder of photographs")
    found = (p for p in directory.iterdir() if p.suffix.lower() in _FORMATS and p.is_file())
    paths = sorted(found)[:most]  # no pipe, which would be waited for
    if not paths:
        endings = ", ".join(_FORMATS)
        raise MeasurementError(f"{directory} holds no photographs ({endings})")
    return [_open(path) for path in paths]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=sorted({*_FORMATS.values()})) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
        raise MeasurementError(f"cannot read the image {path}: {error}") from error


def image_size(numbers: Sequence[int] | None) -> tuple[int, int] | None:
    """What ``--img-size`` means: a square, or height and width."""
    if numbers is None:
        return None
    if len(numbers) > 2:
        raise MeasurementError(f"--img-size takes H or H W, got {len(numbers)} numbers")
    return numbers[0], numbers[-1]
