"""Use what was trained: the classes of pictures as a table, or their masks as overlays.

python examples/predict.py runs/train picture.jpg folder_of_pictures
python examples/predict.py runs/segment picture.jpg --out overlays

The model is built anew, as training built it and with the same base weights, and then given the
plan and the delta that training kept: the few numbers that were added or trained. Segmentation
writes NAME.png: the picture with its mask on top, and the names of the classes that are in it.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import train_segmentation
from accelerate.utils import set_seed
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import v2
from training.checkpoints import last
from training.errors import TrainingError, told_in_one_line
from training.heads import slide
from training.hybrids import backbone_of, create_model
from training.loading import pictures_in, read_picture

import tokenconv as tc

_LINE = 14
"""Pixels of a line of the legend."""


def load_run(folder: Path) -> tuple[nn.Module, argparse.Namespace]:
    """The model of a run with the best weights of it, and what the run was told.

    Raises:
        TrainingError: If the folder holds no run, or none that has finished an epoch.
        CheckpointError: If the base has other weights than it was trained on.
    """
    try:
        args = argparse.Namespace(**json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"{folder} holds no run: {error}") from error
    try:
        return _model_of(folder, args), args
    except (TrainingError, tc.TokenConvError):
        raise
    except Exception as error:  # whatever settings of no run make torch raise
        raise TrainingError(f"{folder} holds no run that can be used: {error!r}") from error


def _model_of(folder: Path, args: argparse.Namespace) -> nn.Module:
    """The model that a run has told of, with the weights that it has kept."""
    task = vars(args).get("task")
    if task not in ("classification", "segmentation"):
        raise TrainingError(f"{folder} is a run for {task}, not for classification or segmentation")
    weights = last(folder / "weights")
    if weights is None:
        raise TrainingError(f"{folder} has no weights yet: no epoch has ended")
    is_hybrid = (weights / "plan.json").exists()
    if is_hybrid:
        args.insert, args.control = [], False
    set_seed(args.seed)  # a base without pretrained weights has those of its seed
    if args.task == "classification":
        model = create_model(args, len(args.classes))
    else:
        model = train_segmentation.make_model(args, len(args.classes))
    if is_hybrid:
        tc.load_(backbone_of(model), weights)
        head = weights / "head.safetensors"
        if head.exists():
            model.load_state_dict(load_file(head), strict=False)
    else:
        model.load_state_dict(load_file(weights / "model.safetensors"))
    return model.eval()


def pictures(paths: Iterable[Path]) -> list[Path]:
    """Pictures, and those in folders.

    Raises:
        TrainingError: If there is none.
    """
    found = [one for path in paths for one in (pictures_in(path) if path.is_dir() else [path])]
    if not found:
        raise TrainingError(f"no pictures in {', '.join(map(str, paths))}")
    return found


@torch.inference_mode()
def classify(model: nn.Module, classes: Sequence[str], paths: Sequence[Path]) -> None:
    """Print the two most probable classes of every picture."""
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    width = max(len(str(path)) for path in paths)
    print(f"{'picture':{width}}  {'class':>12} {'p':>6}  {'or':>12} {'p':>6}")
    for path in paths:
        image = transform(read_picture(path, path, "RGB"))
        best = model(image[None]).softmax(1)[0].topk(min(2, len(classes)))
        cells = [f"{classes[i]:>12} {p:6.3f}" for p, i in zip(*best, strict=True)]
        print(f"{path!s:{width}}  {'  '.join(cells)}")


@torch.inference_mode()
def segment(model: nn.Module, args: argparse.Namespace, paths: Sequence[Path], out: Path) -> None:
    """Write an overlay of every picture, and print what it shows."""
    config = resolve_model_data_config(backbone_of(model))
    normalize = v2.Normalize(config["mean"], config["std"])
    window = args.img_size[0], args.img_size[-1]
    task = train_segmentation.Segmentation(args.classes, window)
    targets = [out / f"{path.stem}.png" for path in paths]
    if len(set(targets)) < len(targets):
        raise TrainingError("pictures of one name would have one overlay: predict them one by one")
    if taken := {one.resolve() for one in targets} & {one.resolve() for one in paths}:
        raise TrainingError(f"{min(taken)} would be overwritten: take another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path, target in zip(paths, targets, strict=True):
        image = v2.functional.to_dtype(
            v2.functional.to_image(read_picture(path, path, "RGB")), torch.float32, scale=True
        )
        ids = slide(model, normalize(image)[None], window).argmax(1)[0]
        shares = torch.bincount(ids.flatten(), minlength=len(args.classes)) / ids.numel()
        overlay(image, ids, shares, args.classes, task.palette).save(target)
        names = [f"{args.classes[i]} {shares[i]:.1%}" for i in shares.argsort(descending=True)[:5]]
        print(f"{target}  {', '.join(n for n in names if not n.endswith(' 0.0%'))}")


def overlay(
    image: Tensor, ids: Tensor, shares: Tensor, classes: Sequence[str], palette: Tensor
) -> Image.Image:
    """A picture under half-transparent colours of its classes, with their names below."""
    colors = palette[ids].permute(2, 0, 1)
    mixed = torch.where(ids > 0, 0.5 * image + 0.5 * colors, 0.8 * image)
    picture = v2.functional.to_pil_image(mixed)
    scale = max(1, 256 // picture.width)
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    )
    shown = [i for i in shares.argsort(descending=True).tolist() if shares[i] > 0]
    whole = Image.new("RGB", (picture.width, picture.height + _LINE * len(shown) + 4), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for line, i in enumerate(shown):
        top = picture.height + 2 + line * _LINE
        color = tuple((255 * palette[i]).int().tolist())
        draw.rectangle((4, top + 2, 14, top + 12), fill=color)
        draw.text((20, top), f"{classes[i]}  {shares[i]:.1%}", fill="black")
    return whole


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run, what --out of training was")
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--out", type=Path, help="folder of overlays; default: RUN/predictions")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    """Predict."""
    paths = pictures(args.pictures)
    model, told = load_run(args.run)
    if told.task == "classification":
        classify(model, told.classes, paths)
    else:
        segment(model, told, paths, args.out or args.run / "predictions")


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
