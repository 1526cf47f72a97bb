"""Write the page that walks through insertion, training and prediction, by doing what it shows.

python examples/walkthrough.py
python examples/walkthrough.py --scenes 64 --epochs 1 --out /tmp/page    # how it works, in a minute

It runs every command of the page, some minutes on 2 cores, and keeps what they print and draw:
examples/walkthrough/README.md and the pictures beside it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from training.errors import TrainingError, told_in_one_line

HERE = Path(__file__).parent
LABELS = {"masks": "conv_glu", "control": "attention only"}


class Walkthrough:
    """What the page's template can do.

    Args:
        runs: Folder of the trainings.
        out: Folder of the page.
    """

    def __init__(self, runs: Path, out: Path):
        self.runs = runs
        self.out = out

    def run(self, language: str, *, caller: Callable[[], str], shows: bool = True) -> str:
        """Run a piece of code; it as Markdown, with what it printed.

        Args:
            language: ``python`` or ``sh``.
            caller: Gives the code.
            shows: Whether what it printed is to be seen.

        Raises:
            TrainingError: If it failed.
        """
        code = caller()
        print(code, file=sys.stderr)
        programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
        done = subprocess.run(
            [sys.executable, "-c", code] if language == "python" else ["sh", "-ec", code],
            cwd=HERE.parent,
            env={**os.environ, "PATH": os.pathsep.join(programs), "PYTHONPATH": str(HERE)},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise TrainingError(f"this ended with {done.returncode}: {code}")
        said = f"\n```text\n{done.stdout.strip()}\n```" if shows and done.stdout else ""
        return f"```{language}\n{code}\n```{said}"

    def history(self, name: str) -> list[dict[str, float]]:
        """Metrics of every epoch."""
        return json.loads((self.runs / name / "history.json").read_text())

    def score(self, name: str, metric: str) -> str:
        """Of the last epoch, in per cent."""
        return f"{100 * self.history(name)[-1][metric]:.0f}%"

    def curves(self, *names: str) -> str:
        """Draw mIoU over epochs; name of the picture."""
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axis = figure.subplots()
        for name in names:
            rows = self.history(name)
            epochs, values = [row["epoch"] for row in rows], [row["miou"] for row in rows]
            axis.plot(epochs, values, marker="o", label=LABELS[name])
        axis.set(xlabel="epoch", ylabel="mIoU", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left")
        figure.savefig(self.out / "curves.png", dpi=110)
        return "curves.png"

    def overlays(self, *names: str) -> str:
        """Join what runs predicted, a row for each; name of the picture."""
        rows = [
            [Image.open(path) for path in sorted((self.runs / name / "predictions").glob("*.png"))]
            for name in names
        ]
        tops = [0]
        for row in rows:
            tops.append(tops[-1] + max(picture.height for picture in row))
        width = rows[0][0].width + 8
        whole = Image.new("RGB", (width * len(rows[0]), tops[-1]), "white")
        for top, row in zip(tops, rows, strict=False):
            for place, picture in enumerate(row):
                whole.paste(picture, (width * place, top))
        whole.save(self.out / "overlays.png")
        return "overlays.png"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=2048, help="to train on")
    parser.add_argument("--epochs", type=int, default=8, help="of every training")
    parser.add_argument("--runs", type=Path, default="runs/walkthrough", help="of training")
    parser.add_argument("--out", type=Path, default="examples/walkthrough", help="of the page")
    return parser.parse_args(words)


def render(walkthrough: Walkthrough, args: argparse.Namespace) -> str:
    """The page, for which all of it is run."""
    pages = Environment(
        loader=FileSystemLoader(HERE / "walkthrough"), undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    does = {name: getattr(walkthrough, name) for name in ("run", "score", "curves", "overlays")}
    return pages.get_template("page.md.jinja").render(**vars(args), **does)


def run(args: argparse.Namespace) -> None:
    """Run all of it and write the page."""
    walkthrough = Walkthrough(HERE.parent / args.runs, HERE.parent / args.out)
    if walkthrough.runs.exists():
        raise TrainingError(f"{walkthrough.runs} is there already: remove it, or take other --runs")
    walkthrough.out.mkdir(parents=True, exist_ok=True)
    page = render(walkthrough, args)
    (walkthrough.out / "README.md").write_text(page)


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
