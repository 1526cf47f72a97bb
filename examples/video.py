r"""Classify clips on tokens of frames, rows and columns, with a convolution over all three.

python examples/video.py
python examples/video.py --control --out runs/video-control
python examples/video.py --label digit
python examples/video.py --frames 6 --size 24 --clips 1024 --dim 32 --depth 2 --epochs 2 \
    --batch-size 16

A handwritten digit of scikit-learn moves over noise, and leaves on one side to come back on the
other. The class of a clip is the way it goes, which no single frame tells, or with --label digit
the digit. In every MLP of a Transformer over all tokens of the clip is a depthwise convolution over
frames, rows and columns; --control leaves them out.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.utils import make_grid
from train_classification import Classification
from training.data import make_data
from training.digits import digit_splits
from training.engine import Training, make_accelerator
from training.errors import TrainingError, told_in_one_line
from training.settings import Settings

import tokenconv as tc
from tokenconv.layers import DWConv3d

WAYS = {
    "right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0),
}  # fmt: skip
"""Rows and columns of a step."""
LABELS = {"way": tuple(WAYS), "digit": tuple("0123456789")}
_DIGITS = {"train": slice(0, 1300), "val": slice(1300, 1797)}
"""Hardly a writer is in both."""
_SIDE = 16
"""Of a digit, in pixels."""
_MEAN = _DEVIATION = 0.3
"""Of the pixels of a clip, about."""


class MovingDigits:
    """Clips ``(T, H, W)`` in 0 to 1 and their class; the same index is the same clip.

    Args:
        split: ``train`` or ``val``; they share no digit.
        length: How many clips there are.
        frames: Of a clip.
        size: Side of a frame.
        label: What the class says, ``way`` or ``digit``.
    """

    def __init__(self, split: str, length: int, *, frames: int, size: int, label: str):
        found: Any = load_digits()
        self.strokes = (found.images[_DIGITS[split]] / 16).repeat(2, axis=1).repeat(2, axis=2)
        self.digits = found.target[_DIGITS[split]]
        self.split = split
        self.length = length
        self.frames = frames
        self.size = size
        self.label = label

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((tuple(_DIGITS).index(self.split), index))
        which, way = int(rng.integers(len(self.strokes))), int(rng.integers(len(WAYS)))
        canvas = np.zeros((self.size, self.size))
        canvas[:_SIDE, :_SIDE] = self.strokes[which]
        start = rng.integers(self.size, size=2)
        step = np.array(tuple(WAYS.values())[way]) * rng.integers(2, 5)
        moved = [np.roll(canvas, start + time * step, (0, 1)) for time in range(self.frames)]
        noise = rng.uniform(0, 0.4, (self.frames, self.size, self.size))
        clip = torch.from_numpy(np.maximum(moved, noise)).float()
        return clip, way if self.label == "way" else int(self.digits[which])


class MixAct(nn.Module):
    """``act(x + DWConv3d(x))`` in an MLP: the mix-FFN of PVT v2, over frames as well.

    Args:
        dim: Hidden channels of the MLP.
        grid: Frames, rows and columns of the tokens.
        act: The activation that the MLP has.
    """

    def __init__(self, dim: int, grid: tc.TokenGrid, act: nn.Module):
        super().__init__()
        self.grid = grid
        self.conv = DWConv3d(dim, residual=True)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T*H*W, C)``."""
        return self.act(self.conv(x, self.grid))


class ClipClassifier(nn.Module):
    """A Transformer on the patches of all frames.

    Args:
        grid: Frames, rows and columns of the patches.
        patch: Side of a patch.
        dim: Channels.
        depth: Blocks.
        num_classes: Of the clips.
        with_conv: Put a convolution over frames, rows and columns into every MLP.
    """

    def __init__(
        self, grid: tuple[int, int, int], *, patch: int, dim: int, depth: int, num_classes: int,
        with_conv: bool,
    ):  # fmt: skip
        super().__init__()
        self.grid = tc.TokenGrid(grid)
        self.embed = nn.Conv3d(1, dim, (1, patch, patch), stride=(1, patch, patch))
        self.position = nn.Parameter(0.02 * torch.randn(self.grid.num_tokens, dim))
        blocks: list[Any] = [Block(dim, max(1, dim // 16)) for _ in range(depth)]
        if with_conv:
            for block in blocks:
                block.mlp.act = MixAct(block.mlp.fc1.out_features, self.grid, block.mlp.act)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits of clips ``(B, T, H, W)``."""
        x = tc.map_to_tokens(self.embed((clips[:, None] - _MEAN) / _DEVIATION)) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class ClipClassification(Classification):
    """Which class a clip is of."""

    def picture(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> Tensor:
        """A clip per row, with a green end where it was recognised and a red one where not."""
        clips, labels = (part[:8].cpu() for part in batch)
        right = predictions[:8].argmax(1).cpu() == labels
        colors = torch.where(
            right[:, None], torch.tensor([0.1, 0.8, 0.3]), torch.tensor([0.9, 0.2, 0.2])
        )
        ends = colors[:, None, :, None, None].expand(-1, 1, 3, *clips.shape[2:])
        rows = torch.cat([clips[:, :, None].expand(-1, -1, 3, -1, -1), ends], dim=1)
        return make_grid(rows.flatten(0, 1), nrow=rows.shape[1])


def unchanged(sample: tuple[Tensor, int]) -> tuple[Tensor, int]:
    """What a batch is made of: a sample as it is."""
    return sample


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--label", default="way", choices=tuple(LABELS), help="class of a clip")
    parser.add_argument("--control", action="store_true", help="leave out the convolutions")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--size", type=int, default=32, help="side of a frame")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch, divides --size")
    parser.add_argument("--clips", type=int, default=4096, help="how many to train on")
    parser.add_argument("--dim", type=int, default=96, help="channels, a multiple of 16")
    parser.add_argument("--depth", type=int, default=4, help="blocks")
    Settings.add_options(parser.add_argument_group("training"))
    parser.set_defaults(out=Path("runs/video"))
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train; losses and metrics of every epoch."""
    settings = Settings.of(args)
    if min(args.frames, args.clips, args.depth, args.patch) < 1 or args.size < _SIDE:
        raise TrainingError(f"expected a clip, frame, block and pixel at least, --size {_SIDE}")
    if args.size % args.patch or args.dim < 16 or args.dim % 16:
        raise TrainingError("expected --size in multiples of --patch, and --dim of 16")
    accelerator = make_accelerator(settings)
    side, classes = args.size // args.patch, LABELS[args.label]
    model = ClipClassifier(
        (args.frames, side, side), patch=args.patch, dim=args.dim, depth=args.depth,
        num_classes=len(classes), with_conv=not args.control,
    )  # fmt: skip
    train, val = (
        MovingDigits(split, length, frames=args.frames, size=args.size, label=args.label)
        for split, length in digit_splits(args.clips)
    )
    data = make_data(
        train, val, unchanged, unchanged,
        settings=settings, accelerator=accelerator,
    )  # fmt: skip
    task = ClipClassification(classes, mixup=None, smoothing=0.1)
    told = {"task": "video", **vars(args), "classes": classes}
    return Training(accelerator, model, task, data, settings, told).run()


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
