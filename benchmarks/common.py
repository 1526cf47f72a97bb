"""What every benchmark shares: options, timing, facts about the machine and the result file."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenconv.profiling import Spread, machine, steady_allocator
from tokenconv.profiling.measurement import Rounds, time_interleaved

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
    if args.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # or float32 would not mean the same in every arm
    return {
        **facts(torch.device(args.device)),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "warmup": args.warmup,
    }


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
        "load_average_before": round(machine.load(), 2),
        "versions": machine.versions(),
    }


def time_arms(
    arms: Mapping[str, Callable[[], object]],
    args: argparse.Namespace,
    over: str,
    bar: "tqdm[Any]",
) -> dict[str, Any]:
    """Time every arm in every round, in random order.

    Args:
        arms: What to time, by name; each call does the work once.
        args: The options of ``add_options``.
        over: The arm that the others are divided by, round by round.
        bar: Advanced by one per call.

    Returns:
        Spreads of ``latency_ms`` per arm, and of ``ratio_to_<over>`` per other arm.
    """
    timing = time_interleaved(
        arms,  # pyright: ignore[reportArgumentType]  # asks for Step, and only calls it
        rounds=Rounds.exactly(args.repeats, baseline=over, warmup=args.warmup),
        device=torch.device(args.device),
        tick=bar.update,
    )
    if timing.failures:
        sys.exit(f"error: {timing.failures}")
    samples = timing.samples_ms
    return {
        "latency_ms": {name: asdict(Spread.of(own)) for name, own in samples.items()},
        f"ratio_to_{over}": {
            name: asdict(Spread.of([a / b for a, b in zip(own, samples[over], strict=True)]))
            for name, own in samples.items()
            if name != over
        },
    }


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns; the first two lean left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is either there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


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
