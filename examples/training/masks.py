"""Pictures with a mask of class ids: folders of one's own, Oxford-IIIT Pet, ADE20K, Pascal VOC.

ROOT/{train,val}/{images,masks}/NAME.*        masks are uint8 ids, 255 is ignored
ROOT/annotations/trimaps                      Oxford-IIIT Pet, as its archives unpack
ROOT/annotations/{training,validation}        ADE20K (ADEChallengeData2016)
ROOT/SegmentationClass                        Pascal VOC (VOCdevkit/VOC2012)
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from training.errors import TrainingError
from training.loading import read_picture

IGNORED = 255
Sample = tuple[tv_tensors.Image, tv_tensors.Mask]


@dataclass(frozen=True)
class Pair:
    """A picture and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Layout:
    """How a data set lies on a disk."""

    name: str
    sign: str
    """A path that tells it from others."""
    pairs: Callable[[Path, str], Iterable[Pair]]
    """Of a split, ``train`` or ``val``."""
    ids: np.ndarray
    """From the values in masks, 0 to 255, to class ids."""
    num_classes: int | None
    """None: it is for the user to say."""


class MaskedImages:
    """Pictures ``(3, H, W)`` and masks ``(H, W)`` of a folder, each checked as it is read.

    Args:
        root: Of the data set; see above for the layouts.
        split: ``train`` or ``val``.
        num_classes: None takes what the layout says.

    Raises:
        TrainingError: If the folder has none of the layouts, is empty, or a mask is missing; and,
            when read, if a picture cannot be, its mask has another size, or an id is no class.
    """

    def __init__(self, root: Path, split: str, num_classes: int | None = None):
        found = next((one for one in _LAYOUTS if (root / one.sign).exists()), None)
        if found is None:
            signs = ", ".join(str(root / one.sign) for one in _LAYOUTS)
            raise TrainingError(f"{root} has no layout that is known: expected one of {signs}")
        self.layout = found
        known = num_classes or found.num_classes
        if known is None:
            raise TrainingError(f"masks do not say how many classes {root} has: say --num-classes")
        self.num_classes = known
        self.pairs = list(found.pairs(root, split))
        if not self.pairs:
            raise TrainingError(f"{split} of {root} holds no pictures")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image, mask = (
            read_picture(pair.image, pair.image, "RGB"),
            read_picture(pair.mask, pair.mask, None),
        )
        return make_sample(image, mask, self.num_classes, str(pair.mask), self.layout.ids)


def make_sample(
    image: Image.Image,
    mask: Image.Image,
    num_classes: int,
    name: str,
    ids: np.ndarray | None = None,
) -> Sample:
    """A picture ``(3, H, W)`` and its mask ``(H, W)``, both of bytes.

    Args:
        image: RGB.
        mask: Of bytes.
        num_classes: Ids that it may have, besides what is ignored.
        name: Of the mask, for errors.
        ids: From the values in the mask to class ids; None: they are those already.

    Raises:
        TrainingError: If the mask has another size, or an id is no class.
    """
    if mask.mode not in ("L", "P", "1"):
        raise TrainingError(
            f"{name} has pixels of kind {mask.mode}; expected one byte each, class ids"
        )
    if mask.size != image.size:
        sizes = " and ".join(f"{width}x{height}" for width, height in (image.size, mask.size))
        raise TrainingError(f"{name} and its picture differ in size (width x height): {sizes}")
    values = np.array(mask, dtype=np.uint8)
    values = values if ids is None else ids[values]
    unknown = set(np.unique(values).tolist()) - {*range(num_classes), IGNORED}
    if unknown:
        raise TrainingError(
            f"{name} has ids {sorted(unknown)}; expected 0 to {num_classes - 1}, or {IGNORED} for "
            f"what is ignored"
        )
    return v2.functional.to_image(image), tv_tensors.Mask(torch.from_numpy(values))


# --- layouts ---


def _folder(root: Path, split: str) -> Iterable[Pair]:
    masks, images = (_by_name(root / split / part) for part in ("masks", "images"))
    for own, others, missing in ((images, masks, "mask"), (masks, images, "picture")):
        for name in own.keys() - others.keys():
            folder = root / split / f"{'mask' if missing == 'mask' else 'image'}s"
            raise TrainingError(f"{own[name]} has no {missing} in {folder}")
    return [Pair(image, masks[name]) for name, image in images.items()]


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        other = found.setdefault(path.stem, path)
        if other != path:
            raise TrainingError(f"{other} and {path.name} have one name: which is meant?")
    return found


def _pet(root: Path, split: str) -> Iterable[Pair]:
    names = {"train": "trainval", "val": "test"}
    for name in _listed(root / "annotations" / f"{names[split]}.txt"):
        trimap = root / "annotations" / "trimaps" / f"{name}.png"
        yield Pair(root / "images" / f"{name}.jpg", trimap)


def _listed(path: Path) -> Iterator[str]:
    """Names at the beginning of lines, which lead out of no folder."""
    for line in path.read_text().splitlines():
        if line.strip():
            name = line.split()[0]
            if Path(name).name != name:
                raise TrainingError(f"{path} lists {name}; expected names without a folder")
            yield name


def _ade20k(root: Path, split: str) -> Iterable[Pair]:
    name = {"train": "training", "val": "validation"}[split]
    for mask in sorted((root / "annotations" / name).glob("*.png")):
        yield Pair(root / "images" / name / f"{mask.stem}.jpg", mask)


def _voc(root: Path, split: str) -> Iterable[Pair]:
    for name in _listed(root / "ImageSets" / "Segmentation" / f"{split}.txt"):
        mask = root / "SegmentationClass" / f"{name}.png"
        yield Pair(root / "JPEGImages" / f"{name}.jpg", mask)


def _ids(**changed: int) -> np.ndarray:
    """Values as they are, but for some."""
    ids = np.arange(256, dtype=np.uint8)
    for value, new in changed.items():
        ids[int(value[1:])] = new
    return ids


_SHIFTED = np.roll(np.arange(256, dtype=np.uint8), 1)  # 0, what has no class, becomes 255
_LAYOUTS = (
    Layout("folder", "train/masks", _folder, _ids(), None),
    # Pet, background, and a border between them that belongs to neither.
    Layout("Oxford-IIIT Pet", "annotations/trimaps", _pet, _ids(_2=0, _3=IGNORED), 2),
    Layout("ADE20K", "annotations/training", _ade20k, _SHIFTED, 150),
    Layout("Pascal VOC", "SegmentationClass", _voc, _ids(), 21),
)


def colored(ids: Tensor, palette: Tensor) -> Tensor:
    """Ids ``(B, H, W)`` as colours ``(B, 3, H, W)``; what is ignored is white."""
    colors = torch.cat([palette, torch.ones(256 - len(palette), 3)])
    return colors[ids.long()].permute(0, 3, 1, 2)
