"""Train a hybrid to segment images, and the same model with attention only to compare it with.

python examples/train_segmentation.py --insert mix_ffn
python examples/train_segmentation.py --model pvt_v2_b0 --decoder unet --insert peg
python examples/train_segmentation.py --data path/to/folder --num-classes 5 --img-size 256
torchrun --nproc-per-node 8 examples/train_segmentation.py --data ADEChallengeData2016 ...

Without --data it segments scenes of handwritten digits that ship with scikit-learn
(training/digits.py). A folder holds {train,val}/{images,masks}; training/masks.py has the other
layouts. --decoder linear and pyramid are for plain ViTs, every other one is that of
segmentation_models_pytorch, for models with a pyramid (and dpt for ViTs).
"""

import argparse
import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import make_grid
from training.digits import MASK_CLASSES, DigitScenes
from training.engine import Data
from training.heads import LinearHead, PyramidHead, Segmenter, slide
from training.hybrids import add_model_options, create_model
from training.loading import Augmented, EpochSampler, Indexed, make_loader
from training.masks import IGNORED, MaskedImages, Sample, colored
from training.settings import Settings

HEADS = {"linear": LinearHead, "pyramid": PyramidHead}


class Segmentation:
    """Which class every pixel is of: cross entropy, mean IoU, IoU per class, pixel accuracy."""

    best = "miou"

    def __init__(self, classes: tuple[str, ...], window: tuple[int, int]):
        self.classes = classes
        self.window = window
        hues = [colorsys.hsv_to_rgb(i / len(classes), 0.85, 1.0) for i in range(len(classes))]
        self.palette = torch.tensor([(0.1, 0.1, 0.1), *hues[1:]])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum over the pixels that count, and how many they are."""
        images, masks = batch
        total = functional.cross_entropy(
            model(images).float(), masks.long(), ignore_index=IGNORED, reduction="sum"
        )
        return total, (masks != IGNORED).sum()

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Class of every pixel, at full resolution."""
        images, masks = batch
        if images.shape[2:] == self.window:
            return model(images).argmax(1), masks
        return slide(model, images, self.window).argmax(1), masks

    def metrics(self) -> MetricCollection:
        """From one confusion matrix of all pixels of all images."""
        shared: Any = {"num_classes": len(self.classes), "ignore_index": IGNORED,
                       "sync_on_compute": False}  # fmt: skip
        return MetricCollection({
            "miou": MulticlassJaccardIndex(average="macro", **shared),
            "iou": MulticlassJaccardIndex(average="none", **shared),
            "accuracy": MulticlassAccuracy(average="micro", **shared),
        })  # fmt: skip

    def scalars(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """IoU of each class under its name."""
        per_class = dict(zip(self.classes, values["iou"].tolist(), strict=True))
        return {
            "miou": float(values["miou"]),
            "accuracy": float(values["accuracy"]),
            **{f"iou/{name}": value for name, value in per_class.items()},
        }

    def picture(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> Tensor:
        """Images, what is right, and what is predicted, below each other."""
        images, masks = (part[:8].cpu() for part in batch)
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        rows = [(images - low) / (high - low + 1e-6)]
        rows += [colored(ids, self.palette) for ids in (masks, predictions[:8].cpu())]
        return make_grid(torch.cat(rows), nrow=len(images))


class DigitMasks:
    """Digit scenes as pictures and masks."""

    def __init__(self, scenes: DigitScenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scenes[index]
        return tv_tensors.Image(scene.image), tv_tensors.Mask(scene.mask)


def open_data(args: argparse.Namespace) -> tuple[Indexed, Indexed, tuple[str, ...]]:
    """Samples to train on, samples to be judged by, and the names of the classes."""
    if args.data is None:
        size = args.img_size[0], args.img_size[-1]
        train, val = (
            DigitMasks(DigitScenes(split, size=size, length=length))
            for split, length in (("train", args.scenes), ("val", max(args.scenes // 8, 64)))
        )
        return train, val, MASK_CLASSES
    train, val = (MaskedImages(args.data, split, args.num_classes) for split in ("train", "val"))
    assert train.num_classes is not None
    names = args.class_names or map(str, range(train.num_classes))
    return train, val, tuple(names)


def make_data(
    args: argparse.Namespace, settings: Settings, train: Indexed, val: Indexed, config: Any
) -> Data:
    """Loaders with joint transforms of pictures and masks."""
    size = args.img_size[0], args.img_size[-1]
    finish = [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(config["mean"], config["std"]),
        v2.ToPureTensor(),
    ]
    fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    augment = v2.Compose([
        v2.ScaleJitter(size, (args.least_scale, 1 / args.least_scale)),
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        # A mirrored digit is another one, or none.
        *([] if args.data is None else [v2.RandomHorizontalFlip()]),
        v2.ColorJitter(args.color_jitter, args.color_jitter, args.color_jitter),
        *finish,
    ])  # fmt: skip
    batch = settings.batch_size // settings.accumulate
    train_sampler = EpochSampler(len(train), seed=settings.seed, group=settings.batch_size)
    loaders = [
        make_loader(
            Augmented(samples, transform, settings.seed),
            sampler,
            batch_size=size_of_batch,
            workers=settings.workers,
        )
        for samples, sampler, transform, size_of_batch in (
            (train, train_sampler, augment, batch),
            # Images of a folder have many sizes: one at a time, at full resolution.
            (
                val,
                EpochSampler(len(val), seed=None),
                v2.Compose(finish),
                batch if args.data is None else args.val_batch,
            ),
        )
    ]
    return Data(loaders[0], train_sampler, loaders[1])


def make_model(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Any]:
    """The model, and what timm says its pictures are to be like."""
    if args.decoder in HEADS:
        backbone = create_model(args, num_classes=0)
        config = resolve_model_data_config(backbone)
        return Segmenter(backbone, HEADS[args.decoder], num_classes), config
    # smp builds the backbone itself, by the name of an architecture of timm's: so make it one.
    config = resolve_model_data_config(register_hybrid("hybrid_to_segment", args))
    model = smp.create_model(
        args.decoder, "tu-hybrid_to_segment", encoder_weights=None, classes=num_classes
    )
    return model, config


def parse() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument("--decoder", default="pyramid", help="linear, pyramid, or one of smp's")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DIR", help="None: digit scenes")
    data.add_argument("--num-classes", type=int, help="where the layout does not say it")
    data.add_argument("--class-names", nargs="+", help="None: numbers")
    data.add_argument("--scenes", type=int, default=8192, help="how many to train on")
    data.add_argument("--least-scale", type=float, default=0.5, help="smallest of a picture")
    data.add_argument("--color-jitter", type=float, default=0.2)
    data.add_argument("--val-batch", type=int, default=1, help="1 takes pictures of any size")
    Settings.add_options(parser.add_argument_group("training"))
    args = parser.parse_args()
    args.img_size = args.img_size or [64 if args.data is None else 224]
    return args
