"""Digit scenes: real handwritten digits over real photographs, composed on the fly.

Several of the handwritten digits that ship with scikit-learn lie at random place, scale and
rotation over a darkened crop of a photograph that ships with scikit-image or scikit-learn. The
class of a scene is its largest digit; its mask says for every pixel which digit covers it. Nothing
is downloaded.

    python -m training.digits scenes.png        # in examples/: a sheet of scenes and masks
"""

import math
import sys
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.utils.data import Dataset

from training.errors import TrainingError

Split = Literal["train", "val", "test"]
CLASSES = tuple("0123456789")
MASK_CLASSES = ("background", *CLASSES)

# The digits are in the order in which their writers wrote them, so that consecutive ranges hardly
# share a writer. No photograph is in two splits either.
_DIGITS = {"train": slice(0, 1100), "val": slice(1100, 1450), "test": slice(1450, 1797)}
_PHOTOS = {
    "train": (
        "chelsea",
        "coffee",
        "rocket",
        "grass",
        "brick",
        "camera",
        "hubble_deep_field",
        "china",
    ),
    "val": ("astronaut", "gravel", "coins"),
    "test": ("flower", "moon", "immunohistochemistry"),
}
_LARGEST = 0.6, 0.8
"""Side of the largest digit, over the shorter side of the scene."""
_OTHERS = 0.3, 0.5
"""Side of every other one, over that of the largest."""
_MOST_OTHERS = 3
_TURN = 0.45
"""Largest angle of a digit, in radians."""
_TRIES = 20
_KEPT = 2**28
"""Bytes of the scenes that a data set keeps."""


class Box(NamedTuple):
    """The smallest rectangle around a digit, in pixels; right and lower edge are behind it."""

    left: int
    top: int
    right: int
    bottom: int
    digit: int


class Scene(NamedTuple):
    """A picture and what is in it."""

    image: Image.Image
    """RGB."""
    mask: Image.Image
    """Ids of one byte: 0 for background, 1 to 10 for the digits 0 to 9."""
    label: int
    """The digit that is largest."""
    boxes: tuple[Box, ...]
    """Of all digits, the largest first."""


class DigitScenes(Dataset[Scene]):
    """Scenes of a split; the same index is the same scene, whoever asks and whenever.

    Scenes are kept in memory as they are composed, up to 256 MiB of them, so that later epochs have
    them at once.

    Args:
        split: ``train``, ``val`` or ``test``; they share neither digits nor photographs.
        size: Rows and columns of a scene.
        length: How many scenes there are.
        seed: Another one gives other scenes of the same digits.
    """

    def __init__(
        self, split: Split, *, size: tuple[int, int] = (64, 64), length: int = 8192, seed: int = 0
    ):
        if split not in _DIGITS:
            raise TrainingError(f"expected split train, val or test, got {split!r}")
        if min(size) < 16 or length < 1:
            raise TrainingError(f"expected a scene of 16x16 or more, got {length} of {size}")
        self.split: Split = split
        self.size = size
        self.length = length
        self.seed = seed
        self._kept: dict[int, Scene] = {}
        self._most_kept = _KEPT // (4 * math.prod(size))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        scene = self._kept.get(index) or self._compose(index)
        if len(self._kept) < self._most_kept:
            self._kept[index] = scene
        return scene

    def _compose(self, index: int) -> Scene:
        rng = np.random.default_rng((self.seed, tuple(_DIGITS).index(self.split), index))
        strokes, labels = _digits(self.split)
        image = _background(self.split, self.size, rng)
        mask = Image.new("L", image.size)
        largest = rng.uniform(*_LARGEST) * min(self.size)
        sides = [largest, *(largest * rng.uniform(*_OTHERS, rng.integers(1, _MOST_OTHERS + 1)))]
        chosen = rng.integers(len(labels), size=len(sides))
        boxes: list[Box] = []
        for which, place in zip(chosen, _places(sides, self.size, rng), strict=True):
            if place is None:
                continue
            cover, corner = _cover(strokes[which], place, rng.uniform(-_TURN, _TURN))
            image.paste(_ink(rng), corner, cover)
            covered = Image.fromarray(np.asarray(cover) > 127)
            mask.paste(int(labels[which]) + 1, corner, covered)
            boxes += _boxes(covered, corner, image.size, int(labels[which]))
        return Scene(image, mask, int(labels[chosen[0]]), tuple(boxes))


