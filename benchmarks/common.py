"""What every benchmark shares: options, timing, facts about the machine and the result file."""

import argparse
import io
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from operator import truediv
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

if find_spec("matplotlib") is None:
    # The package draws reports; what measures needs torch alone, and is imported without the rest.
    package = sys.modules["tokenconv.profiling"] = ModuleType("tokenconv.profiling")
    package.__path__ = [str(Path(__file__).parents[1] / "tokenconv" / "profiling")]

from tokenconv.profiling import machine
from tokenconv.profiling.measurement import Rounds, Spread, steady_allocator, time_interleaved

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--repeats", type=_positive, default=200, help="rounds that count")
    parser.add_argument("--warmup", type=_positive, default=20, help="rounds before them")
    parser.add_argument("--quick", action="store_true", help="5 rounds: shows that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--threads", type=_positive, help="CPU threads; default: as PyTorch chooses"
    )
    parser.add_argument(
        "--allocator",
        choices=("steady", "system"),
        default="steady",
        help="on CPU: keep freed memory, or do what the system does",
    )
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="on CUDA: cuDNN tries all it has first"
    )
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")


def set_up(args: argparse.Namespace) -> dict[str, Any]:
    """Apply the options to this process.

    Returns:
        What a result has to be read with: machine, code, versions and settings.
    """
    if args.quick:
        args.repeats, args.warmup = 5, 1
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda was asked for, but PyTorch finds no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep = args.device == "cpu" and args.allocator == "steady"
    allocator = steady_allocator() if keep else "as the system has it"
    settings = {
        **facts(torch.device(args.device)),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "warmup": args.warmup,
    }
    if args.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # or float32 would not mean the same in every arm
        torch.backends.cudnn.benchmark = settings["cudnn_benchmark"] = args.cudnn_benchmark
        settings["versions"] |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": import_module("triton").__version__ if find_spec("triton") else None,
        }
    return settings


def facts(device: torch.device) -> dict[str, Any]:
    """Machine, code and versions."""
    changed = _git("status", "--porcelain", "--", "tokenconv", "benchmarks/*.py", "examples/*.py")
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted": [line.split()[-1] for line in (changed or "").splitlines()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": machine.device_name(device),
        "cpus": os.cpu_count(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
        "load_average_before": round(machine.load(), 2),
        "versions": machine.versions(),
    }


def _matters(name: str) -> bool:
    """Whether a variable of the environment says what PyTorch computes with.

    Where it keeps files it sets itself, once something was compiled.
    """
    names_folder = name.endswith(("_DIR", "_HOME"))
    return (
        name.startswith(("ATEN_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "TORCH")) and not names_folder
    )


def compiled(work: Any) -> Any:
    """``torch.compile`` for the shapes that come, as many as there are, or an error."""
    torch._dynamo.config.recompile_limit = 1000  # beyond it everything runs uncompiled
    return torch.compile(work, dynamic=False, fullgraph=True)


@torch.no_grad()
def let_norms_know(model: nn.Module, images: Tensor) -> None:
    """Give BatchNorms the statistics of images: values that vanish are slow to compute."""
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the next batch decides
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def check_alike(
    results: Mapping[str, Sequence[Tensor | None]], allowed: float, what: str, least: float = 0.0
) -> float:
    """Compare what arms return with what the first of them does.

    Args:
        results: Tensors of every arm; None, where there should be one, differs.
        allowed: Largest difference, as a share of the largest value of its tensor.
        what: Was computed, for the error.
        least: Tensors with smaller values than this share of the largest of all count as so large.

    Returns:
        The largest difference.

    Raises:
        ValueError: If it is too large.
    """
    (first, expected), *others = results.items()
    sizes = [0.0 if one is None else float(one.detach().abs().max()) for one in expected]
    sizes = [max(size, least * max(sizes)) for size in sizes]
    shares = {first: 0.0} | {name: _difference(own, expected, sizes) for name, own in others}
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] > allowed:
        raise ValueError(
            f"{worst} differs from {first} by {shares[worst]:.1e} of the largest value on {what}, "
            f"allowed are {allowed:.0e}: not timed"
        )
    return shares[worst]


def _difference(
    own: Iterable[Tensor | None], expected: Iterable[Tensor | None], sizes: Iterable[float]
) -> float:
    largest = 0.0
    for got, wanted, size in zip(own, expected, sizes, strict=True):
        if got is None or wanted is None or got.shape != wanted.shape:
            return math.inf
        share = (got.detach().double() - wanted.detach()).abs().max() / size
        largest = max(largest, float(share.nan_to_num(math.inf)))
    return largest


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that work takes on the GPU, over what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def time_arms(
    arms: Mapping[str, Callable[[], object]],
    args: argparse.Namespace,
    pairs: Iterable[tuple[str, str]],
    bar: "tqdm[Any]",
    calls: int = 1,
) -> dict[str, Any]:
    """Time every arm in every round, in random order.

    Args:
        arms: What to time, by name.
        args: The options of ``add_options``.
        pairs: Arms of which the first is divided by the second, round by round, if both are there.
        bar: Advanced by one per step of an arm.
        calls: How often a step of an arm does the work.

    Returns:
        Spreads of ``latency_ms`` per arm, for doing the work once, and of ``ratio`` per pair.
    """
    timing = time_interleaved(
        arms,  # pyright: ignore[reportArgumentType]  # asks for Step, and only calls it
        rounds=Rounds.exactly(args.repeats, baseline="", warmup=args.warmup),
        device=torch.device(args.device),
        tick=bar.update,
    )
    if timing.failures:
        sys.exit(f"error: {timing.failures}")
    samples = {name: [ms / calls for ms in own] for name, own in timing.samples_ms.items()}
    return {
        "latency_ms": {name: asdict(Spread.of(own)) for name, own in samples.items()},
        "ratio": {
            f"{one}/{other}": asdict(Spread.of([*map(truediv, samples[one], samples[other])]))
            for one, other in pairs
            if one in samples and other in samples
        },
    }


def medians(spreads: Mapping[str, Any], names: Iterable[str], digits: int = 2) -> list[str]:
    """Cells with the median of each, empty where there is none."""
    return [f"{spreads[n]['median']:.{digits}f}" if n in spreads else "" for n in names]


def medians_with_iqr(spreads: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The same, with interquartile ranges in brackets."""
    return [
        f"{spreads[n]['median']:.3f} ({spreads[n]['iqr']:.3f})" if n in spreads else ""
        for n in names
    ]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is either there as a whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG and SVG beside a file, always in the same bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "tokenconv"}):
        for kind, origin in (("png", "Software"), ("svg", "Date")):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=110, metadata={origin: None})
            write_whole(path.with_suffix(f".{kind}"), picture.getvalue())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _git(*words: str) -> str | None:
    """What git says of this checkout, None if this is none."""
    here = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        done = subprocess.run(["git", *here, *words], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
