"""How fast does a model answer once it has left Python, and how much memory does that take?

    python benchmarks/deploy.py --out benchmarks/results/0.1.0/deploy.json

One photograph at a time. ``eager`` is the model as ``fold_`` leaves it, ``unfolded`` as training
does, ``compiled`` by ``torch.compile``; ``aoti``, ``onnx`` and ``onnx_int8`` are the files that
``tokenconv.export`` writes, run by AOTInductor and ONNX Runtime. All run in turn in one process;
before that their outputs are compared. Those of eight bits may be off by half of the largest, as
random networks without shortcuts multiply rounding from layer to layer; how far they are is in the
result. Memory is the largest that a process of its own holds which loads the model and runs it ten
times, libraries included.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from common import (
    add_options,
    check_alike,
    compiled,
    let_norms_know,
    medians,
    medians_with_iqr,
    set_up,
    time_arms,
    write_json,
)
from torch import Tensor, nn
from tqdm import tqdm

import tokenconv as tc
from tokenconv.cli.inputs import load_images
from tokenconv.reports.table import aligned
from tokenconv.surgery import inserted_modules

QUESTION = (__doc__ or "").splitlines()[0]
MODELS = ("vit_tiny_patch16_224", "vit_tiny_patch16_224+mix_ffn", "pvt_v2_b0", "mobilenetv1_100")
ARMS = ("unfolded", "eager", "compiled", "aoti", "onnx", "onnx_int8")
PAIRS = (
    ("unfolded", "eager"),
    ("eager", "compiled"),
    ("compiled", "aoti"),
    ("compiled", "onnx"),
    ("onnx", "onnx_int8"),
)
TOLERANCE, INT8_TOLERANCE = 1e-4, 0.5
_PEAK = """
print([int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
_TORCH = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
images = torch.zeros(1, 3, 224, 224)
with torch.inference_mode():
    model = {load}
    for _ in range(10):
        model(images)
"""
_MODEL = """
import sys, timm
import tokenconv as tc
base, _, block = sys.argv[1].partition("+")
model = timm.create_model(base).eval()
if block:
    tc.fold_(tc.insert_(model, block))
"""
_ONNX = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options)
for _ in range(10):
    session.run(None, {"images": numpy.zeros((1, 3, 224, 224), numpy.float32)})
"""
PROCESSES = {
    "eager": _MODEL + _TORCH.format(load="model"),
    "compiled": _MODEL + _TORCH.format(load="torch.compile(model)"),
    "aoti": _TORCH.format(load="torch._inductor.aoti_load_package(sys.argv[1])"),
    "onnx": _ONNX,
    "onnx_int8": _ONNX,
}
"""What a process does to have and run an arm; its words are a name or a file, and threads."""


def make(name: str) -> nn.Module:
    """A model with random weights, and with a block behind a plus sign."""
    base, _, block = name.partition("+")
    model = timm.create_model(base).eval()
    let_norms_know(model, photographs(model, 2))
    if block:
        tc.insert_(model, block)
        for own in inserted_modules(model).values():
            for parameter in own.parameters():
                nn.init.normal_(parameter, std=0.1)  # as if trained: they begin as zeros
    return model.eval()


def photographs(model: nn.Module, count: int) -> Tensor:
    """As the model wants them, each followed by itself upside down and mirrored."""
    two = load_images(model, None, 2)
    return torch.cat([two, two.flip(-1), two.flip(-2), two.flip(-1, -2)])[:count]


@dataclass(frozen=True)
class Case:
    """A model, in every way that it is run."""

    model: str
    threads: int
    arms: dict[str, Callable[[Tensor], Tensor]]
    files: dict[str, Path]
    """Those of what has left Python."""
    images: Tensor

    def __str__(self) -> str:
        return f"{self.model}, {self.threads} threads"

    def check(self) -> dict[str, float]:
        """The largest differences from the model.

        Raises:
            ValueError: If an arm computes something else.
        """
        results = {name: [arm(self.images)] for name, arm in self.arms.items()}
        rounded = results.pop("onnx_int8")
        several = {"eager": results["eager"], "onnx_int8": rounded}
        return {
            "float": check_alike(results, TOLERANCE, f"logits of {self}"),
            "int8": check_alike(several, INT8_TOLERANCE, f"logits of {self}"),
        }

    def steps(self) -> dict[str, Callable[[], object]]:
        """The work of every arm."""
        return {name: partial(arm, self.images) for name, arm in self.arms.items()}

    def peaks(self) -> dict[str, int]:
        """Bytes that a process of its own holds at most, by arm."""
        return {
            arm: peak_of(program, str(self.files.get(arm, self.model)), self.threads)
            for arm, program in PROCESSES.items()
        }


def case_of(name: str, threads: int, folder: Path) -> Case:
    """Export a model to every target, and load it again."""
    torch.set_num_threads(threads)  # which what is compiled is made for
    model = make(name)
    images = photographs(model, 8)
    arms: dict[str, Callable[[Tensor], Tensor]] = {}
    if inserted_modules(model):
        arms["unfolded"] = _without_gradients(copy.deepcopy(model))
        tc.fold_(model)
    files = {
        "aoti": folder / "aoti.pt2",
        "onnx": folder / "float.onnx",
        "onnx_int8": folder / "int8.onnx",
    }
    fixed: dict[str, Any] = {"input_size": images.shape[1:], "dynamic": ()}
    tc.export(model, files["onnx"], **fixed)
    tc.export(model, files["onnx_int8"], calibration=images, tolerance=INT8_TOLERANCE, **fixed)
    tc.export(model, files["aoti"], to="aoti", **fixed)
    arms |= {
        "eager": _without_gradients(model),
        "compiled": _without_gradients(compiled(model)),
        "aoti": _without_gradients(torch._inductor.aoti_load_package(str(files["aoti"]))),
        "onnx": _session(files["onnx"], threads),
        "onnx_int8": _session(files["onnx_int8"], threads),
    }
    return Case(name, threads, arms, files, images[:1])


def _without_gradients(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(lambda images: model(images))


def _session(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait by counting would take the cores from the arm that comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def peak_of(program: str, what: str, threads: int) -> int:
    """Bytes that a process holds at most."""
    words = [sys.executable, "-c", program + _PEAK, what, str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Export, compare, time, and run by itself, every model.

    Raises:
        ValueError: If arms do not compute the same.
    """
    todo = [(name, threads) for name in args.models for threads in args.threads_of_arms]
    for name, threads in tqdm(todo, unit="case"):
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as folder:
            case = case_of(name, threads, Path(folder))
            difference = case.check()
            total = len(case.arms) * (args.warmup + args.repeats)
            with tqdm(total=total, unit="step", desc=str(case), leave=False) as bar:
                timed = time_arms(case.steps(), args, PAIRS, bar)
            peaks = case.peaks()
            sizes = {arm: path.stat().st_size for arm, path in case.files.items()}
        yield {
            "model": name, "threads": threads, "difference": difference, "peak_bytes": peaks,
            "file_bytes": sizes, **timed,
        }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians in milliseconds, ratios with interquartile ranges in brackets, peaks in MiB."""
    ratios = [f"{one}/{other}" for one, other in PAIRS]
    lines = [["model", "threads", *(f"{arm} ms" for arm in ARMS), *ratios,
              *(f"{arm} MiB" for arm in PROCESSES)]]  # fmt: skip
    for row in rows:
        peaks = row["peak_bytes"]
        lines.append([
            row["model"], str(row["threads"]),
            *medians(row["latency_ms"], ARMS), *medians_with_iqr(row["ratio"], ratios),
            *(f"{peaks[arm] / 2**20:.0f}" for arm in PROCESSES),
        ])  # fmt: skip
    return aligned(lines, keys=2)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=QUESTION)
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads-of-arms", type=int, nargs="+", default=[1, 2])
    parser.set_defaults(repeats=50, warmup=5)
    args = parser.parse_args(words)
    if args.device != "cpu" or args.dtype != "float32":
        parser.error("files are run on the CPU, in float32")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code, 1 if the arms do not agree.
    """
    args = parse(words)
    facts = set_up(args)
    facts["versions"] |= {"onnxruntime": onnxruntime.__version__}
    torch.manual_seed(0)
    try:
        rows = [*measure(args)]
    except (ValueError, tc.ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if args.out:
        write_json(args.out, {"question": QUESTION, **facts, "rows": rows})
        print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
