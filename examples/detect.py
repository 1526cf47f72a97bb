"""Train a detector on a hybrid: Faster R-CNN on the pyramid of a backbone with convolutions in it.

python examples/detect.py
python examples/detect.py --model pvt_v2_b0 --out runs/detect-without
python examples/detect.py --model pvt_v2_b2_mix_ffn --pretrained --img-size 96
python examples/detect.py --img-size 48 --scenes 512 --epochs 10 --batch-size 16 --lr 5e-4

The backbone is a timm model with features_only, the rest is torchvision's. It finds and reads the
digits in digit scenes (training/digits.py), which are composed on the fly, so that their boxes are
known. A box counts as right if its digit is and it covers one of the scene, that no better one has
taken, with an IoU of 0.5 or more. samples.png in the run's folder has boxes that are right in
green, wrong ones in red and those of the scene in grey.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes, make_grid
from training.data import make_data
from training.digits import CLASSES, Scene, scenes_of_both
from training.engine import Training, make_accelerator
from training.errors import TrainingError, told_in_one_line
from training.settings import Settings

import tokenconv.models  # noqa: F401  (registers hybrids with timm)

_WIDTH = 64
"""Channels of the pyramid."""
_MOST = 8
"""Boxes of a scene, at most; fewer are filled up with class 0, the background."""
_FOUND = 16
"""Boxes that are found in a scene, at most."""
_SURE = 0.5
"""Score from which on a box counts."""


class Pyramid(nn.Module):
    """Maps of a timm backbone, all brought to one width by a feature pyramid network.

    Args:
        backbone: Made with ``features_only=True``.
        width: Channels of all maps.
    """

    def __init__(self, backbone: Any, width: int):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), width)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by name, the largest first."""
        return self.fpn({str(level): x for level, x in enumerate(self.backbone(images))})


