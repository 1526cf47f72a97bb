"""Train a hybrid to segment images, and the same model with attention only to compare it with.

python examples/train_segmentation.py --insert mix_ffn
python examples/train_segmentation.py --model pvt_v2_b0 --decoder unet --insert peg
python examples/train_segmentation.py --data path/to/folder --num-classes 5 --img-size 256
torchrun --nproc-per-node 8 examples/train_segmentation.py --data ADEChallengeData2016 ...

Without --data it segments scenes of handwritten digits that ship with scikit-learn
(training/digits.py). A folder holds {train,val}/{images,masks}; training/masks.py has the other
layouts, training/streams.py shards. --decoder linear and pyramid are for plain ViTs, every other
one is that of segmentation_models_pytorch, for models with a pyramid (and dpt for ViTs).
"""

import argparse
import colorsys
from collections.abc import Mapping, Sequence
from functools import partial
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
from training.data import make_data
from training.digits import MASK_CLASSES, DigitScenes, scenes_of_both
from training.engine import Training, make_accelerator
from training.errors import TrainingError, told_in_one_line
from training.heads import LinearHead, PyramidHead, Segmenter, slide
from training.hybrids import (
    add_model_options,
    backbone_of,
    choose_trained,
    create_model,
    register_hybrid,
)
from training.masks import IGNORED, MaskedImages, Sample, colored, make_sample
from training.settings import Settings
from training.streams import open_shards

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


class ScaleOfItsOwn(v2.Transform):
    """Scale a picture and its mask by a random factor; they are judged at the scale they have.

    Args:
        least: Smallest factor; the largest is its inverse.
    """

    def __init__(self, least: float):
        super().__init__()
        self.least = least

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size that both get."""
        power = 2 * torch.rand(()) - 1
        factor = self.least ** float(power)
        return {"size": [max(1, round(factor * s)) for s in v2.functional.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one of them."""
        return v2.functional.resize(inpt, params["size"])


class DigitMasks:
    """Digit scenes as pictures and masks."""

    def __init__(self, scenes: DigitScenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scenes[index]
        return make_sample(scene.image, scene.mask, len(MASK_CLASSES), f"scene {index}")


def open_data(args: argparse.Namespace) -> tuple[Any, Any, tuple[str, ...]]:
    """Samples to train on, samples to be judged by, and the names of the classes."""
    if args.data is None:
        size = args.img_size[0], args.img_size[-1]
        train, val = map(DigitMasks, scenes_of_both(args.scenes, size))
        return train, val, MASK_CLASSES
    if args.data.endswith(".tar"):
        train, val = open_shards(args, ("train", "val"), is_mask=True)
        count = args.num_classes
    else:
        train, val = (
            MaskedImages(Path(args.data), split, args.num_classes) for split in ("train", "val")
        )
        count = train.num_classes
    names = tuple(args.class_names or map(str, range(count)))
    if len(names) != count:
        raise TrainingError(f"{len(names)} --class-names for {count} classes")
    return train, val, names


def transforms(
    args: argparse.Namespace, config: Mapping[str, Any], classes: int
) -> tuple[Any, Any]:
    """Joint ones of pictures and masks: to train with, and to be judged with at full resolution."""
    size = args.img_size[0], args.img_size[-1]
    finish = [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(config["mean"], config["std"]),
        v2.ToPureTensor(),
    ]
    fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    jitter = args.color_jitter
    augment = [
        ScaleOfItsOwn(args.least_scale),
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        # A mirrored digit is another one, or none.
        *([] if args.data is None else [v2.RandomHorizontalFlip()]),
        v2.ColorJitter(jitter, jitter, jitter),
        *finish,
    ]
    is_stream = args.data is not None and args.data.endswith(".tar")
    check = [partial(_checked, classes)] if is_stream else []
    return v2.Compose([*check, *augment]), v2.Compose([*check, *finish])


def _checked(classes: int, sample: Any) -> Sample:
    image, mask = sample
    return make_sample(image, mask, classes, "a mask of the shards")


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The backbone with a head of ours, or a model of segmentation_models_pytorch.

    Raises:
        TrainingError: If there is no such decoder, or it does not fit the backbone.
    """
    if args.decoder in HEADS:
        return Segmenter(create_model(args, num_classes=0), HEADS[args.decoder], num_classes)
    if any(side % 32 for side in args.img_size):
        raise TrainingError(f"decoders take an --img-size of multiples of 32, got {args.img_size}")
    # It builds the backbone itself, by the name of an architecture of timm's.
    name = f"tu-{register_hybrid(args)}"
    try:
        return smp.create_model(args.decoder, name, encoder_weights=None, classes=num_classes)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(f"no {args.decoder} on {args.model}: {error}") from error


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--decoder", default="pyramid",
        help="linear, pyramid, or one of segmentation_models_pytorch, such as unet or fpn",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR|SHARDS", help="None: digit scenes")
    data.add_argument("--num-classes", type=int, help="where the layout does not say it")
    data.add_argument("--class-names", nargs="+", help="None: numbers")
    data.add_argument("--samples", type=int, help="of an epoch, where shards are read")
    data.add_argument("--scenes", type=int, default=8192, help="how many to train on")
    data.add_argument(
        "--least-scale", type=float, default=0.7, help="of a picture, 0 to 1; the largest is 1/it"
    )
    data.add_argument("--color-jitter", type=float, default=0.2)
    data.add_argument("--val-batch", type=int, help="of a process; None: 1, for any size")
    Settings.add_options(parser.add_argument_group("training"))
    args = parser.parse_args(words)
    args.img_size = args.img_size or [64 if args.data is None else 224]
    if args.val_batch is None and args.data is not None:
        args.val_batch = 1
    return args


def run(args: argparse.Namespace) -> None:
    """Train."""
    settings = Settings.of(args)
    if not 0 < args.least_scale <= 1 or (args.val_batch or 1) < 1:
        raise TrainingError("expected --least-scale in 0 to 1 and --val-batch of 1 or more")
    accelerator = make_accelerator(settings)
    train, val, classes = open_data(args)
    model = make_model(args, len(classes))
    choose_trained(model, args)
    task = Segmentation(classes, (args.img_size[0], args.img_size[-1]))
    config = resolve_model_data_config(backbone_of(model))
    augment, judge = transforms(args, config, len(classes))
    data = make_data(
        train, val, augment, judge,
        settings=settings, accelerator=accelerator, val_batch=args.val_batch,
    )  # fmt: skip
    told = {"task": "segmentation", **vars(args), "classes": classes}
    Training(accelerator, model, task, data, settings, told).run()


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
