"""What do whole models gain from fused convolutions over tokens?

    python benchmarks/models.py --out benchmarks/results/0.1.0/models.json
    python benchmarks/models.py --device cuda --dtype bfloat16 --out ...

``eager`` is the model as its library has it, or a ViT with inserted convolutions; ``accelerated``
the same after ``tokenconv.accelerate_``; both compiled as well. ``plain`` is the ViT without
convolutions. All arms share their weights. Logits, and in training all gradients, are compared
before anything is timed. A training step is forward, backward and SGD, whose learning rate of 0
costs as much as another and leaves the weights alone.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import timm
import torch
from common import (
    DTYPES,
    add_options,
    check_alike,
    compiled,
    medians,
    medians_with_iqr,
    peak_bytes,
    set_up,
    time_arms,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import tokenconv as tc
from tokenconv.reports.table import aligned
from tokenconv.surgery import inserted_modules

QUESTION = (__doc__ or "").splitlines()[0]
ARMS = ("eager", "accelerated", "compiled", "accelerated_compiled", "plain")
MODES = ("inference", "training")
PAIRS = (
    ("eager", "accelerated"),
    ("compiled", "accelerated_compiled"),
    ("eager", "plain"),
    ("accelerated", "plain"),
)
TOLERANCE = {
    "logits": {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2},
    "gradients": {"float32": 1e-4, "bfloat16": 3e-1, "float16": 5e-2},
}
"""Largest difference between arms, as a share of the largest value of a tensor; gradients of whole
models in bfloat16 are off by a sixth from those in float32, in any arm."""
LEAST = 1e-2
"""Gradients smaller than this share of the largest count as so large: some are rounding alone."""
SEGFORMERS = {
    "segformer_b0": {"hidden_sizes": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "segformer_b2": {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 4, 6, 3)},
}
MODELS = ("pvt_v2_b0", "pvt_v2_b2", "vit_small_patch16_224", *SEGFORMERS)


class Segformer(nn.Module):
    """SegFormer's classifier of transformers, which gives its logits."""

    def __init__(self, hidden_sizes: Sequence[int], depths: Sequence[int]):
        super().__init__()
        from transformers import SegformerConfig, SegformerForImageClassification

        self.model = SegformerForImageClassification(
            SegformerConfig(
                hidden_sizes=[*hidden_sizes], depths=[*depths], drop_path_rate=0.0,
                classifier_dropout_prob=0.0, num_labels=1000,  # pyright: ignore[reportCallIssue]
            )
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits."""
        return self.model(images).logits


def make(name: str, img_size: int) -> nn.Module:
    """A model with random weights."""
    if name in SEGFORMERS:
        return Segformer(**SEGFORMERS[name])
    size: dict[str, Any] = {"img_size": img_size} if _is_plain(name) else {}
    return timm.create_model(name, **size)


def _is_plain(name: str) -> bool:
    """Whether a model has no convolutions over tokens of its own."""
    return name.startswith("vit")


def arms_of(name: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The arms of a model, all with the same parameters."""
    model = make(name, args.img_size).to(args.device, DTYPES[args.dtype])
    plain = copy.deepcopy(model, _parameters(model))
    if _is_plain(name):
        tc.insert_(model, "mix_ffn")
        for block in inserted_modules(model).values():
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.1)  # as if trained: they begin as zeros
    fast = copy.deepcopy(model, _parameters(model))
    impl = "triton" if args.device == "cuda" else None
    tc.accelerate_(fast, (3, args.img_size, args.img_size), impl=impl)
    arms = {"eager": model, "accelerated": fast, "compiled": compiled(model),
            "accelerated_compiled": compiled(fast)}  # fmt: skip
    if _is_plain(name):
        arms["plain"] = plain
    return {arm: module for arm, module in arms.items() if arm in args.arms}


def _parameters(model: nn.Module) -> dict[int, Any]:
    """What a copy shares with a model, as ``deepcopy`` wants to be told."""
    return {id(parameter): parameter for parameter in model.parameters()}


# --- what is done with them ---


