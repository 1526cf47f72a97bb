"""Does it help? Hybrids beside attention only, trained on digit scenes with matched parameters.

    python benchmarks/accuracy.py --workers 2 --out benchmarks/results/0.1.0/accuracy.json
    python benchmarks/accuracy.py --device cuda --width 192 --depth 12 --size 64 --steps 5000 ...

Two tasks (which digit is the largest; which digit every pixel shows), three amounts of training
data, several seeds. ``scratch`` trains everything, in models that have as many parameters as the
attention-only one, to 1 %: those with a block have narrower MLPs. ``adapt`` freezes a ViT that this
benchmark itself has trained to name the largest digit, and trains blocks and head on another thing:
negatives of the scenes, or segmentation; there the baseline is an adapter without convolution that
has as many parameters. Of 1e-3, 3e-3 and 1e-2 the last was the best --adapt-lr for every arm that
was tried on validation scenes. All arms of a seed see the same batches in the same order. Every run
is kept as it ends: the same command goes on where it was interrupted.

Intervals are of 95 % over seeds: of weights, order and choice of the scenes to train on; the test
scenes are the same for all. A verdict holds at 5 % for all comparisons together (Holm).
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product, repeat
from pathlib import Path
from typing import Any

import timm
import torch
from common import ROOT, facts, write_figure, write_json
from matplotlib.figure import Figure
from safetensors.torch import load_model, save_model
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import tokenconv as tc

sys.path.insert(0, str(ROOT / "examples"))
from training.digits import CLASSES, MASK_CLASSES, DigitScenes, Split
from training.heads import LinearHead, Segmenter

METRICS: dict[str, tuple[str, Any]] = {
    "classification": ("top-1", partial(MulticlassAccuracy, average="micro")),
    "segmentation": ("mIoU", MulticlassJaccardIndex),
}
FRACTIONS = (1 / 16, 1 / 4, 1.0)
POINTS = 8
"""Of a learning curve."""


@dataclass(frozen=True)
class Arm:
    """What is trained."""

    model: str
    """``vit`` or ``pvt``."""
    block: str | None = None
    """To be inserted; ``none`` takes convolutions out."""
    options: Mapping[str, Any] = field(default_factory=dict)
    position: bool = False
    """Whether a learned position embedding stands in front of every stage."""


SCRATCH = {
    "vit": Arm("vit"),
    "mix_ffn": Arm("vit", "mix_ffn"),
    "leff": Arm("vit", "leff", {"mlp_ratio": 1.0}),
    "conv_glu": Arm("vit", "conv_glu", {"mlp_ratio": 1.0}),
    "peg": Arm("vit", "peg"),
    "convpass": Arm("vit", "convpass"),
    "pvt_v2": Arm("pvt"),
    "pvt_v2 attention only": Arm("pvt", "none"),
    "pvt_v2 attention only, position": Arm("pvt", "none", position=True),
}
# Blocks have as many parameters as `mix_ffn`, to 3 % with the default width; but `peg`, which is
# kernels only, has 25 % more.
ADAPT = {
    "head only": Arm("vit"),
    "adaptformer": Arm("vit", "adaptformer", {"width": 19}),
    "mix_ffn": Arm("vit", "mix_ffn"),
    "leff": Arm("vit", "leff", {"mlp_ratio": 0.28}),
    "conv_glu": Arm("vit", "conv_glu", {"mlp_ratio": 0.3}),
    "peg": Arm("vit", "peg", {"kernel_size": 7}),
    "convpass": Arm("vit", "convpass", {"width": 11}),
}
ARMS = {"scratch": SCRATCH, "adapt": ADAPT}
BASELINES = {
    "scratch": {"vit": "vit", "pvt": "pvt_v2 attention only"},
    "adapt": {"vit": "adaptformer"},
}


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: str
    task: str
    arm: str
    fraction: float
    seed: int

    @property
    def key(self) -> str:
        """Names it in the result."""
        return f"{self.setting}/{self.task}/{self.arm}/{self.fraction:.4g}/{self.seed}"


# --- models ---


def plain(model: str, args: argparse.Namespace, mlp_ratio: float = 4.0) -> nn.Module:
    """A ViT of timm's with average pooling, or a PVTv2 with two stages, for small images."""
    if model == "pvt":
        return timm.create_model(
            "pvt_v2_b0", num_classes=len(CLASSES), depths=(2, 2), num_heads=(1, 2),
            embed_dims=(args.width // 2, args.width), sr_ratios=(2, 1), mlp_ratios=mlp_ratio,
        )  # fmt: skip
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=len(CLASSES), img_size=args.size, patch_size=4,
        embed_dim=args.width, depth=args.depth, num_heads=args.width // 32, global_pool="avg",
        class_token=False, mlp_ratio=mlp_ratio,
    )  # fmt: skip


