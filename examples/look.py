"""What training made of kernels, and how far the models look: runs beside each other in a report.

python examples/look.py runs/control runs/classes --out looks

Takes the folders of runs of train_classification.py, which are looked at on pictures that they
did not learn from. The kernels are those of the last run.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from predict import load_run
from torch import Tensor, nn
from train_classification import open_data, transforms
from training.errors import told_in_one_line

from tokenconv.analysis import Fields, analyze
from tokenconv.analysis.report import ANALYSIS_FILES, write_analysis
from tokenconv.reports import alone_in, report_folder


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Look into trained models.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a training")
    parser.add_argument("--images", type=int, default=64, help="how many pictures to look at")
    parser.add_argument("--out", type=Path, default=Path("looks"), metavar="DIR")
    return parser.parse_args(words)


def open_run(folder: Path, count: int) -> tuple[nn.Module, Tensor]:
    """The model of a run, and pictures that it is judged by."""
    model, told = load_run(folder)
    _, pictures, classes = open_data(told)
    _, judge = transforms(told, model, len(classes))
    return model, torch.stack([judge(pictures[i])[0] for i in range(min(count, len(pictures)))])


def main(words: Sequence[str] | None = None) -> None:
    """Load the runs, look, and write the report."""
    args = parse(words)
    runs = {folder: open_run(folder, args.images) for folder in args.runs}
    fields = [Fields.of(folder.name, model, images) for folder, (model, images) in runs.items()]
    last = args.runs[-1]
    model, images = runs[last]
    found = analyze(model, tuple(images.shape[1:]))
    print(found)
    about = {
        "model": last.name,
        "weights": f"trained, {last}",
        "command": shlex.join(["python", "examples/look.py", *(words or sys.argv[1:])]),
    }
    with alone_in(args.out), report_folder(args.out, instead_of=ANALYSIS_FILES) as folder:
        write_analysis(found, folder, about, fields)
    print(f"\nreport: {args.out / 'report.html'}")


if __name__ == "__main__":
    with told_in_one_line():
        main()
