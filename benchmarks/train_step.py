"""What does training cost besides the arithmetic: loading of data, and memory with a frozen base.

    python benchmarks/train_step.py --out benchmarks/results/0.1.0/train_step.json

``first_epoch`` and ``later_epochs`` train the example's classifier with its own loader, which
composes scenes in the first epoch and has them in the later ones; ``cached`` trains the same model
on one batch that is there already. Blocks of steps alternate in random order; the first steps of a
block, for which batches lie ready, do not count. Memory is the peak of a training step, of full
tuning and of the same hybrid with a frozen base.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import timm
import torch
from common import ROOT, add_options, set_up, write_json
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import tokenconv as tc
from tokenconv.profiling import Spread
from tokenconv.reports.table import aligned

sys.path.insert(0, str(ROOT / "examples"))
import train_classification
from training.data import make_data
from training.engine import make_accelerator
from training.settings import Settings

SKIPPED, COUNTED = 6, 10
"""Steps of a block."""
PAIRS = (("vit_tiny_patch16_224", "mix_ffn"), ("vit_small_patch16_224", "mix_ffn"),
         ("vit_small_patch16_224", "convpass"))  # fmt: skip


def batches(args: argparse.Namespace, scenes: int, epoch: int) -> Iterator[Any]:
    """Batches of the example's loader, from an epoch on, without end."""
    words = ["--out", "unused", "--batch-size", str(args.batch_size), "--scenes", str(scenes)]
    told = train_classification.parse([*words, "--workers", str(args.loaders)])
    settings = Settings.of(told)
    train, val, classes = train_classification.open_data(told)
    augment, judge = train_classification.transforms(told, timm.create_model(
        told.model, img_size=64, pretrained_cfg_overlay={"input_size": (3, 64, 64)}
    ), len(classes))  # fmt: skip
    data = make_data(
        train, val, augment, judge,
        settings=settings, accelerator=make_accelerator(settings),
    )  # fmt: skip
    for number in count():
        data.order.begin(number)
        for batch in data.train:
            if number >= epoch:
                yield batch


def step_of(model: nn.Module, device: str) -> Callable[[tuple[Tensor, Tensor]], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(tc.param_groups(model, lr=1e-4))

    def step(batch: tuple[Tensor, Tensor]) -> None:
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step with and without loading, block by block, and their ratios."""
    size: Any = {"img_size": 64, "num_classes": 10}
    model = tc.insert_(timm.create_model("vit_tiny_patch16_224", **size), "mix_ffn").to(args.device)
    step = step_of(model, args.device)
    steps = args.rounds * (SKIPPED + COUNTED) + 1
    sources = {
        "first_epoch": batches(args, steps * args.batch_size, 0),
        "later_epochs": batches(args, 8 * args.batch_size, 8),  # every process has had them all
    }
    first = {name: next(source) for name, source in sources.items()}
    arms: dict[str, Callable[[], Any]] = {
        "cached": lambda: first["later_epochs"],
        **{name: partial(next, source) for name, source in sources.items()},
    }
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for _ in tqdm(range(args.rounds), "rounds"):
        for name in random.sample([*arms], len(arms)):
            for _ in range(SKIPPED):
                step(arms[name]())
            begun = time.perf_counter()
            for _ in range(COUNTED):
                step(arms[name]())
            samples[name].append(1e3 * (time.perf_counter() - begun) / COUNTED)
    return {
        "batch_size": args.batch_size,
        "latency_ms": {name: asdict(Spread.of(own)) for name, own in samples.items()},
        "ratio_to_cached": {
            name: asdict(Spread.of([a / b for a, b in zip(own, samples["cached"], strict=True)]))
            for name, own in samples.items()
            if name != "cached"
        },
    }


def memory(name: str, block: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peak MiB of a training step, of everything and of what was inserted and the head."""
    arms = {}
    for preset in ("all", "inserted+head"):
        torch.manual_seed(0)
        model = tc.insert_(timm.create_model(name, num_classes=10), block)
        arms[preset] = tc.trainable_(model, preset).to(args.device)
    images = torch.randn(args.memory_batch_size, 3, 224, 224, device=args.device)
    found = tc.compare(arms, images, mode="train", repeats=2)
    peaks = {arm: found.arm(arm).modes["train"].memory.peak / 2**20 for arm in arms}
    return {"model": name, "block": block, "peak_mib": peaks,
            "ratio": peaks["inserted+head"] / peaks["all"]}  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each arm")
    parser.add_argument("--batch-size", type=int, default=64, help="of steps that are timed")
    parser.add_argument("--memory-batch-size", type=int, default=8, help="of steps for memory")
    parser.add_argument("--loaders", type=int, default=2, help="processes that load")
    args = parser.parse_args()
    facts = set_up(args)
    if args.quick:
        args.rounds, args.batch_size, args.memory_batch_size = 2, 8, 1
    result = {**facts, "loading": loading(args), "memory": [memory(*p, args) for p in PAIRS]}
    for name, ratio in result["loading"]["ratio_to_cached"].items():
        spread = f"{ratio['median']:.3f}x ({ratio['iqr']:.3f})"
        print(f"a step with loading, {name.replace('_', ' ')}: {spread} of one on a cached batch")
    rows: list[tuple[str, ...]] = [("model", "block", "all MiB", "inserted+head MiB", "ratio")]
    for row in result["memory"]:
        peaks = [f"{value:.1f}" for value in row["peak_mib"].values()]
        rows.append((row["model"], row["block"], *peaks, f"{row['ratio']:.3f}"))
    print(aligned(rows, keys=2))
    if args.out:
        write_json(Path(args.out), result)


if __name__ == "__main__":
    main()
