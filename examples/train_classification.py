"""Train a hybrid to classify images, and the same model with attention only to compare it with.

python examples/train_classification.py --insert mix_ffn
python examples/train_classification.py --insert mix_ffn --control --out runs/control
python examples/train_classification.py --data path/to/folder --model pvt_v2_b0 --insert peg
accelerate launch examples/train_classification.py --insert mix_ffn --precision bf16

Without --data it learns which digit is the largest in scenes of handwritten digits that ship with
scikit-learn (training/digits.py). --data is a folder with {train,val}/CLASS/*.jpg, a data set
of Hugging Face (hfds/NAME) or the shards of a WebDataset: "/data/{split}-*.tar"
(training/streams.py). tensorboard --logdir runs shows curves and pictures.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.data.readers import create_reader
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.utils import make_grid
from training.data import make_data
from training.digits import CLASSES, DigitScenes, scenes_of_both
from training.engine import Training, make_accelerator
from training.errors import TrainingError, told_in_one_line
from training.hybrids import add_model_options, choose_trained, create_model
from training.loading import read_picture
from training.settings import Settings
from training.streams import open_shards

Sample = tuple[Image.Image, int]


class Classification:
    """Which class an image is of: cross entropy, and the share of images that are right."""

    best = "top1"

    def __init__(self, classes: tuple[str, ...], mixup: Mixup | None, smoothing: float):
        self.classes = classes
        self.mixup = mixup
        self.smoothing = smoothing

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropies, and number of images."""
        images, labels = batch
        smoothing = self.smoothing
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)  # labels smoothed and mixed: (B, classes)
            smoothing = 0.0
        logits = model(images)
        total = functional.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=smoothing
        )
        return total, torch.tensor(len(images), device=images.device)

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels."""
        images, labels = batch
        return model(images).float(), labels

    def metrics(self) -> MetricCollection:
        """Shares of images whose class is the first of the answers, or one of the first five."""
        count = len(self.classes)
        found: dict[str, Any] = {
            "top1": MulticlassAccuracy(count, average="micro", sync_on_compute=False)
        }
        if count > 5:
            found["top5"] = MulticlassAccuracy(
                count, average="micro", top_k=5, sync_on_compute=False
            )
        return MetricCollection(found)

    def scalars(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """As they are."""
        return {name: float(value) for name, value in values.items()}

    def picture(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> Tensor:
        """Images framed green where they were recognised, and red where not."""
        images, labels = (part[:16].cpu() for part in batch)
        right = predictions[:16].argmax(1).cpu() == labels
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = functional.pad((images - low) / (high - low + 1e-6), (3, 3, 3, 3))
        colors = torch.where(
            right[:, None], torch.tensor([0.1, 0.8, 0.3]), torch.tensor([0.9, 0.2, 0.2])
        )
        frame = torch.ones_like(images[:1, :1])
        frame[:, :, 3:-3, 3:-3] = 0
        return make_grid(images * (1 - frame) + colors[:, :, None, None] * frame, nrow=4)


class DigitClasses:
    """Digit scenes as pictures and the class of their largest digit."""

    def __init__(self, scenes: DigitScenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scenes[index]
        return scene.image, scene.label


class Pictures:
    """What one of timm's readers reads; a picture that cannot be read is an error, not skipped."""

    def __init__(self, name: str, root: str, split: str):
        try:
            self.reader: Any = create_reader(name, root=root, split=split)
        except Exception as error:  # whatever the library behind it raises
            raise TrainingError(f"cannot read {split} of {name or root}: {error}") from error
        if not len(self.reader):
            raise TrainingError(f"{split} of {name or root} holds no pictures")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        found, label = self.reader[index]
        return read_picture(found, self.reader.filename(index, absolute=True), "RGB"), int(label)


def open_data(args: argparse.Namespace) -> tuple[Any, Any, tuple[str, ...]]:
    """Samples to train on, samples to be judged by, and the names of the classes."""
    if args.data is None:
        size = args.img_size[0], args.img_size[-1]
        train, val = map(DigitClasses, scenes_of_both(args.scenes, size))
        return train, val, CLASSES
    if args.data.endswith(".tar"):
        train, val = open_shards(args, args.splits, is_mask=False)
        return train, val, tuple(map(str, range(args.num_classes)))
    is_folder = Path(args.data).is_dir()
    if not is_folder and not args.data.lower().startswith("hfds/"):
        raise TrainingError(
            f"--data {args.data} is no folder; expected one, shards that end in .tar, or hfds/NAME "
            f"for a data set of Hugging Face"
        )
    name, root = ("", args.data) if is_folder else (args.data, args.data_root)
    roots = [_split_folder(root, split) if is_folder else root for split in args.splits]
    train, val = (
        Pictures(name, root, split) for root, split in zip(roots, args.splits, strict=True)
    )
    return train, val, _classes(args, train, val)


