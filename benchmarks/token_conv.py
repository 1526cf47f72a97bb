"""What does a depthwise 3x3 convolution on tokens cost in each way of writing it?

Shape letters: B batch, N tokens = P prefix + H*W grid, C channels.

Three arms share inputs and weights: ``naive`` copies the tokens to NCHW and back, ``timm`` makes
the calls that timm makes in PVTv2, ``ours`` is ``tokenconv.DWConv``. Where only some tokens are
left, other ones in every image, the first two put them on a map of zeros and pick them from the
result, and ours gathers. Outputs and gradients are compared before anything is timed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from common import DTYPES, add_options, format_table, set_up, time_arms, write_json
from torch import Tensor, nn
from tqdm import tqdm

import tokenconv as tc

Arm = Callable[[Tensor], Tensor]
Call = Callable[[], tuple[Tensor, ...]]
MODES = ("forward", "forward+backward")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest difference between arms, as a share of the largest value."""


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

    def kept(self, device: torch.device) -> Tensor:
        """Indices ``(B, L)`` of the tokens that are left, always the same ones."""
        drawn = torch.Generator().manual_seed(1)
        order = torch.rand(self.batch_size, self.rows * self.cols, generator=drawn).argsort(1)
        return order[:, : self.left].to(device)


CASES = tuple(
    Case.parse(text)
    for text in (
        "8x14x14x1536",
        "4x56x56x256",
        "1x14x14x3072",
        "32x14x14x768",
        "8x14x14x1536+1",
        "8x14x14x1536/98",
        "2x37x28x1536/518",
    )
)


def naive(case: Case, conv: nn.Conv2d) -> Arm:
    """As most code has it: real NCHW copies on both sides."""

    def run(x: Tensor) -> Tensor:
        fmap = x.transpose(1, 2).reshape(len(x), case.dim, case.rows, case.cols).contiguous()
        return conv(fmap).contiguous().flatten(2).transpose(1, 2).contiguous()

    return _around_prefix(case, _on_zeros(case, conv, run))


def timm(case: Case, conv: nn.Conv2d) -> Arm:
    """The calls that ``timm.models.pvt_v2.MlpWithDepthwiseConv`` makes around its convolution."""

    def run(x: Tensor) -> Tensor:
        B, _, C = x.shape
        x = x.transpose(1, 2).view(B, C, case.rows, case.cols)
        x = conv(x)
        return x.flatten(2).transpose(1, 2)

    return _around_prefix(case, _on_zeros(case, conv, run))


