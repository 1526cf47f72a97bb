"""The command ``analyze``."""

import argparse
import copy
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from tokenconv.analysis import Fields, analyze, attention_distance, effective_receptive_field
from tokenconv.analysis.report import ANALYSIS_FILES, write_analysis
from tokenconv.cli.inputs import build_model, image_size, load_images
from tokenconv.errors import AnalysisError, CheckpointError
from tokenconv.grid import TokenGrid
from tokenconv.reports import report_folder
from tokenconv.surgery import load_


def run_analyze(args: argparse.Namespace) -> None:
    """Print what a model's kernels are, and write the report of it."""
    with report_folder(args.out, instead_of=ANALYSIS_FILES) as folder:
        size = image_size(args.img_size)
        model = build_model(
            args.model, size, num_classes=args.num_classes, pretrained=args.pretrained
        )
        weights = "pretrained" if args.pretrained else "random"
        if args.checkpoint:
            weights = str(args.checkpoint)
            _load(model, args.checkpoint)
        models = {"attention_only" if args.hybrid else args.model: model}
        if args.hybrid:
            weights = f"{weights} and {args.hybrid}"
            model = models[args.hybrid.name] = load_(copy.deepcopy(model), args.hybrid)
        input_size = (3, *size) if size else resolve_model_data_config(model)["input_size"]
        found = analyze(model, input_size, energy=args.energy, layers=args.layers)
        print(found)
        fields = []
        if args.fields:
            images = load_images(model, args.images, args.batch_size)
            fields = [_fields(name, each, images) for name, each in models.items()]
        about = {
            "model": args.model, "weights": weights,
            "command": shlex.join(["tokenconv", *args.words]),
        }  # fmt: skip
        write_analysis(found, folder, about, fields)
    print(f"\nreport: {args.out / 'report.html'}, {args.out / 'report.md'}")


def _load(model: nn.Module, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise CheckpointError(f"--checkpoint {checkpoint} is no file")
    load_checkpoint(model, str(checkpoint))


class _LastMap(nn.Module):
    """The features that a timm model ends with, as maps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, c, h, w)``."""
        forward = getattr(self.model, "forward_intermediates", None)
        if forward is None:
            kind = type(self.model).__name__
            raise AnalysisError(f"--fields takes models with forward_intermediates, not {kind}")
        return forward(images, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]


def _fields(name: str, model: nn.Module, images: Tensor) -> Fields:
    last = _LastMap(model)
    field = effective_receptive_field(last, images)
    with torch.no_grad():
        rows, columns = last(images[:1]).shape[2:]
    return Fields(name, field, list(_attention(model, images, (rows, columns))))


def _attention(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Nothing where no layer attends among the tokens of the last map."""
    grid = TokenGrid(size, num_prefix_tokens=getattr(model, "num_prefix_tokens", 0))
    try:
        yield from attention_distance(model, images, grid)
    except AnalysisError:
        return