def digit_splits(scenes: int) -> Sequence[tuple[Split, int]]:
    """What to train on and what to be judged by, and how many scenes of each."""
    return ("train", scenes), ("val", max(64, scenes // 8))


def scenes_of_both(scenes: int, size: tuple[int, int]) -> list[DigitScenes]:
    """Scenes to train on, and scenes to be judged by."""
    return [DigitScenes(split, size=size, length=length) for split, length in digit_splits(scenes)]


class _Place(NamedTuple):
    row: float
    col: float
    side: float


def _places(
    sides: list[float], size: tuple[int, int], rng: np.random.Generator
) -> list[_Place | None]:
    """Where digits of these sides do not touch each other; None for one that finds no place."""
    found: list[_Place | None] = []
    for side in sides:
        tried = rng.uniform(side / 2, np.subtract(size, side / 2), (_TRIES, 2))
        free = np.ones(_TRIES, dtype=bool)
        for other in filter(None, found):
            distance = np.hypot(tried[:, 0] - other.row, tried[:, 1] - other.col)
            free &= distance > 0.5 * (side + other.side)
        row, col = tried[free.argmax()].tolist()
        found.append(_Place(row, col, side) if free.any() else None)
    return found


def _cover(stroke: Image.Image, place: _Place, angle: float) -> tuple[Image.Image, tuple[int, int]]:
    """How much of every pixel around a digit it covers, and the left upper corner of them."""
    extent = math.ceil(place.side * (math.cos(angle) + abs(math.sin(angle)))) + 2
    left, top = round(place.col - extent / 2), round(place.row - extent / 2)
    scale = stroke.width / place.side  # pixels of the stroke per pixel of the scene
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    col, row, middle = place.col - left, place.row - top, stroke.width / 2
    matrix = cos, sin, middle - cos * col - sin * row, -sin, cos, middle + sin * col - cos * row
    drawn = stroke.transform(
        (extent, extent), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    sharper = 3 * (np.asarray(drawn, dtype=np.int16) - 77)
    return Image.fromarray(sharper.clip(0, 255).astype(np.uint8)), (left, top)


def _boxes(
    covered: Image.Image, corner: tuple[int, int], size: tuple[int, int], digit: int
) -> list[Box]:
    """The box of a digit, as far as it is in the scene; none if it covers nothing."""
    found = covered.getbbox()
    if found is None:
        return []
    (left, right), (top, bottom) = (
        [min(max(found[axis + end] + corner[axis], 0), size[axis]) for end in (0, 2)]
        for axis in (0, 1)
    )
    return [Box(left, top, right, bottom, digit)]


def _ink(rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour that is brighter than any background."""
    red, green, blue = hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.6), 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _background(split: Split, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A crop of a photograph at a random scale."""
    photos = _photos(split)
    photo = photos[rng.integers(len(photos))]
    height, width = size
    largest = min(photo.height / height, photo.width / width)
    scale = math.exp(rng.uniform(math.log(min(1.0, largest)), math.log(min(4.0, largest))))
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = left, top, left + scale * width, top + scale * height
    image = photo.resize((width, height), Image.Resampling.BILINEAR, box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


@cache
def _digits(split: Split) -> tuple[list[Image.Image], np.ndarray]:
    """Strokes of 10x10 pixels with an empty margin, and which digits they are."""
    found: Any = load_digits()
    strokes = np.pad(found.images[_DIGITS[split]] * (255 / 16), ((0, 0), (1, 1), (1, 1)))
    return [Image.fromarray(one.astype(np.uint8)) for one in strokes], found.target[_DIGITS[split]]


@cache
def _photos(split: Split) -> list[Image.Image]:
    """Photographs, with half their brightness."""
    shipped = load_sample_images()
    named = {
        Path(n).stem: picture for n, picture in zip(shipped.filenames, shipped.images, strict=True)
    }
    found = []
    for name in _PHOTOS[split]:
        picture = named[name] if name in named else getattr(skimage.data, name)()
        found.append(
            Image.fromarray(picture).convert("RGB").point([value // 2 for value in range(256)] * 3)
        )
    return found


def _sheet(split: Split, rows: int = 4, cols: int = 8) -> Image.Image:
    """Scenes and, below each row, their masks."""
    scenes = DigitScenes(split, size=(96, 96), length=rows * cols)
    sheet = Image.new("RGB", (cols * 96, rows * 192))
    for index in range(rows * cols):
        row, col = divmod(index, cols)
        scene = scenes[index]
        scene.mask.putpalette([round(255 * value) for i in range(11) for value in _hue(i)])
        sheet.paste(scene.image, (96 * col, 192 * row))
        sheet.paste(scene.mask.convert("RGB"), (96 * col, 192 * row + 96))
    return sheet


def _hue(index: int) -> tuple[float, float, float]:
    return hsv_to_rgb(index / 11, 0.8, 1.0) if index else (0.1, 0.1, 0.1)


if __name__ == "__main__":
    _sheet("train").save(sys.argv[1] if len(sys.argv) > 1 else "scenes.png")
