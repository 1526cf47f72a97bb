"""What does depthwise convolution with its activation cost on tokens, in each way of writing it?

    python benchmarks/kernels.py --out benchmarks/results/0.1.0/kernels.json
    python benchmarks/kernels.py --device cuda --dtype bfloat16 --out ...

The ways, or arms, are those of ``kernel_arms.py``; they share inputs and weights. Outputs and
gradients are compared before anything is timed.

On a GPU a step of an arm is a CUDA graph of many calls, over buffers that together are four times
as large as its cache; what Python and dispatch take is measured apart.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from common import (
    Spread,
    add_options,
    check_alike,
    peak_bytes,
    set_up,
    time_arms,
    write_json,
)
from kernel_arms import (
    ACTIVATIONS,
    COMPARED,
    LIMITS,
    Arm,
    Buffer,
    Case,
    Layer,
    arms_of,
    ours,
    own_arm,
    timm,
)
from kernel_report import draw, summary, summary_table, table
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest difference between arms, as a share of the largest value."""
FOOTPRINT = 4
"""Inputs that are gone through in turn on a GPU, in sizes of its cache."""
STEP_BYTES = 2**30
"""Of the inputs of all calls in a step on a GPU, so that its launch does not count."""


def _with_prefix(*shapes: str) -> tuple[Case, ...]:
    return tuple(Case.parse(shape + prefix) for shape in shapes for prefix in ("", "+1"))


CASES = {
    "cpu": (
        *_with_prefix(
            "8x14x14x1536", "4x56x56x256", "32x14x14x768", "1x14x14x3072", "1x56x56x256"
        ),
        Case.parse("8x14x14x1536/98"),
        Case.parse("2x37x28x1536/518"),
    ),
    "cuda": _with_prefix(
        "64x14x14x1536", "64x14x14x3072", "64x56x56x512", "64x28x28x1024", "64x14x14x1280",
        "64x112x112x512", "64x14x14x64",
    ),
}  # fmt: skip
TINY = Case(1, 14, 14, 64)
RESOLUTIONS = tuple((7 + 3 * i, 9 + 2 * i) for i in range(20))
QUESTION = (__doc__ or "").splitlines()[0]


# --- what is done with an arm ---


def forward(arm: Arm, layer: Layer, buffer: Buffer) -> tuple[Tensor | None, ...]:
    """The output."""
    with torch.inference_mode():
        return (arm(buffer[0]),)


def forward_backward(arm: Arm, layer: Layer, buffer: Buffer) -> tuple[Tensor | None, ...]:
    """The output and all gradients."""
    x, grad_out = buffer
    out = arm(x)
    leaves = [x, *layer.conv.parameters()]
    return out, *torch.autograd.grad(out, leaves, grad_out, allow_unused=True)


MODES = {"forward": forward, "forward+backward": forward_backward}


def saved_bytes(arm: Arm, layer: Layer, buffer: Buffer) -> int:
    """What is kept for the backward pass, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in layer.conv.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = arm(buffer[0])
    del out  # until here nothing that was kept is freed, and no address used again
    return sum(kept.values())


def capture(
    work: Callable[[Buffer], object], buffers: Sequence[Buffer], calls: int, pool: Any
) -> Callable[[], None]:
    """A CUDA graph of calls over the buffers in turn: its replay takes no time in Python.

    Args:
        work: One call.
        buffers: What it is given.
        calls: How many.
        pool: Memory that other graphs may use as well, since no result is read.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for buffer in buffers[:2]:
            work(buffer)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    results: dict[int, object] = {}  # kept, or all calls would write to one place in the cache
    with torch.cuda.graph(graph, pool=pool):
        for i in range(calls):
            which = i % len(buffers)
            results[which] = work(buffers[which])
    return graph.replay


# --- what is measured ---


def compare(layer: Layer, args: argparse.Namespace) -> dict[str, float]:
    """The largest difference between arms, by mode.

    Raises:
        ValueError: If arms do not compute the same.
    """
    (buffer,) = layer.buffers(1)
    found = {}
    for mode, work in MODES.items():
        arms = arms_of(layer, mode, args)
        results = {name: work(arms[name], layer, buffer) for name in COMPARED if name in arms}
        what = f"{layer.case} {mode} in {args.dtype}"
        found[mode] = check_alike(results, TOLERANCE[args.dtype], what) if results else 0.0
    return found


