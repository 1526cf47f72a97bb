"""What do insertion, planning and removal cost, and the binding of grids in every forward pass?

``binding`` is the model with the grid carried to every block and nothing computed there; its output
is compared with that of the plain model before anything is timed.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import timm
import torch
from common import DTYPES, add_options, set_up, time_arms, write_json
from torch import Tensor, nn
from tqdm import tqdm

import tokenconv as tc
from tokenconv.profiling import Spread
from tokenconv.reports.table import aligned

MODELS = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224")
LARGE = "vit_large_patch16_224"


class Nothing(nn.Module):
    """Where a convolution would stand: takes the grid and gives the tokens back."""

    def forward(self, x: Tensor, *grid: Any) -> Tensor:
        """Tokens ``(B, N, C)``, unchanged."""
        return x


def bound(model: nn.Module) -> nn.Module:
    """The model with a bound grid in every MLP and no convolution; the weights are the same."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    hybrid = tc.insert_(copy.deepcopy(model, shared), "mix_ffn", site="before_act")
    for name in [name for name, _ in hybrid.named_modules()]:
        if name.endswith(".act.before"):
            hybrid.set_submodule(name, Nothing())
    return hybrid


def forwards(name: str, args: argparse.Namespace, bar: "tqdm[Any]") -> dict[str, Any]:
    """Time the plain and the bound model side by side.

    Raises:
        ValueError: If their outputs differ.
    """
    size: dict[str, Any] = {"img_size": 224} if "dinov2" in name else {}
    model = timm.create_model(name, **size).to(args.device, DTYPES[args.dtype]).eval()
    images = torch.randn(args.batch_size, 3, 224, 224).to(args.device, DTYPES[args.dtype])
    models = {"plain": model, "binding": bound(model)}

    def run(which: str) -> Tensor:
        with torch.inference_mode():
            return models[which](images)

    if not torch.equal(run("plain"), run("binding")):
        raise ValueError(f"the binding changes the output of {name}: not timed")
    arms = {which: (lambda which=which: run(which)) for which in models}
    return {"model": name, **time_arms(arms, args, [("binding", "plain")], bar)}


def life_cycle(repeats: int) -> dict[str, list[float]]:
    """Seconds that plan, insert and remove take on a large model, each time anew."""
    model = timm.create_model(LARGE).eval()
    seconds: dict[str, list[float]] = {"plan": [], "insert_": [], "remove_": []}
    for _ in range(repeats):
        start = time.perf_counter()
        tc.plan(model, "mix_ffn")
        planned = time.perf_counter()
        tc.insert_(model, "mix_ffn")
        inserted = time.perf_counter()
        tc.remove_(model)
        removed = time.perf_counter()
        for step, took in zip(
            seconds, (planned - start, inserted - planned, removed - inserted), strict=True
        ):
            seconds[step].append(took)
    return seconds


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code, 1 if the outputs differ.
    """
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    add_options(parser)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(words)
    facts = set_up(args)
    torch.manual_seed(0)
    total = len(args.models) * 2 * (args.warmup + args.repeats)
    try:
        with tqdm(total=total, unit="call", desc="timing") as bar:
            rows = [forwards(name, args, bar) for name in args.models]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = {
        step: asdict(Spread.of(took)) for step, took in life_cycle(min(args.repeats, 7)).items()
    }
    print(table(rows))
    print()
    for step, spread in seconds.items():
        print(f"{LARGE}: {step} {spread['median']:.2f} s ({spread['iqr']:.2f})")
    if args.out:
        write_json(args.out, {"question": summary, **facts, "rows": rows, "seconds": seconds})
        print(f"\nwritten to {args.out}")
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians, with interquartile ranges in brackets."""
    cells = [["model", "", "plain ms", "binding ms", "binding/plain"]]
    for row in rows:
        spreads = [*row["latency_ms"].values(), *row["ratio"].values()]
        cells.append([row["model"], "", *(f"{s['median']:.3f} ({s['iqr']:.3f})" for s in spreads)])
    return aligned(cells, keys=2)


if __name__ == "__main__":
    sys.exit(main())
