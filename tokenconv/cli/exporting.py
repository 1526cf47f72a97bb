"""The command ``export``."""

import argparse
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from tokenconv.cli.inputs import build_model, image_size, load_photographs
from tokenconv.deploy import export
from tokenconv.deploy.exporting import largest_difference
from tokenconv.deploy.targets import flat
from tokenconv.errors import ExportError
from tokenconv.surgery import Plan, fold_, insert_, load_

_FOLDED = 1e-4
"""Of the largest output; folding promises a tenth of it."""


def run_export(args: argparse.Namespace, where: dict[str, Any]) -> None:
    """Export a model or a hybrid, and print how it was checked.

    Args:
        args: Of ``tokenconv export``.
        where: How a block goes in, for ``insert_``.
    """
    size = image_size(args.img_size)
    model = build_model(
        args.model, size, num_classes=args.num_classes, pretrained=args.pretrained,
        any_size="hw" in args.dynamic,
    )  # fmt: skip
    input_size = (3, *size) if size else resolve_model_data_config(model)["input_size"]
    if args.hybrid is not None:
        load_(model, args.hybrid)
    elif args.plan is not None:
        insert_(model, Plan.from_json(args.plan.read_text()), allow_change=True)
    elif args.block is not None:
        insert_(model, args.block, **where)
    model.eval()
    calibration = args.calibration and load_photographs(
        model, args.calibration, args.calibration_images, input_size
    )
    folded = [_fold(model, (2, *input_size))] if args.fold else []
    report = export(
        model,
        args.out,
        to=args.to,
        input_size=input_size,
        dynamic=args.dynamic,
        multiple_of=args.multiple_of,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
        opset=args.opset,
        calibration=calibration,
        keep_float=args.keep_float,
    )
    print(*folded, report, sep="\n")


@torch.no_grad()
def _fold(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Fold a hybrid, in place: what was folded, and what that changed.

    Raises:
        ExportError: If it changed more than rounding does.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = flat(model(images))
    report = fold_(model)
    off = largest_difference(flat(model(images)), before)
    if not off <= _FOLDED:
        raise ExportError(f"folding changes the output by {off:.1e} of the largest: leave it out")
    return f"{report}\n  largest difference from before: {off:.1e} of the largest output"
