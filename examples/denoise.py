r"""Take noise out of photographs with a U of attention in windows and convolutional feed-forwards.

python examples/denoise.py
python examples/denoise.py --block mlp --out runs/denoise-mlp
python examples/denoise.py --data path/to/folder --size 128 --dim 48
python examples/denoise.py --size 32 --crops 512 --dim 16 --blocks 1 --epochs 8 --batch-size 8

--block is the feed-forward of every block: gdfn of Restormer, uformer_leff of Uformer, or mlp, the
control without convolution. Attention sees windows of 8x8 pixels, as in Uformer. Training takes
random crops of the photographs that ship with scikit-image, or of all in DATA/train; it is judged
by crops of others, or of those in DATA/val. samples.png in the run's folder has, below each other,
crops with noise, without it as the network says, and as they are; history.json the PSNR of both.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import skimage.data
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid
from training.data import make_data
from training.engine import Training, make_accelerator
from training.errors import TrainingError, told_in_one_line
from training.loading import pictures_in, read_picture
from training.settings import Settings

import tokenconv as tc

BLOCKS = ("gdfn", "uformer_leff", "mlp")
PHOTOS = {
    "train": ("astronaut", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry"),
    "val": ("chelsea", "camera"),
}
_WINDOW = 8
"""Side of a window, in pixels of its level."""


class Block(nn.Module):
    """Attention in windows, then a feed-forward; each behind a norm, and added to its input.

    Args:
        dim: Channels.
        ffn: Name of the feed-forward, one of ``tokenconv.list_blocks()``.
    """

    def __init__(self, dim: int, ffn: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, max(1, dim // 16), batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = tc.create_block(ffn, dim)

    def forward(self, fmap: Tensor) -> Tensor:
        """Maps ``(B, C, H, W)``; H and W are multiples of the window."""
        height, width = fmap.shape[2:]
        windows = rearrange(
            fmap, "b c (y h) (x w) -> (b y x) (h w) c", h=_WINDOW, w=_WINDOW
        )  # fmt: skip
        normed = self.norm1(windows)
        windows = windows + self.attn(normed, normed, normed, need_weights=False)[0]
        tokens = rearrange(
            windows, "(b y x) (h w) c -> b (y h x w) c",
            y=height // _WINDOW, x=width // _WINDOW, h=_WINDOW,
        )  # fmt: skip
        tokens = tokens + self.ffn(self.norm2(tokens), height, width)
        return tc.tokens_to_map(tokens, height, width)


class Denoiser(nn.Module):
    """A U of two levels that says what to add to a picture; nothing before it is trained.

    Args:
        dim: Channels of the upper level; the lower one has twice as many.
        blocks: How many there are on the way down, below, and on the way up.
        ffn: Their feed-forward.
    """

    def __init__(self, dim: int, blocks: int, ffn: str):
        super().__init__()

        def some(width: int) -> nn.Sequential:
            return nn.Sequential(*(Block(width, ffn) for _ in range(blocks)))

        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        self.down = some(dim)
        self.smaller = nn.Conv2d(dim, 2 * dim, 2, stride=2)
        self.below = some(2 * dim)
        self.larger = nn.ConvTranspose2d(2 * dim, dim, 2, stride=2)
        self.join = nn.Conv2d(2 * dim, dim, 1)
        self.up = some(dim)
        self.head = nn.Conv2d(dim, 3, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, noisy: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)``; H and W are multiples of 16."""
        upper = self.down(self.stem(noisy))
        lower = self.larger(self.below(self.smaller(upper)))
        return noisy + self.head(self.up(self.join(torch.cat([upper, lower], dim=1))))