def measure_case(layer: Layer, mode: str, args: argparse.Namespace, bar: "tqdm[Any]") -> Any:
    """Memory and times of all arms on a case in a mode."""
    arms, calls, count = arms_of(layer, mode, args), 1, 1
    size = math.prod(layer.case.shape) * layer.conv.weight.element_size()
    if args.device == "cuda":
        cache = torch.cuda.get_device_properties(layer.device).L2_cache_size
        count = math.ceil(FOOTPRINT * cache / size)
        calls = max(count, STEP_BYTES // size)
    buffers = layer.buffers(count)
    works = {name: partial(MODES[mode], arm, layer) for name, arm in arms.items()}
    found: dict[str, Any] = {"input_bytes": size, "buffers": count, "calls": calls}
    if mode != "forward":
        found["saved_bytes"] = {
            name: saved_bytes(arm, layer, buffers[0]) for name, arm in arms.items()
        }
    if args.device == "cuda":
        found["peak_bytes"] = {
            name: peak_bytes(partial(work, buffers[0])) for name, work in works.items()
        }
        pool = torch.cuda.graph_pool_handle()
        steps = {name: capture(work, buffers, calls, pool) for name, work in works.items()}
    else:
        steps = {name: partial(work, buffers[0]) for name, work in works.items()}
    own = own_arm(args.device)
    pairs = [(name, own) for name in arms if name != own]
    pairs.append(("timm_compiled", f"{own}_compiled"))
    return found | time_arms(steps, args, pairs, bar, calls)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare, then time, the arms on every case in both modes.

    Raises:
        ValueError: If they do not compute the same, or one cannot take a case.
    """
    layers = [Layer.of(case, args) for case in args.shapes]
    differences = [compare(layer, args) for layer in tqdm(layers, "comparing")]
    each = args.warmup + args.repeats
    total = sum(len(arms_of(layer, mode, args)) for layer in layers for mode in MODES) * each
    rows = []
    with tqdm(total=total, unit="step", desc="timing") as bar:
        for layer, difference in zip(layers, differences, strict=True):
            for mode in MODES:
                bar.set_postfix_str(f"{layer.case} {mode}")
                about = {"case": str(layer.case), **asdict(layer.case), "mode": mode}
                about["largest_difference"] = difference[mode]
                rows.append(about | measure_case(layer, mode, args, bar))
    return rows


def host_us(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of Python and dispatch in a tiny call, while the GPU works on by itself."""
    layer, calls = Layer.of(TINY, args), 100
    ((x, _),) = layer.buffers(1)
    fmap = x.unflatten(1, (TINY.rows, TINY.cols)).permute(0, 3, 1, 2)
    weight, bias, padding = layer.conv.weight, layer.conv.bias, args.kernel_size // 2
    arms = {
        "F.conv2d": lambda x: functional.conv2d(
            fmap, weight, bias, padding=padding, groups=TINY.dim
        ),
        "timm": timm(layer),
        "ours": ours(layer),
        "triton": ours(layer, "triton"),
    }
    found = {}
    for mode, with_grad in (("inference", False), ("training", True)):
        samples: dict[str, list[float]] = {name: [] for name in arms}
        with torch.inference_mode(not with_grad):
            for _ in range(args.repeats):
                for name in random.sample([*arms], len(arms)):
                    torch.cuda.synchronize()
                    begun = time.perf_counter()
                    for _ in range(calls):
                        arms[name](x)
                    samples[name].append(1e6 * (time.perf_counter() - begun) / calls)
        found[mode] = {name: asdict(Spread.of(own)) for name, own in samples.items()}
    return found


def count_compilations(args: argparse.Namespace) -> dict[str, int]:
    """Versions of our kernels that Triton compiles for twenty sizes, and then for gradients."""
    counts = {}
    for mode, work in MODES.items():
        before = versions_of_kernels()
        for rows, cols in RESOLUTIONS:
            layer = Layer.of(Case(2, rows, cols, TINY.dim), args)
            (buffer,) = layer.buffers(1)
            work(ours(layer, "triton"), layer, buffer)
        counts[mode] = versions_of_kernels() - before
    return counts


def versions_of_kernels() -> int:
    """Compiled versions of our kernels in this process."""
    from tokenconv.ops.depthwise_conv import triton_kernels

    kernels = [
        kernel for kernel in vars(triton_kernels).values() if hasattr(kernel, "device_caches")
    ]
    return sum(len(own[0]) for kernel in kernels for own in kernel.device_caches.values())


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=QUESTION)
    add_options(parser)
    parser.add_argument("--shapes", type=Case.parse, nargs="+", help="BxHxWxC[+P][/L]")
    parser.add_argument("--arms", nargs="+", choices=(*COMPARED, *LIMITS), help="default: all")
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), default="gelu")
    parser.add_argument("--kernel-size", type=int, default=3)
    args = parser.parse_args(words)
    if args.device == "cpu" and (own := [a for a in args.arms or () if a.startswith("triton")]):
        parser.error(f"{', '.join(own)}: Triton makes no code for CPUs; take --device cuda")
    args.shapes = args.shapes or CASES[args.device]
    args.arms = args.arms or [
        name for name in (*COMPARED, *LIMITS)
        if args.device == "cuda" or not name.startswith("triton")
    ]  # fmt: skip
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code, 1 if the arms do not agree.
    """
    args = parse(words)
    result: dict[str, Any] = {
        "question": QUESTION, **set_up(args), "activation": args.activation,
        "kernel_size": args.kernel_size,
    }  # fmt: skip
    torch.manual_seed(0)
    try:
        if args.device == "cuda":
            result |= {"compilations": count_compilations(args), "host_us": host_us(args)}
        result["rows"] = rows = measure(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["summary"] = summary(rows, own_arm(args.device))
    print(table(rows), summary_table(result["summary"]), sep="\n\n")
    if args.device == "cuda":
        for mode, of_mode in result["host_us"].items():
            calls = [f"{name} {spread['median']:.1f}" for name, spread in of_mode.items()]
            print(f"host, {mode}, microseconds a call: {', '.join(calls)}")
        print(f"kernels compiled for {len(RESOLUTIONS)} sizes: {result['compilations']}")
    if args.out:
        write_json(args.out, result)
        draw(result, args.out)
        print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