def ours(case: Case, conv: nn.Conv2d) -> Arm:
    """``tokenconv.DWConv``, with the same weights."""
    layer = tc.DWConv(case.dim, dtype=conv.weight.dtype, device=conv.weight.device)
    for name, parameter in conv.named_parameters():
        setattr(layer, name, parameter)
    if case.left is not None:
        kept = case.kept(conv.weight.device)
        coords = torch.stack([kept // case.cols, kept % case.cols], dim=-1)
        sparse = tc.SparseGrid(coords, case.num_prefix_tokens)
        return lambda x: layer(x, sparse)
    if not case.num_prefix_tokens:
        return lambda x: layer(x, case.rows, case.cols)
    grid = tc.TokenGrid((case.rows, case.cols), case.num_prefix_tokens)
    return lambda x: layer(x, grid)


def _around_prefix(case: Case, run: Arm) -> Arm:
    """What code without prefix tokens does to be used with them: slice and concatenate."""
    P = case.num_prefix_tokens
    return (lambda x: torch.cat([x[:, :P], run(x[:, P:])], dim=1)) if P else run


def _on_zeros(case: Case, conv: nn.Conv2d, run: Arm) -> Arm:
    """What code for full grids does to be used where tokens are missing."""
    if case.left is None:
        return run
    index = case.kept(conv.weight.device)[..., None].expand(-1, -1, case.dim)

    def around(x: Tensor) -> Tensor:
        whole = x.new_zeros(len(x), case.rows * case.cols, case.dim).scatter(1, index, x)
        return run(whole).gather(1, index)

    return around


ARMS: dict[str, Callable[[Case, nn.Conv2d], Arm]] = {"naive": naive, "timm": timm, "ours": ours}


def calls_of(case: Case, device: str, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """The work of every arm by mode and name, all on the same tensors."""
    drawn = torch.Generator().manual_seed(0)
    left = case.rows * case.cols if case.left is None else case.left
    shape = (case.batch_size, case.num_prefix_tokens + left, case.dim)
    x, grad_out = (torch.randn(shape, generator=drawn).to(device, dtype) for _ in range(2))
    conv = nn.Conv2d(case.dim, case.dim, 3, padding=1, groups=case.dim).to(device, dtype)
    leaves = [x.requires_grad_(), *conv.parameters()]

    def forward(arm: Arm) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (arm(x),)

    def forward_backward(arm: Arm) -> tuple[Tensor, ...]:
        out = arm(x)
        return out, *torch.autograd.grad(out, leaves, grad_out)

    arms = {name: make(case, conv) for name, make in ARMS.items()}
    return {
        mode: {name: partial(work, arm) for name, arm in arms.items()}
        for mode, work in zip(MODES, (forward, forward_backward), strict=True)
    }


def difference(calls: dict[str, dict[str, Call]]) -> float:
    """Largest difference from ``naive`` in output or gradients, as a share of the largest value."""
    shares = [0.0]
    for of_mode in calls.values():
        results = {name: call() for name, call in of_mode.items()}
        for result in results.values():
            for got, expected in zip(result, results["naive"], strict=True):
                if got.shape != expected.shape:
                    return math.inf
                share = (got - expected).detach().abs().max() / expected.detach().abs().max()
                shares.append(float(share.nan_to_num(math.inf)))
    return max(shares)


def measure(cases: Sequence[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare, then time, every arm on every case in both modes.

    Raises:
        ValueError: If the arms do not compute the same.
    """
    calls = {case: calls_of(case, args.device, DTYPES[args.dtype]) for case in cases}
    differences = {case: difference(of_case) for case, of_case in calls.items()}
    for case, share in differences.items():
        if share > TOLERANCE[args.dtype]:
            raise ValueError(
                f"the arms differ by {share:.1e} of the largest value on {case}, allowed are "
                f"{TOLERANCE[args.dtype]:.0e} in {args.dtype}: not timed"
            )
    total = len(cases) * len(MODES) * len(ARMS) * (args.warmup + args.repeats)
    rows = []
    with tqdm(total=total, unit="call", desc="timing") as bar:
        for case, of_case in calls.items():
            for mode, arms in of_case.items():
                bar.set_postfix_str(f"{case} {mode}")
                about = {"case": str(case), **asdict(case), "mode": mode}
                about["largest_difference"] = differences[case]
                rows.append({**about, **time_arms(arms, args, "ours", bar)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians, with interquartile ranges in brackets."""
    header = ["BxHxWxC+P/L", "mode", *(f"{name} ms" for name in ARMS), "naive/ours", "timm/ours"]
    return format_table([header, *(_cells(row) for row in rows)])


def _cells(row: dict[str, Any]) -> list[str]:
    spreads = [*row["latency_ms"].values(), *row["ratio_to_ours"].values()]
    return [row["case"], row["mode"], *(f"{s['median']:.3f} ({s['iqr']:.3f})" for s in spreads)]


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code, 1 if the arms do not agree.
    """
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    add_options(parser)
    parser.add_argument(
        "--shapes", type=Case.parse, nargs="+", default=CASES, help="BxHxWxC[+P][/L]"
    )
    args = parser.parse_args(words)
    facts = set_up(args)
    torch.manual_seed(0)
    try:
        rows = measure(args.shapes, args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if args.out:
        write_json(args.out, {"question": summary, **facts, "rows": rows})
        print(f"\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
