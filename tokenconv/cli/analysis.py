"""The command ``analyze``."""

import argparse
import copy
import shlex
import textwrap
from pathlib import Path

from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from torch import nn

from tokenconv.analysis import Fields, analyze
from tokenconv.analysis.report import ANALYSIS_FILES, write_analysis
from tokenconv.cli.inputs import build_model, image_size, load_images
from tokenconv.errors import CheckpointError
from tokenconv.reports import alone_in, report_folder
from tokenconv.surgery import load_


def run_analyze(args: argparse.Namespace) -> None:
    """Print what a model's kernels are, and write the report of it."""
    with alone_in(args.out), report_folder(args.out, instead_of=ANALYSIS_FILES) as folder:
        size = image_size(args.img_size)
        model = build_model(
            args.model, size, num_classes=args.num_classes, pretrained=args.pretrained
        )
        weights = "pretrained" if args.pretrained else "random"
        if args.checkpoint:
            weights = str(args.checkpoint)
            _load(model, args.checkpoint)
        models = {"baseline" if args.hybrid else args.model: model}
        if args.hybrid:
            weights = f"{weights} and {args.hybrid}"
            model = models[args.hybrid.name] = load_(copy.deepcopy(model), args.hybrid)
        input_size = (3, *size) if size else resolve_model_data_config(model)["input_size"]
        found = analyze(model, input_size, energy=args.energy, layers=args.layers)
        print(found)
        fields = []
        if args.fields:
            images = load_images(model, args.images, args.batch_size)
            fields = [Fields.of(name, each, images) for name, each in models.items()]
        about = {
            "model": args.model, "weights": weights,
            "command": shlex.join(["tokenconv", *args.words]),
        }  # fmt: skip
        write_analysis(found, folder, about, fields)
    print(f"\nreport: {args.out / 'report.html'}, {args.out / 'report.md'}")


def _load(model: nn.Module, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise CheckpointError(f"--checkpoint {checkpoint} is no file")
    try:
        load_checkpoint(model, str(checkpoint), weights_only=True)  # older timm's default is False
    except Exception as error:  # whatever the file made torch raise
        why = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise CheckpointError(f"--checkpoint {checkpoint} does not fit: {why}") from error
