"""A sweep: the same comparison at every combination of some options, each kept as it finishes."""

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from tokenconv.cli.parser import parse
from tokenconv.errors import MeasurementError, UnknownNameError
from tokenconv.profiling import (
    Comparison,
    Point,
    machine,
    read_comparison,
    write_sweep,
)
from tokenconv.reports import alone_in, report_folder


def run_sweep(
    args: argparse.Namespace, measure: Callable[[argparse.Namespace], Comparison]
) -> list[Point]:
    """Measure every point that is not in the folder yet, then write the report of all.

    A point is a command line of its own, with a folder of its own. One that fails is told and
    tried again the next time; the others go on.

    Args:
        args: Of ``tokenconv compare``, with ``sweep``.
        measure: Runs one, and writes its folder.

    Raises:
        MeasurementError: If no point could be measured, or another run writes to the folder.
        UnknownNameError: If there is no model or block of a name.
    """
    todo = [(settings, parse(words)) for settings, words in _points(args)]
    with alone_in(args.out):
        points = [
            _point(settings, own, measure)
            for settings, own in tqdm(todo, desc="sweep", unit="point")
        ]
        if not any(point.comparison for point in points):
            raise MeasurementError(f"no point of the sweep could be measured: {points[0].failure}")
        with report_folder(args.out) as folder:
            command = shlex.join(["tokenconv", *args.words])
            write_sweep(points, folder, {"model": args.model, "command": command})
    return points


def _point(
    settings: dict[str, str],
    own: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Comparison],
) -> Point:
    try:
        return Point(settings, _finished(own) or measure(own), None)
    except UnknownNameError:
        raise
    except Exception as error:
        point = Point(settings, None, " ".join(str(error).split()))
        print(f"tokenconv: error: {point.name}: {point.failure}", file=sys.stderr)
        return point


def _points(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Settings and words of every point."""
    words = list(args.words)
    for option in ("--sweep", "--out"):
        words = _without(words, option)
    options = [option for option, _ in args.sweep]
    for values in itertools.product(*(values for _, values in args.sweep)):
        settings = dict(zip(options, values, strict=True))
        own = ["--out", str(args.out / "points" / _name(settings))]
        for option, value in settings.items():
            own += [f"--{option}", *(value.split("x") if option == "img-size" else [value])]
        yield settings, [*words, *own]


def _name(settings: dict[str, str]) -> str:
    return Point(settings, None, None).name


def _without(words: Sequence[str], option: str) -> list[str]:
    """The words without an option and its value."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def _finished(args: argparse.Namespace) -> Comparison | None:
    """What an earlier run with the same words on the same machine has found here."""
    path = args.out / "compare.json"
    if not path.is_file():
        return None
    try:
        found = read_comparison(path)
    except MeasurementError:
        return None  # of another version: measure it again
    same = (
        found.about.get("command") == shlex.join(["tokenconv", *args.words])
        and found.device == machine.device_name(torch.device(args.device))
        and found.threads == torch.get_num_threads()
        and found.versions == machine.versions()
    )
    return found if same and not any(arm.failures for arm in found.arms) else None