def insert(model: nn.Module, arm: Arm, args: argparse.Namespace) -> nn.Module:
    """What the arm asks for, in place."""
    if arm.block is None:
        return model
    size: Any = {"input_size": (3, args.size, args.size)}
    plan = tc.plan(model, arm.block, allow_change=arm.block == "none", **size, **arm.options)
    if arm.position:
        for stage in range(2):
            side = args.size // (4 * 2**stage)
            plan += tc.plan(
                model, "abs_pos_embed", blocks=rf"stages\.{stage}\.blocks\.0$",
                site="before_block", size=(side, side), **size,
            )  # fmt: skip
    return tc.insert_(model, plan)


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def matched_ratio(name: str, width: int, depth: int, size: int) -> float:
    """How wide MLPs may be so that the model is no larger than the baseline's with a ratio of 4."""
    args, arm = argparse.Namespace(width=width, depth=depth, size=size), SCRATCH[name]
    baseline = SCRATCH[BASELINES["scratch"][arm.model]]
    with torch.device("meta"):
        wanted = count(insert(plain(arm.model, args), baseline, args))
        low, high = (
            count(insert(plain(arm.model, args, ratio), arm, args)) for ratio in (1.0, 4.0)
        )
    return 1 + 3 * (wanted - low) / (high - low)  # a hidden width is rounded down


def make_model(run: Run, args: argparse.Namespace) -> nn.Module:
    """The model of a run, with what is to be trained set."""
    arm = ARMS[run.setting][run.arm]
    if run.setting == "scratch":
        ratio = matched_ratio(run.arm, args.width, args.depth, args.size)
        torch.manual_seed(run.seed)
        model = insert(plain(arm.model, args, ratio), arm, args)
        return (
            Segmenter(model, LinearHead, len(MASK_CLASSES)) if run.task == "segmentation" else model
        )
    base = base_file(run.seed, args)
    torch.manual_seed(run.seed)
    model = plain(arm.model, args)
    load_model(model, str(base))
    insert(model, arm, args)
    if arm.block is None:
        model.requires_grad_(False)
    else:
        tc.trainable_(model, "inserted")
    if run.task == "segmentation":
        return Segmenter(model, LinearHead, len(MASK_CLASSES))
    vit: Any = model
    vit.reset_classifier(len(CLASSES))
    return model


