"""What does depthwise convolution with its activation cost on tokens, in each way of writing it?

    python benchmarks/kernels.py --out benchmarks/results/0.1.0/kernels.json
    python benchmarks/kernels.py --device cuda --dtype bfloat16 --out ...

Shape letters: B batch, N tokens = P prefix + H*W grid, C channels, K kernel side.

All arms share inputs and weights. ``naive`` copies the tokens to NCHW and back, ``timm`` makes the
calls that timm makes in PVTv2, ``ours`` is ``tokenconv.depthwise_conv`` and ``triton`` the same
with our kernel. Class tokens skip the convolution: the first two slice and concatenate. Where only
some tokens are left, other ones in every image, they put them on a map of zeros and pick them from
the result, and ours gathers. Outputs and gradients are compared before anything is timed. ``copy``
(of the input) and ``activation`` (alone) read and write as many bytes as the whole must, at least:
they are the limit, and what a Transformer's MLP without convolution spends there.

On a GPU a step of an arm is a CUDA graph of many calls, over buffers that together are four times
as large as its cache; what Python and dispatch take is measured apart.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    Spread,
    add_options,
    check_alike,
    compiled,
    format_table,
    peak_bytes,
    set_up,
    time_arms,
    write_figure,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import tokenconv as tc

Arm = Callable[[Tensor], Tensor]
Buffer = tuple[Tensor, Tensor]
"""Tokens, and the gradient of what is made of them."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest difference between arms, as a share of the largest value."""
FOOTPRINT = 4
"""Inputs that are gone through in turn on a GPU, in sizes of its cache."""
STEP_BYTES = 2**30
"""Of the inputs of all calls in a step on a GPU, so that its launch does not count."""


@dataclass(frozen=True)
class Case:
    """One shape, written ``BxHxWxC``, with ``+P`` prefix tokens, or with ``/L`` tokens left."""

    batch_size: int
    rows: int
    cols: int
    dim: int
    num_prefix_tokens: int = 0
    left: int | None = None
    """Tokens that are left of every image; None for all."""

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read ``8x14x14x1536``, ``8x14x14x1536+1``, ``8x14x14x1536/98`` or ``...+1/98``."""
        shape, _, left = text.partition("/")
        shape, _, prefix = shape.partition("+")
        batch_size, rows, cols, dim = (int(number) for number in shape.split("x"))
        return cls(batch_size, rows, cols, dim, int(prefix or 0), int(left) if left else None)

    def __str__(self) -> str:
        prefix = f"+{self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        left = "" if self.left is None else f"/{self.left}"
        return f"{self.batch_size}x{self.rows}x{self.cols}x{self.dim}{prefix}{left}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, N, C)``."""
        left = self.rows * self.cols if self.left is None else self.left
        return self.batch_size, self.num_prefix_tokens + left, self.dim

    def kept(self, device: torch.device) -> Tensor:
        """Indices ``(B, L)`` of the tokens that are left, always the same ones."""
        drawn = torch.Generator().manual_seed(1)
        order = torch.rand(self.batch_size, self.rows * self.cols, generator=drawn).argsort(1)
        return order[:, : self.left].to(device)


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


@dataclass(frozen=True)
class Layer:
    """The weights that all arms of a case share, and the activation behind them."""

    case: Case
    conv: nn.Conv2d
    activation: str

    @classmethod
    def of(cls, case: Case, args: argparse.Namespace) -> "Layer":
        """A new one."""
        dim, side = case.dim, args.kernel_size
        conv = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim)
        return cls(case, conv.to(args.device, DTYPES[args.dtype]), args.activation)

    @cached_property
    def act(self) -> nn.Module:
        """The activation as torch has it."""
        return ACTIVATIONS[self.activation]()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.conv.weight.device

    def buffers(self, count: int) -> list[Buffer]:
        """Random tokens and gradients."""
        drawn = torch.Generator(self.device).manual_seed(0)
        make = partial(
            torch.randn, self.case.shape, generator=drawn, device=self.device,
            dtype=self.conv.weight.dtype,
        )  # fmt: skip
        return [(make().requires_grad_(), make()) for _ in range(count)]


# --- arms ---


def naive(layer: Layer) -> Arm:
    """As most code has it: real NCHW copies on both sides."""
    case, conv = layer.case, layer.conv

    def run(x: Tensor) -> Tensor:
        fmap = x.transpose(1, 2).reshape(len(x), case.dim, case.rows, case.cols).contiguous()
        return conv(fmap).contiguous().flatten(2).transpose(1, 2).contiguous()

    return _around(layer, run)


