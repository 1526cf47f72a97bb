"""Which blocks can be exported to what?

    python benchmarks/exports.py            # about an hour; --targets onnx pt2 takes minutes

Every block of ``BLOCKS``, with random weights, is given maps of open size and written as every
target by ``tokenconv.export``, which compares the file with the block: at the size asked for and
three others, with one image and with three; ExecuTorch's are of one shape. ``EXPORTS.md`` is the
table of it; what is not asked for anew stays as it was there.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tokenconv as tc
from tokenconv.deploy import ExportReport, Target

ROOT = Path(__file__).resolve().parents[1]
DIM, STEP, STEM_STEP = 16, 4, 32
SIZE, STEM_SIZE = (DIM, 5 * STEP, 6 * STEP), (3, 5 * STEM_STEP, 6 * STEM_STEP)


class OnMaps(nn.Module):
    """A block that is given maps ``(B, C, H, W)``: as they are, or as tokens behind a class token.

    Blocks of several scales are given the map, and what pooling makes of it, in one sequence; stems
    are given images.
    """

    def __init__(self, name: str):
        super().__init__()
        self.kind = tc.BLOCKS[name].kind
        self.block = tc.create_block(name, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        if self.kind == "maps":
            return self.block(x)
        if self.kind == "stem":
            return self.block(x)[0]
        rows, cols = x.shape[2:]
        maps = [x]
        if self.kind == "scales":
            maps += [nn.functional.avg_pool2d(x, side) for side in (2, 4)]
            rows, cols = rows // 2, cols // 2
        tokens = [m.flatten(2).transpose(1, 2) for m in maps]
        tokens = torch.cat([tokens[0][:, :1], *tokens], dim=1)  # anything will do as class token
        return self.block(tokens, tc.TokenGrid((rows, cols), num_prefix_tokens=1))


def make(name: str) -> nn.Module:
    """A block in evaluation mode, with values that hide nothing."""
    model = OnMaps(name).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3, generator=generator)
        elif key.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5, generator=generator)
    return model


def attempt(name: str, target: Target, folder: Path) -> ExportReport:
    """Export a block.

    Raises:
        ExportError: If it cannot be.
    """
    path = folder / f"{name}{target.suffix}"
    is_stem = tc.BLOCKS[name].kind == "stem"
    opened: dict[str, Any] = {"dynamic": ()}
    if target != Target.EXECUTORCH:
        step = STEM_STEP if is_stem else STEP
        opened = {"dynamic": ("batch", "hw"), "multiple_of": step}
    return tc.export(
        make(name), path, to=target, input_size=STEM_SIZE if is_stem else SIZE, **opened
    )


def sweep(names: Sequence[str], targets: Sequence[Target]) -> Iterator[tuple[str, Target, str]]:
    """What comes of every block and target: the largest difference, or why not."""
    todo = [(name, target) for target in targets for name in names]
    with tempfile.TemporaryDirectory() as folder:
        for name, target in tqdm(todo, unit="file"):
            try:
                yield name, target, f"{attempt(name, target, Path(folder)).difference:.1e}"
            except tc.ExportError as error:
                yield name, target, f"no: {error}"


def table(rows: dict[str, dict[str, str]]) -> str:
    """The page: a table, the reasons below it, and the figures for the next time."""
    lines = [
        "# Blocks and what they can be exported to",
        "",
        "Made by `python benchmarks/exports.py`. Batch, H and W are open, but for ExecuTorch,",
        "which plans for one shape. A number is the largest difference between the file and the",
        "block in float32, relative to the largest output.",
        "",
        "| block | " + " | ".join(Target) + " |",
        "|---|" + "---|" * len(Target),
    ]
    notes: list[str] = []
    for name, row in rows.items():
        cells = []
        for target in Target:
            cell = row.get(target, "not tried")
            if cell.startswith("no: "):
                notes.append(f"{len(notes) + 1}. `{name}`, {target}: {cell[4:]}")
                cell = f"no ({len(notes)})"
            cells.append(cell)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, *([""] if notes else []), *notes, "", f"<!-- {json.dumps(rows)} -->", ""]
    )


def kept(page: Path) -> dict[str, dict[str, str]]:
    """The rows that a page was made of."""
    last = page.read_text().splitlines()[-1] if page.exists() else "<!-- {} -->"
    return json.loads(last.removeprefix("<!-- ").removesuffix(" -->"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", default="*", help="shell-style, such as '*ffn*'")
    parser.add_argument("--targets", nargs="+", type=Target.of, default=[*Target])
    parser.add_argument("--out", type=Path, default=ROOT / "EXPORTS.md")
    args = parser.parse_args(argv)
    names = [name for name in tc.BLOCKS if fnmatchcase(name, args.blocks)]
    found, rows = kept(args.out), {name: dict[str, str]() for name in tc.BLOCKS}
    rows |= {name: row for name, row in found.items() if name in rows}
    failed = 0
    for name, target, cell in sweep(names, args.targets):
        rows[name][target] = cell
        failed += cell.startswith("no: ")
        args.out.write_text(table(rows))  # each at once, since all take an hour
    print(table({name: rows[name] for name in names}))
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