def infer(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Logits, without gradients."""
    with torch.inference_mode():
        return (model(images),)


def learn(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Logits, and the gradients of the loss by parameter."""
    logits = model(images)
    return logits, *torch.autograd.grad(_loss(logits), [*model.parameters()])


def train(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step."""
    _loss(model(images)).backward()
    optimizer.step()
    optimizer.zero_grad()  # at the end, so that arms do not hold gradients between their turns


def _loss(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits), device=logits.device)
    return functional.cross_entropy(logits.float(), labels)


# --- what is measured ---


@dataclass(frozen=True)
class Case:
    """A model at work."""

    model: str
    mode: str
    batch_size: int
    arms: dict[str, nn.Module]
    images: Tensor

    def __str__(self) -> str:
        return f"{self.model}, {self.mode}, batch {self.batch_size}"

    def prepared(self) -> dict[str, nn.Module]:
        """The arms, in this mode."""
        return {name: arm.train(self.mode == "training") for name, arm in self.arms.items()}

    def check(self, dtype: str) -> dict[str, float]:
        """The largest differences between arms.

        Raises:
            ValueError: If they do not compute the same.
        """
        arms = {name: arm for name, arm in self.prepared().items() if name != "plain"}
        work, parts = infer, {"logits": slice(1)}
        if self.mode == "training":
            work, parts = learn, {"logits": slice(1), "gradients": slice(1, None)}
        results = {name: work(arm, self.images) for name, arm in arms.items()}
        return {
            what: check_alike(
                {name: result[part] for name, result in results.items()},
                TOLERANCE[what][dtype], f"{what} of {self} in {dtype}", LEAST,
            )
            for what, part in parts.items()
        }  # fmt: skip

    def steps(self) -> dict[str, Callable[[], object]]:
        """The work of every arm."""
        if self.mode == "inference":
            return {n: partial(infer, arm, self.images) for n, arm in self.prepared().items()}
        return {
            name: partial(train, arm, self.images, torch.optim.SGD(arm.parameters(), lr=0.0))
            for name, arm in self.prepared().items()
        }


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Inference with every batch size, training with the largest."""
    sizes = {"inference": args.batch_size, "training": [max(args.batch_size)]}
    cases = []
    for name in tqdm(args.models, "making models"):
        arms = arms_of(name, args)
        for mode in args.modes:
            for size in sizes[mode]:
                images = torch.randn(size, 3, args.img_size, args.img_size)
                images = images.to(args.device, DTYPES[args.dtype])
                cases.append(Case(name, mode, size, arms, images))
    return cases


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare, then time, the arms of every model.

    Raises:
        ValueError: If they do not compute the same.
    """
    cases = cases_of(args)
    differences = [case.check(args.dtype) for case in tqdm(cases, "comparing")]
    rows = []
    total = sum(len(case.arms) for case in cases) * (args.warmup + args.repeats)
    with tqdm(total=total, unit="step", desc="timing") as bar:
        for case, difference in zip(cases, differences, strict=True):
            bar.set_postfix_str(str(case))
            steps = case.steps()
            row: dict[str, Any] = {
                "model": case.model,
                "mode": case.mode,
                "batch_size": case.batch_size,
                "difference": difference,
            }
            for step in steps.values():
                step()  # what is compiled for a step is compiled here
            if args.device == "cuda":
                row["peak_bytes"] = {name: peak_bytes(step) for name, step in steps.items()}
            rows.append(row | time_arms(steps, args, PAIRS, bar))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians in milliseconds, ratios with interquartile ranges in brackets, peak memory in MiB."""
    arms = [arm for arm in ARMS if any(arm in row["latency_ms"] for row in rows)]
    ratios = dict.fromkeys(ratio for row in rows for ratio in row["ratio"])
    peaks = [arm for arm in arms if any(arm in row.get("peak_bytes", ()) for row in rows)]
    lines = [["model", "mode", "batch", *(f"{arm} ms" for arm in arms), *ratios,
              *(f"{arm} MiB" for arm in peaks)]]  # fmt: skip
    for row in rows:
        memory = row.get("peak_bytes", {})
        lines.append([
            row["model"], row["mode"], str(row["batch_size"]),
            *medians(row["latency_ms"], arms), *medians_with_iqr(row["ratio"], ratios),
            *(f"{memory[arm] / 2**20:.0f}" if arm in memory else "" for arm in peaks),
        ])  # fmt: skip
    return aligned(lines, keys=2)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=QUESTION)
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--batch-size", type=int, nargs="+",
        help="of inference, the largest of training; default: 1 and 4, on CUDA 64",
    )  # fmt: skip
    parser.add_argument("--img-size", type=int, default=224)
    parser.set_defaults(repeats=50, warmup=5)
    args = parser.parse_args(words)
    args.batch_size = args.batch_size or ([64] if args.device == "cuda" else [1, 4])
    if find_spec("transformers") is None:
        print("no SegFormer: transformers is not installed")
        args.models = [name for name in args.models if name not in SEGFORMERS]
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code, 1 if the arms do not agree.
    """
    args = parse(words)
    facts = set_up(args)
    torch.manual_seed(0)
    try:
        rows = measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if args.out:
        content = {"question": QUESTION, **facts, "img_size": args.img_size, "rows": rows}
        write_json(args.out, content)
        print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
