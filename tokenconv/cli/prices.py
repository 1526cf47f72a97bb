"""``tokenconv cost``: what is to be priced, and the price as a table and as JSON."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from tokenconv.blocks import BLOCKS, create_block
from tokenconv.cli.inputs import build_model, image_size
from tokenconv.costs import Cost, Price, cost
from tokenconv.errors import MeasurementError
from tokenconv.reports.table import aligned
from tokenconv.surgery import insert_

_BLOCK_GRID = 14, 14


def price_of(args: argparse.Namespace, where: dict[str, Any]) -> tuple[str, Cost]:
    """What the words ask for, in words, and what it costs.

    Args:
        args: Of ``tokenconv cost``.
        where: How a block goes in, for ``insert_``.

    Raises:
        UnknownNameError: If there is no model or block of a name.
        MeasurementError: If a model cannot be built for this size, or takes no images of it.
        SurgeryError: If a block does not go in.
    """
    model, size = _weightless(args, where)
    sites = None
    if args.sites:
        sites = [name for name, _ in model.named_modules() if name and args.sites.search(name)]
        if not sites:
            raise MeasurementError(
                f"no module of {args.model} has a name like {args.sites.pattern}"
            )
    inserted = f" with {args.block}" if args.block else ""
    shape = "x".join(str(side) for side in size)
    return f"{args.model}{inserted}, one input of {shape}", cost(model, size, sites=sites)


def _weightless(
    args: argparse.Namespace, where: dict[str, Any]
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model or block, and ``(C, H, W)`` of its input."""
    size = image_size(args.img_size)
    with torch.device("meta"):
        if args.dim is not None:
            kernel = {} if args.kernel_size is None else {"kernel_size": args.kernel_size}
            rows, cols = size or _BLOCK_GRID
            return create_block(args.model, args.dim, **kernel), (args.dim, rows, cols)
        if args.model in BLOCKS and not timm.is_model(args.model):
            raise MeasurementError(f"{args.model} is a block: say how wide it is, with --dim")
        model = build_model(args.model, size)
        if args.block is not None:
            insert_(model, args.block, **where)
    rows, cols = size or resolve_model_data_config(model)["input_size"][1:]
    return model, (3, rows, cols)


def as_json(what: str, found: Cost) -> str:
    """The price as a JSON object."""
    content = {
        "what": what,
        **_figures(found),
        "categories": {str(kind): _figures(own) for kind, own in found.categories.items()},
        "sites": {
            name: {**_figures(own), "calls": own.calls, "input_shape": own.input_shape}
            for name, own in found.sites.items()
        },
    }
    return json.dumps(content, indent=1)


def _figures(own: Price) -> dict[str, Any]:
    names = ("params", "macs", "backward_macs", "bytes", "intensity")
    return {name: getattr(own, name) for name in names}


def as_table(found: Cost) -> str:
    """The price as aligned text: the whole, what kinds of operators cost, and modules."""
    return aligned([*_rows(found)])


def _rows(found: Cost) -> Iterator[tuple[str, ...]]:
    yield ("", "params", "MACs", "backward MACs", "bytes", "MACs/byte")
    yield _row("total", found)
    for kind, own in found.categories.items():
        yield _row(f"  {kind}", own)
    for name, own in found.sites.items():
        yield _row(name, own)


def _row(name: str, own: Price) -> tuple[str, ...]:
    counts = (own.params, own.macs, own.backward_macs, own.bytes)
    return (name, *(f"{count:,d}" for count in counts), f"{own.intensity:.2f}")
