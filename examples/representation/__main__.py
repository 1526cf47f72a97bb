"""Run the experiments on what convolution on tokens can express, and write the page about them.

PYTHONPATH=examples python -m representation
PYTHONPATH=examples python -m representation phase esp --seeds 3 --out runs/two
PYTHONPATH=examples python -m representation --quick    # shows that it runs

Each leaves its numbers (NAME.json) and figure (NAME.png); README.md tells of all in the folder.
It needs scikit-learn, for its digits: pip install '.[demo]'.
"""

import argparse
import io
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from representation.experiment import Spread, column

NAMES = (
    "phase", "samples", "groups", "activation", "residual", "esp", "blueprint", "mixing", "padding",
)  # fmt: skip
COMMAND = "PYTHONPATH=examples python -m representation"
HEIGHTS = {"esp": 7.2, "mixing": 2.4}
"""Of figures, in inches; 3.4 for the others."""


def experiment(name: str) -> Any:
    """The module with ``TITLE``, ``run``, ``draw`` and ``claim``."""
    return import_module(f"representation.{name}")


def perform(name: str, seeds: int, quick: bool, bar: "tqdm[Any]") -> dict[str, Any]:
    """Run an experiment for all seeds; what its file holds."""
    module, begun, runs = experiment(name), time.process_time(), []
    for seed in range(seeds):
        bar.set_description(f"{name}, seed {seed}")
        runs.append(module.run(seed, quick))
        bar.update()
    claim = module.claim(runs)
    return {
        "experiment": name,
        "claim": claim.text,
        "holds": claim.holds,
        "command": f"{COMMAND} {name} --seeds {seeds}" + " --quick" * quick,
        "seeds": [*range(seeds)],
        "cpu_seconds": round(time.process_time() - begun, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"one core, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("tokenconv", "torch", "scikit-learn")},
        },
        "runs": runs,
    }


def drawn(result: Mapping[str, Any]) -> bytes:
    """The figure, as PNG."""
    name = result["experiment"]
    figure = Figure(figsize=(9, HEIGHTS.get(name, 3.4)), layout="constrained")
    experiment(name).draw(figure, result["runs"])
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    return file.getvalue()


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """What was found, in Markdown."""
    parts = [
        "# What a depthwise separable convolution can express",
        "Depthwise, then pointwise is a constraint on the kernel: `W[o,i,q] = p[o,i] * d[i,q]`, "
        "rank one for each input channel. These experiments say what it costs and what it brings, "
        "on tasks made so small that the mechanism is all there is. A claim stands as the numbers "
        "gave it; popular ones that did not hold here are told as such. All of it, on one core, "
        "with `pip install '.[demo]'`:",
        f"```sh\n{COMMAND}\n```",
        "Numbers are means over seeds ± their 95 % interval (Student's t); a number alone is the "
        "same for every seed. Dots in figures are seeds, lines their means. A claim is shown if a "
        "condition in the code holds for the numbers; where it rests on an interval, that is not "
        "corrected for there being several.",
        "| | claim | shown |\n|---|---|---|\n"
        + "\n".join(
            f"| [{result['experiment']}](#{result['experiment']}) | {result['claim']} | "
            f"{'yes' if result['holds'] else 'not by this run'} |"
            for result in results
        ),
    ]
    return "\n\n".join([*parts, *map(section, results)]) + "\n"


def section(result: Mapping[str, Any]) -> str:
    """Of one experiment: derivation, claim, figure, numbers, command."""
    name, module = result["experiment"], experiment(result["experiment"])
    shown = "Shown" if result["holds"] else "Not shown by this run"
    about = [
        f"`{result['command']}`", f"seeds {result['seeds'][0]} to {result['seeds'][-1]}",
        f"{result['cpu_seconds']:.0f} s", result["device"], result["date"],
        ", ".join(f"{package} {number}" for package, number in result["versions"].items()),
        f"[numbers]({name}.json)",
    ]  # fmt: skip
    parts = [
        f"## {name}", module.__doc__.strip(), f"**{shown}:** {result['claim']}",
        f"![{module.TITLE}]({name}.png)", *tables(result["runs"]), "; ".join(about),
    ]  # fmt: skip
    return "\n\n".join(parts)


def tables(runs: Sequence[Any]) -> list[str]:
    """Rows that have the same columns, as a table."""
    found = []
    for columns, rows in groupby(runs[0], lambda row: [*runs[0][row]]):
        lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for row in rows:
            cells = [str(Spread.of(column(runs, row, name))) for name in columns]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either there as a whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="representation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, help="how many; default: 5, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="as short as it can be")
    parser.add_argument("--out", type=Path, default=Path("runs/representation"), help="a folder")
    args = parser.parse_args(words)
    args.names = args.names or NAMES
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"no experiment {unknown[0]}: there are {', '.join(NAMES)}")
    args.seeds = (1 if args.quick else 5) if args.seeds is None else args.seeds
    if args.seeds < 1:
        parser.error(f"expected --seeds of at least 1, got {args.seeds}")
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Run experiments, and tell of all that are in the folder."""
    args = parse(words)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tqdm(total=len(args.names) * args.seeds, unit="run") as bar:
        for name in args.names:
            result = perform(name, args.seeds, args.quick, bar)
            write_whole(args.out / f"{name}.png", drawn(result))
            write_whole(args.out / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    files = [args.out / f"{name}.json" for name in NAMES]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    write_whole(args.out / "README.md", page(results).encode())
    for result in results:
        print(f"{result['experiment']}: {result['claim']}")


if __name__ == "__main__":
    main()