class PSNR(PeakSignalNoiseRatio):
    """Of one of several versions of a picture, cut off at black and white.

    Args:
        which: Index of the version.
    """

    def __init__(self, which: int):
        super().__init__(data_range=(0.0, 1.0), sync_on_compute=False)
        self.which = which

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add pictures.

        Args:
            preds: Versions ``(B, V, 3, H, W)``.
            target: Pictures as they are, ``(B, 3, H, W)``.
        """
        super().update(preds[:, self.which], target)


class Denoising:
    """What a photograph is without its noise: mean absolute error, and PSNR before and after."""

    best = "psnr"

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the absolute errors, and number of values."""
        noisy, clean = batch
        total = functional.l1_loss(model(noisy).float(), clean, reduction="sum")
        return total, torch.tensor(clean.numel(), device=clean.device)

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The picture before and after, and as it is."""
        noisy, clean = batch
        return torch.stack([noisy, model(noisy).float()], dim=1), clean

    def metrics(self) -> MetricCollection:
        """PSNR before and after."""
        # Metrics of one class would share what they count.
        return MetricCollection(
            {"psnr_before": PSNR(0), "psnr": PSNR(1)}, compute_groups=False
        )  # fmt: skip

    def scalars(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """In dB."""
        return {name: float(value) for name, value in values.items()}

    def picture(self, batch: tuple[Tensor, Tensor], predictions: Tensor) -> Tensor:
        """Pictures with noise, without it, and as they are, below each other."""
        rows = torch.cat([*predictions[:8].unbind(1), batch[1][:8]])
        return make_grid(rows.cpu().clamp(0, 1), nrow=min(8, len(predictions)))


class Crops:
    """Photographs, again and again.

    Args:
        photos: At least one.
        length: How many crops are taken of them in an epoch.
    """

    def __init__(self, photos: Sequence[Image.Image], length: int):
        self.photos = photos
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Image.Image:
        return self.photos[index % len(self.photos)]


def read_photos(data: Path | None, split: str, size: int) -> list[Image.Image]:
    """The photographs of a split.

    Raises:
        TrainingError: If there are none, or one is smaller than a crop.
    """
    if data is None:
        names = PHOTOS[split]
        photos = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in names]
    else:
        paths = pictures_in(data / split)
        names = tuple(map(str, paths))
        photos = [read_picture(path, path, "RGB") for path in paths]
    if not photos:
        raise TrainingError(f"no pictures in {data}/{split}")
    for name, photo in zip(names, photos, strict=True):
        if min(photo.size) < size:
            raise TrainingError(f"{name} of {photo.size} pixels is smaller than --size {size}")
    return photos


def noisy_crop(size: int, sigma: float, photo: Image.Image) -> tuple[Tensor, Tensor]:
    """A random crop with Gaussian noise, and the crop.

    Args:
        size: Side of the crop.
        sigma: Standard deviation of the noise, of values up to 255.
        photo: In RGB.
    """
    left, top = (random.randint(0, extent - size) for extent in photo.size)
    crop = transforms.to_image(photo.crop((left, top, left + size, top + size)))
    clean = transforms.to_dtype(crop, torch.float32, scale=True).as_subclass(Tensor)
    return clean + sigma / 255 * torch.randn(clean.shape), clean


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--block", default="gdfn", choices=BLOCKS, help="feed-forward")
    parser.add_argument("--dim", type=int, default=32, help="channels, a multiple of 16")
    parser.add_argument("--blocks", type=int, default=2, help="on each of three ways")
    parser.add_argument("--data", type=Path, metavar="DIR", help="{train,val}/*.jpg")
    parser.add_argument("--size", type=int, default=64, help="side of a crop, a multiple of 16")
    parser.add_argument("--crops", type=int, default=2048, help="of an epoch")
    parser.add_argument("--sigma", type=float, default=25.0, help="of the noise; white is 255")
    Settings.add_options(parser.add_argument_group("training"))
    parser.set_defaults(out=Path("runs/denoise"), batch_size=16, lr=3e-3)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train; losses and metrics of every epoch."""
    settings = Settings.of(args)
    for name in ("size", "dim"):
        if getattr(args, name) < 1 or getattr(args, name) % 16:
            raise TrainingError(f"expected --{name} to be a multiple of 16")
    if min(args.crops, args.blocks) < 1 or args.sigma <= 0:
        raise TrainingError("expected --crops, --blocks and --sigma above 0")
    accelerator = make_accelerator(settings)
    model = Denoiser(args.dim, args.blocks, args.block)
    train, val = (
        Crops(read_photos(args.data, split, args.size), length)
        for split, length in (("train", args.crops), ("val", max(16, args.crops // 8)))
    )
    crop = partial(noisy_crop, args.size, args.sigma)
    data = make_data(
        train, val, crop, crop,
        settings=settings, accelerator=accelerator,
    )  # fmt: skip
    return Training(accelerator, model, Denoising(), data, settings, vars(args)).run()


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
