r"""What an efficient spatial pyramid never looks at, with and without fusion of its branches.

A 3x3 kernel of dilation d touches 9 of the `(2*d + 1)^2` positions in its reach: a grid of holes.
ESP has five, of d = 1, 2, 4, 8, 16, side by side, and hierarchical feature fusion adds each to the
sum of those before it, except that d = 1 stays out. The share of holes is exact: a position is
touched if an impulse there changes the output, in float64 and with random weights.

Fusion is a triangular matrix over the branches, with ones on its diagonal: kernels of the five
outputs span the same space with and without. A pointwise layer right behind it could undo it, or do
it; what fusion changes is what a single channel sees, before norm and activation.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import tokenconv as tc
from representation.experiment import Claim, Table, mean

TITLE = "The gridding of ESP"
DILATIONS = (1, 2, 4, 8, 16)
DEPTHS = (1, 2, 3)
FUSED = {"fusion": True, "no fusion": False}


def blocks(seed: int, fuse: bool, depth: int) -> nn.Sequential:
    """ESP blocks one after another, one channel a branch, without their shortcuts."""
    torch.manual_seed(seed)
    row = [tc.create_block("esp", dim=5, fuse=fuse, residual=False) for _ in range(depth)]
    return nn.Sequential(*row).double().eval()


def response(layer: nn.Module, depth: int = 1) -> Tensor:
    """What an impulse in the middle becomes, ``(5, H, W)``, as far as it can reach."""
    reach = max(DILATIONS) * depth
    impulse = torch.zeros(1, 5, 2 * reach + 1, 2 * reach + 1, dtype=torch.double)
    impulse[0, 0, reach, reach] = 1
    with torch.no_grad():
        return layer(impulse)[0]


def holes(touched: Tensor, depth: int) -> dict[str, float]:
    """Share of the positions within a branch's reach that it does not touch."""
    middle, shares = max(DILATIONS) * depth, {}
    for branch, dilation in zip(touched, DILATIONS, strict=True):
        reach = max(DILATIONS) * (depth - 1) + dilation
        inside = slice(middle - reach, middle + reach + 1)
        shares[f"d = {dilation}"] = float(1 - branch[inside, inside].double().mean())
    return shares


def run(seed: int, quick: bool) -> Table:
    """Share of holes by branch and number of blocks; how many kernels are independent."""
    table: Table = {}
    kernels = []
    for name, fuse in FUSED.items():
        for depth in DEPTHS[:1] if quick else DEPTHS:
            layer = blocks(seed, fuse, depth)
            row = f"{name}, {depth} block" + "s" * (depth > 1)
            table[row] = holes(response(layer, depth) != 0, depth)
        linear: nn.Module = blocks(seed, fuse, 1)[0].get_submodule("body")
        kernels.append(response(linear).flatten(1))
    table["independent kernels"] = {
        "fusion": float(torch.linalg.matrix_rank(kernels[0])),
        "no fusion": float(torch.linalg.matrix_rank(kernels[1])),
        "both together": float(torch.linalg.matrix_rank(torch.cat(kernels))),
    }
    return table


def draw(figure: Figure, runs: Sequence[Table]) -> None:
    """Where each branch of one block looks, and of two."""
    rows = [(depth, name) for depth in (1, 2) for name in FUSED]
    axes = figure.subplots(len(rows), len(DILATIONS))
    for line, (depth, name) in zip(axes, rows, strict=True):
        found = response(blocks(0, FUSED[name], depth), depth) != 0
        shares = holes(found, depth)
        for axis, touched, (branch, share) in zip(line, found, shares.items(), strict=True):
            axis.imshow(touched.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{branch}: {share:.1%} holes", fontsize=8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{name},\n{depth} block" + "s" * (depth > 1), fontsize=9)


def claim(runs: Sequence[Table]) -> Claim:
    """See ``representation.experiment.Claim``."""
    fused, separate = (mean(runs, f"{name}, 1 block", "d = 16") for name in FUSED)
    return Claim(
        "In one block fusion lowers the share of positions that the widest branch never touches "
        f"from {separate:.1%} to {fused:.1%}: it thins the grid out and does not take it away, "
        "and the five kernels span the same space as without.",
        fused == 1 - 33 / 33**2
        and separate == 1 - 9 / 33**2
        and all(set(run["independent kernels"].values()) == {5} for run in runs),
    )