def base_file(seed: int, args: argparse.Namespace) -> Path:
    """Weights of the ViT that `adapt` freezes, trained now if they are not there."""
    names = ("size", "width", "depth", "scenes", "batch_size", "base_steps", "lr")
    told = "-".join(f"{getattr(args, name):g}" for name in names)
    path: Path = args.bases / f"vit-{told}-seed{seed}.safetensors"
    if not path.exists():
        torch.manual_seed(seed)
        model = plain("vit", args)
        train(model, Run("base", "classification", "vit", 1.0, seed), args.base_steps, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        save_model(model, str(draft))
        draft.replace(path)
    return path


# --- a run ---


@cache
def scenes(split: Split, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(N, 3, H, W)``, masks ``(N, H, W)`` and labels ``(N,)``, the first two of bytes."""
    made = [*DigitScenes(split, size=(size, size), length=length)]
    images, masks = (
        torch.stack([pil_to_tensor(getattr(one, part)) for one in made])
        for part in ("image", "mask")
    )
    return images, masks[:, 0], torch.tensor([one.label for one in made])


def batch_of(
    data: tuple[Tensor, Tensor, Tensor], which: Any, run: Run, device: str
) -> tuple[Any, Any]:
    """Images in -1 to 1, negatives for another domain, and what is to be said of them."""
    images = data[0][which].to(device).float() / 127.5 - 1
    target = data[1 + (run.task == "classification")][which].to(device).long()
    is_negative = run.setting == "adapt" and run.task == "classification"
    return -images if is_negative else images, target


def train(
    model: nn.Module, run: Run, steps: int, args: argparse.Namespace
) -> list[tuple[int, float]]:
    """Train what requires a gradient; the metric on test scenes along the way."""
    data = scenes("train", args.scenes, args.size)
    held_out = scenes("test", args.test_scenes, args.size)
    order = torch.Generator().manual_seed(run.seed)
    chosen = torch.randperm(args.scenes, generator=order)[: round(run.fraction * args.scenes)]
    model.to(args.device)
    lr = args.adapt_lr if run.setting == "adapt" else args.lr
    optimizer = torch.optim.AdamW(tc.param_groups(model, lr=lr, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=0.1,
    )
    curve = []
    for step in range(1, steps + 1):
        which = chosen[torch.randint(len(chosen), (args.batch_size,), generator=order)]
        images, target = batch_of(data, which, run, args.device)
        loss = functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step * POINTS // steps > (step - 1) * POINTS // steps:
            curve.append((step, evaluate(model, held_out, run, args)))
    return curve


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: tuple[Tensor, Tensor, Tensor], run: Run, args: argparse.Namespace
) -> float:
    """Share of right answers, or mean IoU over background and ten digits."""
    model.eval()
    count = len(CLASSES) if run.task == "classification" else len(MASK_CLASSES)
    metric = METRICS[run.task][1](count).to(args.device)
    for which in torch.arange(len(data[0])).split(256):
        images, target = batch_of(data, which, run, args.device)
        metric.update(model(images).argmax(1), target)
    model.train()
    return float(metric.compute())


def perform(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    model = make_model(run, args)
    begun = time.perf_counter()
    curve = train(model, run, args.steps, args)
    return {
        **asdict(run),
        "params": count(model),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": [(step, round(value, 5)) for step, value in curve],
        "seconds": round(time.perf_counter() - begun, 1),
    }


# --- all runs ---


def all_runs(args: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, so that what is there when it is interrupted is of all arms."""
    for seed in range(args.seeds):
        for setting, task in _pairs(vars(args)):
            for fraction, arm in product(FRACTIONS, ARMS[setting]):
                yield Run(setting, task, arm, fraction, seed)


def perform_all(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Every run that the result does not hold yet; the file is written after each."""
    missing = [run for run in all_runs(args) if run.key not in result["runs"]]
    session = len(result["sessions"]) - 1
    # A thread each: those of several processes would wait for each other.
    with ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        if "adapt" in args.settings:
            seeds = range(args.seeds)
            for _ in tqdm(pool.map(base_file, seeds, repeat(args)), "bases", len(seeds)):
                pass
        running = {pool.submit(perform, run, args): run for run in missing}
        try:
            for done in tqdm(as_completed(running), "runs", len(running), unit="run"):
                result["runs"][running[done].key] = {**done.result(), "session": session}
                write_json(args.out, result)
        finally:
            pool.shutdown(cancel_futures=True)  # one that fails does not wait for the others


# --- what was found ---


@dataclass(frozen=True)
class Mean:
    """Mean over seeds with its 95 % interval, from Student's t."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of independent runs."""
        if len(values) < 2:
            return cls(statistics.fmean(values), float("inf"))
        quantile = float(student.ppf(0.975, len(values) - 1))
        return cls(
            statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5
        )


def curves(
    result: Mapping[str, Any], setting: str, task: str, arm: str, fraction: float
) -> list[Any]:
    """Learning curves, seed by seed."""
    runs = result["runs"]
    keys = [
        Run(setting, task, arm, fraction, seed).key for seed in range(result["settings"]["seeds"])
    ]
    return [runs[key]["curve"] for key in keys]


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """At the end of training: every arm beside its baseline, seed by seed."""
    rows = []
    settings = result["settings"]
    for setting, task in _pairs(settings):
        for (arm, what), fraction in product(ARMS[setting].items(), FRACTIONS):
            baseline = BASELINES[setting][what.model]
            own, base = (
                [curve[-1][1] for curve in curves(result, setting, task, name, fraction)]
                for name in (arm, baseline)
            )
            differences = [a - b for a, b in zip(own, base, strict=True)]
            first = result["runs"][Run(setting, task, arm, fraction, 0).key]
            rows.append({
                "setting": setting, "task": task, "metric": METRICS[task][0], "arm": arm,
                "scenes": round(fraction * settings["scenes"]), "params": first["params"],
                "trained": first["trained"], "value": asdict(Mean.of(own)), "baseline": baseline,
                "difference": None, "verdict": "baseline",
            })  # fmt: skip
            if arm != baseline:
                rows[-1] |= {"difference": asdict(Mean.of(differences)), "p": _p(differences)}
    compared = sorted((row for row in rows if row["difference"]), key=lambda row: row["p"])
    holds = True
    for rank, row in enumerate(compared):  # Holm's procedure
        holds = holds and row["p"] * (len(compared) - rank) <= 0.05
        better = "better" if row["difference"]["mean"] > 0 else "worse"
        row["verdict"] = better if holds else "not shown"
    return rows


def _p(differences: Sequence[float]) -> float:
    """Of Student's paired test; 1 where nothing can be said."""
    found: Any = ttest_1samp(differences, 0.0)
    return 1.0 if math.isnan(found.pvalue) else float(found.pvalue)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table per setting and task, for a README; in per cent."""
    parts = []
    groups = dict.fromkeys((row["setting"], row["task"]) for row in rows)
    for setting, task in groups:
        own = [row for row in rows if (row["setting"], row["task"]) == (setting, task)]
        amounts = list(dict.fromkeys(row["scenes"] for row in own))
        parts.append(f"**{setting}, {task}** ({METRICS[task][0]} in %)\n")
        heads = ["arm", "trained", *(f"{amount} scenes" for amount in amounts)]
        parts.append("| " + " | ".join(heads) + " |\n|---|---:|" + "---|" * len(amounts))
        for arm in dict.fromkeys(row["arm"] for row in own):
            cells = [_cell(row) for row in own if row["arm"] == arm]
            trained = next(row["trained"] for row in own if row["arm"] == arm)
            parts.append(f"| {arm} | {trained / 1e3:.1f} k | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _pairs(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(setting, task) for setting in settings["settings"] for task in settings["tasks"]]


def _cell(row: Mapping[str, Any]) -> str:
    mean = f"{100 * row['value']['mean']:.1f}"
    if row["difference"] is None:
        return f"{mean} ± {100 * row['value']['half']:.1f}"
    difference = row["difference"]
    change = f"{100 * difference['mean']:+.1f} ± {100 * difference['half']:.1f}"
    return f"{mean} ({change}, {row['verdict']})"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Learning curves, means with their intervals, as pictures beside the file of the result."""
    settings = result["settings"]
    panels = _pairs(settings)
    figure = Figure(figsize=(13, 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(FRACTIONS), squeeze=False, sharey="row")
    for (setting, task), line in zip(panels, axes, strict=True):
        for fraction, axis in zip(FRACTIONS, line, strict=True):
            for number, (arm, what) in enumerate(ARMS[setting].items()):
                points = [*zip(*curves(result, setting, task, arm, fraction), strict=True)]
                steps = [of_seeds[0][0] for of_seeds in points]
                means = [Mean.of([100 * value for _, value in of_seeds]) for of_seeds in points]
                style = "--" if what.model == "pvt" else "-"
                color = "black" if arm in BASELINES[setting].values() else f"C{number}"
                axis.plot(steps, [one.mean for one in means], style, color=color, label=arm)
                axis.fill_between(
                    steps, [one.mean - one.half for one in means],
                    [one.mean + one.half for one in means], color=color, alpha=0.12, linewidth=0,
                )  # fmt: skip
            axis.set_title(f"{setting}, {task}, {round(fraction * settings['scenes'])} scenes")
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"{METRICS[task][0]} on test scenes, %")
        line[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_figure(figure, path)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--settings", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--tasks", nargs="+", choices=tuple(METRICS), default=list(METRICS))
    for name, value, text in (
        ("seeds", 5, "of weights and batches"), ("steps", 600, "of each run"),
        ("base-steps", 4000, "of the ViTs that are frozen"),
        ("batch-size", 32, "scenes of a step"), ("scenes", 8192, "to train on, at most"),
        ("test-scenes", 1024, "to be judged by"), ("size", 24, "rows and columns of a scene"),
        ("width", 64, "of the models"), ("depth", 3, "of the ViTs"),
        ("workers", 1, "runs at a time, each in a process"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, at its peak")
    parser.add_argument("--adapt-lr", type=float, default=1e-2, help="the same, for adapt")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--bases", type=Path, default=Path("runs/accuracy"), help="frozen ViTs, kept"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON; curves lie beside it")
    return parser.parse_args(words)


def open_result(args: argparse.Namespace) -> dict[str, Any]:
    """What is there of this benchmark, or nothing yet."""
    own = ("bases", "out", "workers")
    settings = {name: value for name, value in vars(args).items() if name not in own}
    now = facts(torch.device(args.device))
    if not args.out.exists():
        return {"settings": settings, "sessions": [now], "runs": {}}
    result = json.loads(args.out.read_text())
    if result["settings"] != settings:
        sys.exit(f"error: {args.out} has other settings: {result['settings']}: take another --out")
    result["sessions"].append(now)
    return result


def main() -> None:
    """Run what is missing, and tell what was found."""
    args = parse()
    result = open_result(args)
    perform_all(args, result)
    result["summary"] = summary(result)
    write_json(args.out, result)
    draw(result, args.out)
    print(markdown(result["summary"]))


if __name__ == "__main__":
    main()
