"""The commands, each a thin layer over one function."""

import argparse
import copy
import re
import shlex
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokenconv.blocks import BLOCKS, list_blocks
from tokenconv.blocks.listing import to_json, to_markdown
from tokenconv.cli.inputs import build_model, image_size, load_images
from tokenconv.errors import MeasurementError, SurgeryError
from tokenconv.profiling import (
    changes,
    changes_table,
    compare,
    read_comparison,
    report_folder,
    steady_allocator,
    write_report,
)
from tokenconv.surgery import insert_, plan
from tokenconv.surgery.support import format_matrix


def run_list(args: argparse.Namespace) -> None:
    """Print a line per block, or per timm family."""
    if args.families:
        print(format_matrix(args.pattern))
        return
    names = list_blocks(args.pattern)
    if args.markdown:
        print(to_markdown(names))
        return
    if args.json:
        print(to_json(names))
        return
    for name in names:
        info = BLOCKS[name]
        sites = ", ".join(info.sites) or "none, it is a block by itself"
        policy = f"prefix tokens: {info.prefix_policy}"
        print(f"{name}  {info.group}  sites: {sites}  {policy}  {info.paper}")


def run_plan(args: argparse.Namespace) -> None:
    """Print what inserting a block would change."""
    model = build_model(args.model, image_size(args.img_size))
    made = plan(model, args.block, **_where(args), **_block_kwargs(args.block, args.kernel_size))
    print(made.to_json() if args.json else made)


def run_compare(args: argparse.Namespace) -> int:
    """Measure a model with blocks against the same model without, and write the report.

    Returns:
        3 if a regression against an earlier comparison is shown, else 0.
    """
    device = _device(args.device)
    then = read_comparison(args.against) if args.against else None
    allocator = steady_allocator()
    img_size = image_size(args.img_size)
    with report_folder(args.out) as folder:
        model = build_model(args.model, img_size, pretrained=args.pretrained)
        arms, reference = build_arms(model, args.block, args.kernel_size, **_where(args))
        dtype = getattr(torch, args.dtype)
        arms = {name: arm.to(device, dtype) for name, arm in arms.items()}
        images = load_images(model, args.images, args.batch_size)
        comparison = compare(
            arms,
            images.to(device, dtype),
            mode=args.mode,
            reference=reference,
            repeats=args.repeats,
            precision=args.precision,
            budget_s=args.budget,
            compiled=args.compile,
            trace_dir=folder / "traces" if args.trace else None,
            progress=True,
        )
        command = shlex.join(["tokenconv", *args.words])
        weights = "pretrained" if args.pretrained else "random"
        about = {
            "model": args.model,
            "weights": weights,
            "command": command,
            "allocator": allocator,
        }
        write_report(comparison, folder, about=about)
    print(comparison)
    if args.trace_diff:
        print(f"\n{changes_table(comparison)}")
    print(f"\nreport: {args.out / 'report.md'}, {args.out / 'compare.png'}")
    print(f"figures: {args.out / 'compare.json'}")
    if args.trace:
        print(f"traces: tensorboard --logdir {args.out / 'traces'}, or https://ui.perfetto.dev")
    return 0 if then is None else _gate(args, then)


def _gate(args: argparse.Namespace, then: dict[str, Any]) -> int:
    """Say what changed since an earlier comparison."""
    now = read_comparison(args.out / "compare.json")
    found = changes(now, then, args.fail_if)
    print(f"\nagainst {args.against}, {args.fail_if}:", *found, sep="\n")
    return 3 if any(change.regressed for change in found) else 0


def build_arms(
    model: nn.Module, names: list[str], kernel_size: int, **where: Any
) -> tuple[dict[str, nn.Module], str]:
    """The models to compare, all from the same weights; the first is the baseline.

    A model that has a convolution in its MLPs is compared without it as well: ``attention_only``
    is then the baseline, and ``original`` the model as timm has it.

    Returns:
        The arms by name, and the name of the arm that is the model as timm has it.
    """
    arms: dict[str, nn.Module] = {}
    reference = "baseline"
    try:
        arms["attention_only"] = insert_(copy.deepcopy(model), "none", allow_change=True)
        reference = "original"
    except SurgeryError:
        if "none" in names:
            raise
    arms[reference] = model
    for block in dict.fromkeys(names):
        if block != "none":
            arms[block] = insert_(copy.deepcopy(model), block, kernel_size=kernel_size, **where)
    return arms, reference


def _block_kwargs(block: str, kernel_size: int) -> dict[str, Any]:
    return {} if block == "none" else {"kernel_size": kernel_size}


def _where(args: argparse.Namespace) -> dict[str, Any]:
    allow_change = args.site == "replace_attn"  # asked for by name
    return {"blocks": _blocks(args.blocks), "site": args.site, "allow_change": allow_change}


def _blocks(text: str | None) -> int | slice | str | None:
    """An index, a slice or a regular expression, from the command line."""
    if text is None:
        return None
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        return slice(*(int(part) if part else None for part in text.split(":")))
    return text


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MeasurementError(f"unknown device {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise MeasurementError(f"{name} was asked for, but {count} CUDA devices are available")
    elif device.type != "cpu":
        raise MeasurementError(f"cannot measure on {name!r}; expected cpu, cuda or cuda:N")
    return device


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "compare": run_compare,
    "list": run_list,
    "plan": run_plan,
}
