"""What is left in time of the multiply-accumulates that the classical networks save?

    python benchmarks/classics.py --out benchmarks/results/0.1.0/classics.json

MobileNetV1 has 27 times fewer multiply-accumulates than VGG-16: that is a ratio of counts, and here
it stands beside the ratio of measured times. Every network takes images of the size it was
published for, all run in turn in every round, and times are divided by each other round by round.
Weights are random; norms take the statistics of the images first, since values that vanish are slow
to compute. The figure lies beside the JSON file.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from common import (
    DTYPES,
    add_options,
    let_norms_know,
    set_up,
    time_arms,
    write_figure,
    write_json,
)
from torch import Tensor, nn
from tqdm import tqdm

import tokenconv as tc
from tokenconv.reports.table import aligned

QUESTION = (__doc__ or "").splitlines()[0]
REFERENCE = "vgg16"
SIZES = {
    REFERENCE: 224, "resnet50": 224, "densenet121": 224, "inception_v3": 299,
    "legacy_xception": 299, "mobilenetv1_100": 224, "mobilenetv2_100": 224, "efficientnet_b0": 224,
}  # fmt: skip
"""Rows and columns that the papers count multiply-accumulates at, by timm's name."""


def build(name: str) -> nn.Module:
    """A network as timm has it, without a head that is for training only."""
    options: dict[str, Any] = {"aux_logits": False} if name == "inception_v3" else {}
    return timm.create_model(name, **options)


def make(name: str, args: argparse.Namespace) -> nn.Module:
    """A network with random weights, whose norms know random images.

    Raises:
        ValueError: If what it computes is not finite.
    """
    model = build(name)
    images = torch.randn(4, 3, _side(name, args), _side(name, args))
    let_norms_know(model, images)
    with torch.no_grad():
        if not model.eval()(images).isfinite().all():
            raise ValueError(f"the output of {name} is not finite: not timed")
    return model.to(args.device, DTYPES[args.dtype])


def _side(name: str, args: argparse.Namespace) -> int:
    return args.img_size or SIZES[name]


def infer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, without gradients."""
    with torch.inference_mode():
        return model(images)


def price(name: str, model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """What one image costs, by formula."""
    size = (3, _side(name, args), _side(name, args))
    cost = tc.cost(model, size)
    figures = ("params", "macs", "backward_macs", "bytes", "intensity")
    return {
        "model": name,
        "input_size": size,
        **{figure: getattr(cost, figure) for figure in figures},
        "macs_by_category": {str(kind): own.macs for kind, own in cost.categories.items()},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Price and time every network.

    Raises:
        ValueError: If what one computes is not finite.
    """
    models = {name: make(name, args) for name in tqdm(args.models, "making models")}
    prices = [price(name, model, args) for name, model in models.items()]
    pairs = [(REFERENCE, name) for name in models if name != REFERENCE]
    total = len(models) * len(args.batch_size) * (args.warmup + args.repeats)
    timings = []
    with tqdm(total=total, unit="step", desc="timing") as bar:
        for batch_size in args.batch_size:
            bar.set_postfix_str(f"batch {batch_size}")
            steps = {n: step(m, batch_size, _side(n, args), args) for n, m in models.items()}
            timings.append({"batch_size": batch_size, **time_arms(steps, args, pairs, bar)})
    return {"prices": prices, "timings": timings}


def step(
    model: nn.Module, batch_size: int, side: int, args: argparse.Namespace
) -> Callable[[], Tensor]:
    """The work of an arm."""
    images = torch.randn(batch_size, 3, side, side).to(args.device, DTYPES[args.dtype])
    return partial(infer, model, images)


# --- what is told ---