def _split_folder(root: str, split: str) -> str:
    folder = Path(root) / split
    if not folder.is_dir():
        raise TrainingError(f"expected a folder {folder} with a folder of pictures per class")
    return str(folder)


def _classes(args: argparse.Namespace, train: Pictures, val: Pictures) -> tuple[str, ...]:
    names, others = (getattr(one.reader, "class_to_idx", None) for one in (train, val))
    if names != others:
        missing = sorted(set(names or ()) ^ set(others or ()))
        raise TrainingError(f"classes that are in one split of {args.data} only: {missing}")
    if names:
        return tuple(sorted(names, key=lambda name: names[name]))
    if args.num_classes is None:
        raise TrainingError(f"{args.data} does not name its classes: say --num-classes")
    return tuple(map(str, range(args.num_classes)))


def transforms(args: argparse.Namespace, model: nn.Module, classes: int) -> tuple[Any, Any]:
    """Those of timm for the model: to train with, and to be judged with.

    Raises:
        TrainingError: If timm does not take an option.
    """
    config = resolve_model_data_config(model)
    try:
        augment: Any = create_transform(
            config["input_size"],
            is_training=True,
            scale=(args.least_crop, 1.0),
            hflip=0.0 if args.data is None else 0.5,  # a mirrored digit is another one, or none
            color_jitter=args.color_jitter,
            auto_augment=args.auto_augment,
            re_prob=args.random_erasing,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise TrainingError(f"timm has no --auto-augment {args.auto_augment}: {error}") from error
    judge: Any = create_transform(**config, is_training=False)
    return partial(_transformed, augment, classes), partial(_transformed, judge, classes)


def _transformed(transform: Any, classes: int, sample: Sample) -> tuple[Tensor, int]:
    image, label = sample
    if not 0 <= label < classes:
        raise TrainingError(f"a picture is of class {label}; expected 0 to {classes - 1}")
    return transform(image), label


def add_augmentations(group: argparse._ArgumentGroup) -> None:
    """What ``transforms`` and ``make_task`` do to pictures and labels."""
    group.add_argument("--least-crop", type=float, default=0.7, help="smallest share of an image")
    group.add_argument("--color-jitter", type=float, default=0.0, help="strength, such as 0.4")
    group.add_argument("--auto-augment", help="such as rand-m9-mstd0.5, instead of colour jitter")
    group.add_argument("--random-erasing", type=float, default=0.0, help="probability")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha of mixup")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha of cutmix")
    group.add_argument("--smoothing", type=float, default=0.1, help="of labels")


def make_task(args: argparse.Namespace, classes: tuple[str, ...]) -> Classification:
    """To tell these classes, with mixed images if that was asked for."""
    mixup = None
    if args.mixup or args.cutmix:
        if (args.batch_size // args.accumulate) % 2:
            raise TrainingError("--mixup and --cutmix mix pairs: take parts of an even size")
        mixup = Mixup(
            args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=len(classes)
        )
    return Classification(classes, mixup, args.smoothing)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR|NAME|SHARDS", help="None: digit scenes")
    data.add_argument("--data-root", metavar="DIR", help="of what is no folder of classes")
    data.add_argument("--splits", nargs=2, default=["train", "val"], metavar=("TRAIN", "VAL"))
    data.add_argument("--num-classes", type=int, help="where the data do not name them")
    data.add_argument("--samples", type=int, help="of an epoch, where shards are read")
    data.add_argument("--scenes", type=int, default=8192, help="how many to train on")
    add_augmentations(data)
    Settings.add_options(parser.add_argument_group("training"))
    args = parser.parse_args(words)
    if args.data is None and args.img_size is None:
        args.img_size = [64]
    return args


def run(args: argparse.Namespace) -> None:
    """Train."""
    settings = Settings.of(args)
    accelerator = make_accelerator(settings)
    train, val, classes = open_data(args)
    model = create_model(args, len(classes))
    choose_trained(model, args)
    task = make_task(args, classes)
    augment, judge = transforms(args, model, len(classes))
    data = make_data(
        train, val, augment, judge,
        settings=settings, accelerator=accelerator,
    )  # fmt: skip
    told = {"task": "classification", **vars(args), "classes": classes}
    Training(accelerator, model, task, data, settings, told).run()


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
