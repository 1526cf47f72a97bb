"""The commands, each a thin layer over one function."""

import argparse
import copy
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenconv.blocks import BLOCKS, list_blocks
from tokenconv.blocks.listing import to_json, to_markdown
from tokenconv.cli.analysis import run_analyze
from tokenconv.cli.arms import build_arms
from tokenconv.cli.exporting import run_export
from tokenconv.cli.inputs import build_model, image_size, load_images
from tokenconv.cli.prices import as_json, as_table, price_of
from tokenconv.cli.sweeps import run_sweep
from tokenconv.errors import MeasurementError
from tokenconv.profiling import (
    COMPARISON_FILES,
    Comparison,
    Rule,
    changes,
    changes_table,
    compare,
    other_conditions,
    read_comparison,
    steady_allocator,
    write_comparison,
    write_views,
)
from tokenconv.reports import alone_in, report_folder
from tokenconv.surgery import plan
from tokenconv.surgery.edits import NONE
from tokenconv.surgery.support import format_matrix

_MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


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
    made = plan(model, args.block, **_where(args))
    print(made.to_json() if args.json else made)


def run_cost(args: argparse.Namespace) -> None:
    """Print what a model or a block costs."""
    what, found = price_of(args, _where(args))
    print(as_json(what, found) if args.json else f"{what}\n{as_table(found)}")


def run_compare(args: argparse.Namespace) -> int:
    """Measure a model with blocks against the same model without, and write the report.

    Returns:
        1 if an arm failed, 3 if a regression against an earlier comparison is shown, else 0.
    """
    if args.sweep:
        return _sweep(args)
    then = read_comparison(args.against) if args.against else None
    comparison = measure(args)
    if args.trace_diff:
        print(f"\n{changes_table(comparison)}")
    print(f"\nreport: {args.out / 'report.html'}, {args.out / 'report.md'}")
    print(f"figures: {args.out / 'compare.json'}, {args.out / 'compare.png'}")
    if args.trace:
        print(f"traces: tensorboard --logdir {args.out / 'traces'}, or https://ui.perfetto.dev")
    regressed = then is not None and _tell_changes(args, comparison, then)
    return 1 if _tell_failures(comparison) else 3 if regressed else 0


def _tell_changes(args: argparse.Namespace, now: Comparison, then: Comparison) -> bool:
    """Say what changed since an earlier comparison; whether anything got worse."""
    print(f"\nagainst {args.against}:")
    for line in other_conditions(now, then):
        print(f"note: {line}")
    rules = args.fail_if or [Rule.parse("ratio>1.05")]
    found = [change for rule in rules for change in changes(now, then, rule)]
    print(*found, sep="\n")
    return any(change.regressed for change in found)


def measure(args: argparse.Namespace) -> Comparison:
    """Build the arms that the words ask for, compare them, and write the report of it.

    What was measured is printed and kept before anything is drawn, so that it is not lost where
    that fails.
    """
    with alone_in(args.out):
        with report_folder(args.out, instead_of=COMPARISON_FILES) as folder:
            comparison = _compare(args, folder / "traces" if args.trace else None)
            print(comparison)
            write_comparison(comparison, folder / "compare.json")
        with report_folder(args.out) as folder:
            write_views(comparison, folder)
    return comparison


def _compare(args: argparse.Namespace, trace_dir: Path | None) -> Comparison:
    """Build the arms that the words ask for, and compare them."""
    device, dtype = _device(args.device), getattr(torch, args.dtype)
    allocator = steady_allocator()
    model = build_model(args.model, image_size(args.img_size), pretrained=args.pretrained)
    images = load_images(model, args.images, args.batch_size)
    built = build_arms(
        model,
        args.block,
        beside=args.beside,
        image_size=(images.shape[2], images.shape[3]),
        **_where(args),
    )
    arms, descriptions = built.models, built.descriptions
    compiled = set(arms) if args.compile == "on" else set[str]()
    if args.compile == "both":
        compiled = {f"{name}_compiled" for name in arms}
        arms |= {f"{name}_compiled": copy.deepcopy(arm) for name, arm in arms.items()}
        descriptions |= {
            f"{name}_compiled": f"{name} through torch.compile" for name in descriptions
        }
    layout = _MEMORY_FORMATS[args.memory_format]
    return compare(
        {n: arm.to(device, dtype).to(memory_format=layout) for n, arm in arms.items()},
        images.to(device, dtype).contiguous(memory_format=layout),
        mode=args.mode,
        reference=built.reference,
        repeats=args.repeats,
        precision=args.precision,
        budget_s=args.budget,
        compiled=compiled,
        trace_dir=trace_dir,
        progress=True,
        about={
            "model": args.model,
            "weights": "pretrained" if args.pretrained else "random",
            "command": shlex.join(["tokenconv", *args.words]),
            "allocator": allocator,
        },
        descriptions=descriptions,
    )


def _sweep(args: argparse.Namespace) -> int:
    """Compare at every point; 1 if some failed."""
    try:
        points = run_sweep(args, measure)
    except KeyboardInterrupt:
        print(
            f"tokenconv: interrupted; finished points are kept in {args.out / 'points'}, and the "
            f"same command goes on from there",
            file=sys.stderr,
        )
        return 130
    print(f"\nreport: {args.out / 'report.html'}, {args.out / 'report.md'}")
    print(f"points: {args.out / 'points'}, each with compare.json and a report")
    found = [point.comparison for point in points]
    failed = [comparison is None or _tell_failures(comparison) for comparison in found]
    return int(any(failed))


def _tell_failures(comparison: Comparison) -> bool:
    """Say which arms failed, a line each."""
    lines = [
        f"{mode} of {arm.name} failed: {why}"
        for arm in comparison.arms
        for mode, why in arm.failures.items()
    ]
    for line in lines:
        print(f"tokenconv: error: {line}", file=sys.stderr)
    return bool(lines)


def _where(args: argparse.Namespace) -> dict[str, Any]:
    """What the words say about a block and where it goes, for ``plan`` and ``insert_``.

    Who names a block that goes nowhere else, or such a site, has asked for what it replaces.
    """
    names = [args.block] if isinstance(args.block, str) else args.block or []
    usual = [next(iter(BLOCKS[name].sites), "") for name in names if name in BLOCKS]
    sites = [args.site] if args.site else usual
    allow_change = NONE in names or any(site.startswith("replace_") for site in sites)
    kernel = {} if args.kernel_size is None else {"kernel_size": args.kernel_size}
    where = {"blocks": _blocks(args.blocks), "site": args.site}
    return {**where, "allow_change": allow_change, **kernel}


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
    "analyze": run_analyze,
    "compare": run_compare,
    "cost": run_cost,
    "export": lambda args: run_export(args, _where(args)),
    "list": run_list,
    "plan": run_plan,
}