def ratios(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts and times of the reference over those of each network, by batch size."""
    macs = {row["model"]: row["macs"] for row in result["prices"]}
    if REFERENCE not in macs:
        return []
    return [
        {
            "model": name,
            "batch_size": timing["batch_size"],
            "macs": macs[REFERENCE] / macs[name],
            "time": timing["ratio"][f"{REFERENCE}/{name}"],
        }
        for timing in result["timings"]
        for name in macs
        if name != REFERENCE
    ]


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Header and a row per network: medians, with interquartile ranges in brackets."""
    timings = result["timings"]
    found = {(row["model"], row["batch_size"]): row for row in ratios(result)}
    sizes = [timing["batch_size"] for timing in timings]
    compared = [f"{REFERENCE} over it: MACs", *(f"time, batch {n}" for n in sizes)] * bool(found)
    rows = [["model", "input", "params M", "MACs G", "MiB", "MACs/byte",
             *(f"ms, batch {n}" for n in sizes), *compared]]  # fmt: skip
    for price in result["prices"]:
        name = price["model"]
        own = [found[name, n] for n in sizes if (name, n) in found]
        shares = [f"{own[0]['macs']:.1f}", *(_spread(row["time"], 2) for row in own)] if own else []
        rows.append([
            name, "x".join(map(str, price["input_size"])), f"{price['params'] / 1e6:.1f}",
            f"{price['macs'] / 1e9:.2f}", f"{price['bytes'] / 2**20:.0f}",
            f"{price['intensity']:.1f}",
            *(_spread(timing["latency_ms"][name], 1) for timing in timings),
            *(shares or ["" for _ in compared]),
        ])  # fmt: skip
    return rows


def _spread(spread: Mapping[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['iqr']:.{digits}f})"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Ratios of times over ratios of counts; on the line both are the same.

    Args:
        result: What is written.
        path: Where it is written; the pictures go beside it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no figure: matplotlib is not installed")
        return
    if not (points := ratios(result)):
        return
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for batch_size in dict.fromkeys(point["batch_size"] for point in points):
        own = [point for point in points if point["batch_size"] == batch_size]
        macs, times = [point["macs"] for point in own], [point["time"] for point in own]
        medians = [time["median"] for time in times]
        halves = [time["iqr"] / 2 for time in times]
        axis.errorbar(macs, medians, halves, fmt="o", capsize=3, label=f"batch {batch_size}")
    for name in dict.fromkeys(point["model"] for point in points):
        lowest = min((p for p in points if p["model"] == name), key=lambda p: p["time"]["median"])
        axis.annotate(
            name, (lowest["macs"], lowest["time"]["median"]), fontsize=8,
            xytext=(3, -4), textcoords="offset points", rotation=-60, rotation_mode="anchor",
            va="top",
        )  # fmt: skip
    ends = [min(p["macs"] for p in points) / 1.3, max(p["macs"] for p in points) * 1.3]
    axis.plot(ends, ends, color="black", linewidth=1, label="as many times faster as fewer MACs")
    axis.set(xscale="log", yscale="log", xlabel=f"MACs of {REFERENCE} over MACs",
             ylabel=f"time of {REFERENCE} over time")  # fmt: skip
    ticks = [1, 2, 5, 10, 20, 50, 100]
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_ticks(ticks, [f"{tick}x" for tick in ticks])
        scale.set_ticks([], minor=True)
    axis.set(xlim=(ends[0] / 1.2, ends[1] * 1.4), ylim=(0.5, ends[1] * 1.2))
    axis.set_title(f"{result['device']}, {result['dtype']}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    write_figure(figure, path)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=QUESTION)
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument(
        "--batch-size", type=int, nargs="+", help="default: 1 and 8, on CUDA 1 and 64"
    )
    parser.add_argument("--img-size", type=int, help="of all; default: as published")
    parser.set_defaults(repeats=50, warmup=5)
    args = parser.parse_args(words)
    args.batch_size = args.batch_size or [1, 64 if args.device == "cuda" else 8]
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code, 1 if a network does not compute.
    """
    args = parse(words)
    result: dict[str, Any] = {"question": QUESTION, **set_up(args)}
    torch.manual_seed(0)
    try:
        result |= measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = rows_of(result)
    print(aligned(rows, keys=2))
    if args.out:
        write_json(args.out, result)
        draw(result, args.out)
        print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