def timm(layer: Layer) -> Arm:
    """The calls that ``timm.models.pvt_v2.MlpWithDepthwiseConv`` makes around its convolution."""
    case, conv = layer.case, layer.conv

    def run(x: Tensor) -> Tensor:
        B, _, C = x.shape
        x = x.transpose(1, 2).view(B, C, case.rows, case.cols)
        x = conv(x)
        return x.flatten(2).transpose(1, 2)

    return _around(layer, run)


def ours(layer: Layer, impl: str | None = None) -> Arm:
    """``tokenconv.depthwise_conv``."""
    case, conv = layer.case, layer.conv
    grid: Any = tc.TokenGrid((case.rows, case.cols), case.num_prefix_tokens)
    if case.left is not None:
        kept = case.kept(layer.device)
        coords = torch.stack([kept // case.cols, kept % case.cols], dim=-1)
        grid = tc.SparseGrid(coords, case.num_prefix_tokens)
    activation = None if layer.activation == "none" else layer.activation
    return lambda x: tc.depthwise_conv(
        x, conv.weight, conv.bias, grid, activation=activation, impl=impl
    )


def _around(layer: Layer, run: Arm) -> Arm:
    """What code for full grids without prefix tokens does to be used elsewhere; activates."""
    case, act = layer.case, layer.act
    if case.left is not None:
        run = _on_zeros(case, case.kept(layer.device), run)
    P = case.num_prefix_tokens
    if P:
        return lambda x: act(torch.cat([x[:, :P], run(x[:, P:])], dim=1))
    return lambda x: act(run(x))


def _on_zeros(case: Case, kept: Tensor, run: Arm) -> Arm:
    index = kept[..., None].expand(-1, -1, case.dim)

    def around(x: Tensor) -> Tensor:
        whole = x.new_zeros(len(x), case.rows * case.cols, case.dim).scatter(1, index, x)
        return run(whole).gather(1, index)

    return around


COMPARED: dict[str, Callable[[Layer], Arm]] = {
    "naive": naive,
    "timm": timm,
    "timm_compiled": lambda layer: compiled(timm(layer)),
    "ours": ours,
    "ours_compiled": lambda layer: compiled(ours(layer)),
    "triton": partial(ours, impl="triton"),
    "triton_compiled": lambda layer: compiled(ours(layer, "triton")),
}
LIMITS: dict[str, Callable[[Layer], Arm]] = {
    "copy": lambda layer: Tensor.clone,
    "activation": lambda layer: layer.act,
}
"""They compute something else."""


def own_arm(device: str) -> str:
    """The arm that others are divided by."""
    return "triton" if device == "cuda" else "ours"


def arms_of(layer: Layer, mode: str, args: argparse.Namespace) -> dict[str, Arm]:
    """Those that were asked for, without those that have nothing to do here."""
    without = {name for name in args.arms if name.startswith("triton") and layer.case.left}
    if mode != "forward":
        without.add("copy")  # a gradient is handed on and not copied
    if layer.activation == "none":
        without.add("activation")
    makers = COMPARED | LIMITS
    return {name: makers[name](layer) for name in makers if name in {*args.arms} - without}


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


# --- what it comes to ---

GROUPS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "full grids": lambda row: row["left"] is None,
    "batch 1": lambda row: row["left"] is None and row["batch_size"] == 1,
    "prefix tokens": lambda row: row["left"] is None and row["num_prefix_tokens"] > 0,
    "missing tokens": lambda row: row["left"] is not None,
}
COSTS = ("backward/forward", "with/without prefix tokens", "saved bytes", "peak bytes")
"""Of these less is better, of all others more."""


def summary(rows: Sequence[Mapping[str, Any]], own: str) -> list[dict[str, Any]]:
    """Geometric mean and worst case of what an arm is judged by, for kinds of cases.

    Args:
        rows: Of ``measure``.
        own: The arm.
    """
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for what, row, value in _judged(rows, own):
        for group, belongs in GROUPS.items():
            if belongs(row):
                found.setdefault((what, row["mode"], group), {})[row["case"]] = value
    lines = []
    order = [*GROUPS]
    for (what, mode, group), values in sorted(
        found.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))
    ):
        worst = (max if what.startswith(COSTS) else min)(values, key=lambda case: values[case])
        mean = math.prod(values.values()) ** (1 / len(values))
        lines.append({"what": what, "mode": mode, "of": group, "cases": len(values),
                      "geomean": mean, "worst": values[worst], "worst_case": worst})  # fmt: skip
    return lines


