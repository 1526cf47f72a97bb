"""Segmentation heads for plain Vision Transformers, and evaluation of images larger than a crop.

segmentation_models_pytorch has decoders for pyramids; for tokens of a single stride it has one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from training.errors import TrainingError


class LinearHead(nn.Module):
    """A linear layer on each map; their logits are brought to the size of the first, and added.

    Args:
        dims: Widths of the maps: that of a plain ViT's last block, or those of a pyramid's stages.
        num_classes: Channels that come out.
    """

    layers = 1

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        self.classifiers = nn.ModuleList(
            nn.Sequential(LayerNorm2d(dim), nn.Conv2d(dim, num_classes, 1)) for dim in dims
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps ``(B, C, H, W)`` to logits ``(B, classes, H, W)`` of the first one's size."""
        logits = [layer(x) for layer, x in zip(self.classifiers, maps, strict=True)]
        return sum(
            (functional.interpolate(x, logits[0].shape[2:], mode="bilinear") for x in logits[1:]),
            start=logits[0],
        )


class PyramidHead(nn.Module):
    """A pyramid from four layers of a plain ViT, decoded by the MLP of SegFormer.

    The maps are brought to 4, 2, 1 and 1/2 times their size by transposed convolutions and pooling
    (ViTDet, https://arxiv.org/abs/2203.16527), then each goes through a linear layer, all are
    brought to the size of the largest, and one more linear layer mixes them (SegFormer,
    https://arxiv.org/abs/2105.15203).

    Args:
        dims: Widths of the four maps.
        num_classes: Channels that come out.
        dim: Width of the decoder.
    """

    layers = 4

    def __init__(self, dims: Sequence[int], num_classes: int, dim: int = 128):
        super().__init__()
        first, second, third, fourth = dims
        self.levels = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(first, first // 2, 2, stride=2),
                LayerNorm2d(first // 2),
                nn.GELU(),
                nn.ConvTranspose2d(first // 2, first // 4, 2, stride=2),
                nn.Conv2d(first // 4, dim, 1),
            ),
            nn.Sequential(
                nn.ConvTranspose2d(second, second // 2, 2, stride=2),
                nn.Conv2d(second // 2, dim, 1),
            ),
            nn.Conv2d(third, dim, 1),
            nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(fourth, dim, 1)),
        ])  # fmt: skip
        self.mix = nn.Sequential(nn.Conv2d(4 * dim, dim, 1), LayerNorm2d(dim), nn.GELU())
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps ``(B, C, H, W)`` to logits ``(B, classes, 4 H, 4 W)``."""
        levels = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        size = levels[0].shape[2:]
        levels = [functional.interpolate(x, size, mode="bilinear") for x in levels]
        return self.classifier(self.mix(torch.cat(levels, dim=1)))


class Segmenter(nn.Module):
    """A timm model and a head.

    Args:
        backbone: Has ``forward_intermediates``: all of timm's plain Transformers and most others.
        head: Given maps of equal distance in depth, or those of all stages of a pyramid.
        num_classes: Channels that come out.

    Raises:
        TrainingError: If the head does not take what the backbone has.
    """

    def __init__(
        self, backbone: nn.Module, head: type[LinearHead] | type[PyramidHead], num_classes: int
    ):
        super().__init__()
        if not hasattr(backbone, "forward_intermediates"):
            raise TrainingError(
                f"{type(backbone).__name__} gives no maps of its layers: use a decoder"
            )
        infos: Any = backbone.feature_info
        depth = len(infos)
        self.indices = [(i + 1) * depth // head.layers - 1 for i in range(head.layers)]
        if depth < head.layers:
            raise TrainingError(
                f"{head.__name__} needs {head.layers} blocks, the model has {depth}"
            )
        if len({info["reduction"] for info in infos}) > 1:
            if head is PyramidHead:
                raise TrainingError(
                    f"{type(backbone).__name__} is a pyramid: use the linear head or a decoder"
                )
            self.indices = list(range(depth))
        self.backbone = backbone
        self.head = head([infos[i]["num_chs"] for i in self.indices], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, classes, H, W)``."""
        backbone: Any = self.backbone
        maps = backbone.forward_intermediates(
            images, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return functional.interpolate(self.head(maps), images.shape[2:], mode="bilinear")


def slide(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Logits of whole images from windows that overlap, averaged where they do.

    Args:
        model: From ``(B, 3, h, w)`` to ``(B, classes, h, w)``.
        images: ``(B, 3, H, W)``; what is smaller than a window is padded with zeros for it.
        window: Rows and columns that the model is given.
        stride: Between windows; None takes two thirds of the window.

    Returns:
        ``(B, classes, H, W)``.
    """
    (height, width), (rows, cols) = images.shape[2:], window
    down, right = stride or (max(1, 2 * rows // 3), max(1, 2 * cols // 3))
    padded = functional.pad(images, (0, max(0, cols - width), 0, max(0, rows - height)))
    areas = [
        (..., slice(top, top + rows), slice(left, left + cols))
        for top in _starts(padded.shape[2], rows, down)
        for left in _starts(padded.shape[3], cols, right)
    ]
    # Processes that share a model (FSDP) have to call it equally often, whatever their pictures.
    counts: Any = gather(torch.tensor([len(areas)], device=images.device))
    total, count = None, None
    for number in range(int(counts.max())):
        area = areas[min(number, len(areas) - 1)]
        logits = model(padded[area])
        if number >= len(areas):
            continue
        if total is None or count is None:
            total = logits.new_zeros(*logits.shape[:2], *padded.shape[2:])
            count = logits.new_zeros(padded.shape[2:])
        total[area] += logits
        count[area] += 1
    assert total is not None
    assert count is not None
    return (total / count)[..., :height, :width]


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last ends at the end."""
    last = length - window
    return [*range(0, last, stride), last]
