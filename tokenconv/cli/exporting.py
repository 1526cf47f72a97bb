"""The command ``export``."""

import argparse
from typing import Any

import torch
from timm.data import resolve_model_data_config

from tokenconv.cli.inputs import build_model, image_size
from tokenconv.deploy import export
from tokenconv.surgery import Plan, fold_, insert_, load_


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
    folded = [fold_(model)] if args.fold else []
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
    )
    print(*folded, report, sep="\n")