def make_detector(name: str, pretrained: bool, size: int) -> FasterRCNN:
    """Faster R-CNN on a backbone with several stages.

    Args:
        name: Of a timm architecture, such as ``pvt_v2_b0_mix_ffn``.
        pretrained: Start from timm's weights.
        size: Side of the images.

    Raises:
        TrainingError: If timm has no such backbone.
    """
    try:
        # The getter keeps the model whole, as training saves it.
        backbone: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, feature_cls="getter"
        )
    except (RuntimeError, AttributeError, TypeError, OSError) as error:
        raise TrainingError(f"timm cannot make a backbone of {name}: {error}") from error
    strides = backbone.feature_info.reduction()
    if len(set(strides)) < len(strides):
        raise TrainingError(f"{name} has maps of one size: take a model with a pyramid")
    levels = [str(level) for level in range(len(strides))]
    return FasterRCNN(
        Pyramid(backbone, _WIDTH),
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((2 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(_WIDTH * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, 1 + len(CLASSES)),
        # A scene is small, and has few digits.
        rpn_post_nms_top_n_train=256,
        rpn_post_nms_top_n_test=256,
        box_batch_size_per_image=64,
        box_detections_per_img=_FOUND,
    )


class FoundBoxes(Metric):
    """Share of the boxes that are found, of the found ones that are right, and their mean."""

    right: Tensor
    said: Tensor
    there: Tensor

    def __init__(self):
        super().__init__(sync_on_compute=False)
        for name in ("right", "said", "there"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, found: Tensor, targets: Tensor) -> None:
        """Count.

        Args:
            found: Boxes ``(B, M, 6)``: corners, class and score.
            targets: Boxes ``(B, N, 5)``: corners and class.
        """
        for boxes, own in zip(found, targets, strict=True):
            matches = matched(boxes, own)
            self.right += matches.sum()
            self.said += len(matches)
            self.there += (own[:, 4] > 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Recall, precision and F1."""
        return {
            "recall": self.right / self.there.clamp(min=1),
            "precision": self.right / self.said.clamp(min=1),
            "f1": 2 * self.right / (self.said + self.there).clamp(min=1),
        }


def matched(found: Tensor, targets: Tensor) -> Tensor:
    """Which of the boxes of an image that count, best first, are right.

    Each takes the box of its class with the largest IoU, 0.5 at least, that is left.
    """
    found = found[found[:, 5] >= _SURE]
    found = found[found[:, 5].argsort(descending=True)]
    targets = targets[targets[:, 4] > 0]
    overlap = box_iou(found[:, :4], targets[:, :4]) * (found[:, 4, None] == targets[:, 4])
    right = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    for number in range(len(found) if len(targets) else 0):
        best, which = overlap[number].max(0)
        right[number] = best >= 0.5
        if right[number]:
            overlap[:, which] = 0
    return right


class Detection:
    """Where digits are, and which: the losses of Faster R-CNN, recall and precision."""

    best = "f1"

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of all its losses, which are means over images, and number of images."""
        images, targets = batch
        told = [
            {"boxes": own[own[:, 4] > 0, :4], "labels": own[own[:, 4] > 0, 4].long()}
            for own in targets
        ]
        losses = torch.stack(list(model(list(images), told).values()))
        return losses.sum() * len(images), torch.tensor(len(images), device=images.device)

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes with class and score, filled up to a fixed number, and those of the scenes."""
        images, targets = batch
        found = []
        for one in model(list(images)):
            labels, scores = one["labels"][:, None], one["scores"][:, None]
            boxes = torch.cat([one["boxes"], labels, scores], dim=1)
            found.append(functional.pad(boxes, (0, 0, 0, _FOUND - len(boxes))))
        return torch.stack(found), targets

    def metrics(self) -> MetricCollection:
        """Recall, precision and F1."""
        return MetricCollection({"found": FoundBoxes()})

    def scalars(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """As they are."""
        return {name: float(value) for name, value in values.items()}

    def picture(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> Tensor:
        """Images, four times as large, with boxes."""
        images, targets = (part[:16].cpu() for part in batch)
        drawn = []
        for image, own, found in zip(images, targets, predictions[:16].cpu(), strict=True):
            own = own[own[:, 4] > 0]
            found = found[found[:, 5] >= _SURE]
            found = found[found[:, 5].argsort(descending=True)]
            colors: Any = ["lime" if right else "red" for right in matched(found, own)]
            names = [CLASSES[int(which) - 1] for which in found[:, 4]]
            large = functional.interpolate(image[None], scale_factor=4)[0]
            for boxes, label, color in ((own, None, "grey"), (found, names, colors)):
                if len(boxes):
                    large = draw_bounding_boxes(large, 4 * boxes[:, :4], label, color, width=2)
            drawn.append(large)
        return make_grid(torch.stack(drawn), nrow=4)


def to_tensors(scene: Scene) -> tuple[Tensor, Tensor]:
    """Image in 0 to 1, and boxes ``(8, 5)``: corners, and 1 to 10 for the digits 0 to 9."""
    image = transforms.to_dtype(transforms.to_image(scene.image), torch.float32, scale=True)
    targets = torch.zeros(_MOST, 5)
    for row, (*corners, digit) in enumerate(scene.boxes):
        targets[row] = torch.tensor([*corners, digit + 1])
    return image.as_subclass(Tensor), targets


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="pvt_v2_b0_mix_ffn", help="of timm, with a pyramid")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--img-size", type=int, default=64, help="side of a scene")
    parser.add_argument("--scenes", type=int, default=2048, help="how many to train on")
    Settings.add_options(parser.add_argument_group("training"))
    parser.set_defaults(out=Path("runs/detect"), batch_size=16, lr=3e-4)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train; losses and metrics of every epoch."""
    settings = Settings.of(args)
    if args.img_size < 32 or args.scenes < 1:
        raise TrainingError("expected --img-size of 32 or more and --scenes of 1 or more")
    accelerator = make_accelerator(settings)
    model = make_detector(args.model, args.pretrained, args.img_size)
    size = args.img_size, args.img_size
    train, val = scenes_of_both(args.scenes, size)
    data = make_data(
        train, val, to_tensors, to_tensors,
        settings=settings, accelerator=accelerator,
    )  # fmt: skip
    told = {"task": "detection", **vars(args), "classes": CLASSES}
    return Training(accelerator, model, Detection(), data, settings, told).run()


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