def _judged(
    rows: Sequence[Mapping[str, Any]], own: str
) -> Iterator[tuple[str, Mapping[str, Any], float]]:
    """Each figure: what it is, the row it belongs to, its value."""
    ms = {(row["case"], row["mode"]): row["latency_ms"].get(own) for row in rows}
    for row in rows:
        for ratio in (f"timm/{own}", f"naive/{own}", f"timm_compiled/{own}_compiled"):
            if ratio in row["ratio"]:
                yield ratio, row, row["ratio"][ratio]["median"]
        if f"copy/{own}" in row["ratio"]:
            yield f"bandwidth {own}/copy", row, row["ratio"][f"copy/{own}"]["median"]
        for kind in ("saved_bytes", "peak_bytes"):
            arms = row.get(kind, {})
            if own in arms and "timm" in arms:
                yield f"{kind.replace('_', ' ')} {own}/timm", row, arms[own] / arms["timm"]
        mine = ms[row["case"], row["mode"]]
        if mine is None:
            continue
        ahead = ms.get((row["case"], "forward"))
        if row["mode"] != "forward" and ahead is not None:
            behind = max(mine["median"] - ahead["median"], 0.0)
            yield "backward/forward", row, behind / ahead["median"]
        plain = replace(Case.parse(row["case"]), num_prefix_tokens=0)
        without = ms.get((str(plain), row["mode"]))
        if row["num_prefix_tokens"] and without is not None:
            yield "with/without prefix tokens", row, mine["median"] / without["median"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians in milliseconds, and ratios with their interquartile ranges in brackets."""
    arms = [name for name in (*COMPARED, *LIMITS) if any(name in r["latency_ms"] for r in rows)]
    ratios = dict.fromkeys(
        ratio for row in rows for ratio in row["ratio"] if ratio.startswith(("naive", "timm"))
    )
    lines = [["BxHxWxC+P/L", "mode", *(f"{name} ms" for name in arms), *ratios]]
    for row in rows:
        times = [f"{row['latency_ms'][a]['median']:.3f}" if a in row["latency_ms"] else ""
                 for a in arms]  # fmt: skip
        spreads = [row["ratio"].get(ratio) for ratio in ratios]
        paired = [f"{s['median']:.3f} ({s['iqr']:.3f})" if s else "" for s in spreads]
        lines.append([row["case"], row["mode"], *times, *paired])
    return format_table(lines)


def summary_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line each."""
    cells = [["", "", "of", "cases", "geomean", "worst", "in"]]
    for line in lines:
        numbers = [f"{line[key]:.3f}" for key in ("geomean", "worst")]
        where = [line["of"], str(line["cases"]), *numbers, line["worst_case"]]
        cells.append([line["what"], line["mode"], *where])
    return format_table(cells)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bytes per second of every arm in the forward pass, under the line of a copy.

    Counted are the two tensors that have to be moved, whatever an arm moves.

    Args:
        result: What is written.
        path: Where it is written; the pictures go beside it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no figure: matplotlib is not installed")
        return
    rows = [row for row in result["rows"] if row["mode"] == "forward"]
    arms = [name for name in COMPARED if any(name in row["latency_ms"] for row in rows)]
    width = 0.84 / len(arms)

    def reached(row: Mapping[str, Any], name: str) -> float:
        spread = row["latency_ms"].get(name)
        return 2e-6 * row["input_bytes"] / spread["median"] if spread else 0.0

    figure = Figure(figsize=(max(6.0, 1.1 * len(rows)), 4.6), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(arms):
        places = [i + (number - (len(arms) - 1) / 2) * width for i in range(len(rows))]
        axis.bar(places, [reached(row, name) for row in rows], width, label=name)
    limits = [reached(row, "copy") for row in rows]
    if any(limits):
        ends = [i - 0.46 for i in range(len(rows))], [i + 0.46 for i in range(len(rows))]
        axis.hlines(limits, *ends, color="black", label="copy")
    axis.set_xticks(range(len(rows)), [row["case"] for row in rows], rotation=30, ha="right")
    axis.set_ylabel("GB/s of the two tensors that must be moved")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(f"{result['device']}, {result['dtype']}, activation: {result['activation']}")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_figure(figure, path)


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
