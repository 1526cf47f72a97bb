"""What the words of the command line mean."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from tokenconv.patterns import compiled

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_SWEPT = ("img-size", "batch-size", "memory-format", "compile", "kernel-size", "dtype")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What words after ``tokenconv`` mean; wrong usage exits with 2."""
    parser = _make_parser()
    args = parser.parse_args(words, argparse.Namespace(words=list(words)))
    if args.command == "compare":
        _check_together(parser, args)
    if args.command == "cost":
        _check_cost(parser, args)
    if args.command == "export":
        _check_export(parser, args)
    return args


def _check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of ``compare`` that make no sense together."""
    if args.sweep and args.against:
        parser.error("--against takes one comparison, and --sweep makes several")
    if args.fail_if and not args.against:
        parser.error("--fail-if says what is worse than a comparison: name it with --against")
    swept = [option for option, _ in args.sweep]
    for option in swept:
        if swept.count(option) > 1:
            parser.error(f"--sweep {option} twice: give all values at once, as {option}=V,V")


def _check_cost(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of ``cost`` that make no sense together."""
    if args.dim is None:
        _check_named(parser, args)
    elif any(value is not None for value in (args.site, args.blocks, args.block)):
        parser.error("--dim says that MODEL is a block, and --block puts one into a model")


def _check_export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of ``export`` that make no sense together."""
    _check_named(parser, args)
    if args.fold and args.block is args.hybrid is args.plan is None:
        parser.error("--fold is about what was inserted: name it with --block, --plan or --hybrid")
    if args.fold and args.dtype.endswith("16"):
        parser.error("--fold adds 1 to small kernels, and 16 bits lose them: leave one of both out")
    if args.to == "executorch" and args.dynamic:
        parser.error("executorch plans its memory for one shape of images: add --dynamic none")
    if args.opset is not None and args.to != "onnx":
        parser.error(f"--opset is of ONNX files, not of {args.to}")
    if args.multiple_of is not None and "hw" not in args.dynamic:
        parser.error("--multiple-of is about open image sizes: add hw to --dynamic")
    if args.calibration is not None and args.to != "onnx":
        parser.error(f"--calibration is of ONNX files, not of {args.to}")
    if args.keep_float and args.calibration is None:
        parser.error("--keep-float is about files of eight bits: add --calibration DIR")


def _check_named(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of a block that has no name."""
    own = (args.kernel_size, args.site, args.blocks)
    if args.block is None and any(value is not None for value in own):
        parser.error("--kernel-size, --site and --blocks are of a block: name it with --block")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenconv",
        description="Convolution on tokens inside live timm models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    listing = _add(commands, "list", "list the blocks")
    listing.add_argument("pattern", nargs="?", default="*", help="shell-style, such as '*ffn*'")
    form = listing.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the blocks as JSON")
    form.add_argument("--markdown", action="store_true", help="print them as a page, as BLOCKS.md")
    form.add_argument(
        "--families", action="store_true", help="list the timm families, and what each can take"
    )

    planning = _add(commands, "plan", "show what inserting a block would change")
    planning.add_argument("model", metavar="MODEL", help="name of a timm model")
    planning.add_argument("--block", required=True, metavar="NAME")
    planning.add_argument("--json", action="store_true", help="print it as JSON")
    _add_block_options(planning)

    pricing = _add(commands, "cost", "say what a model or a block costs, by formula")
    pricing.add_argument("model", metavar="MODEL", help="name of a timm model, or of a block")
    pricing.add_argument("--block", metavar="NAME", help="put this block into the model first")
    pricing.add_argument("--dim", type=_positive, help="MODEL is a block, of so many channels")
    pricing.add_argument(
        "--sites",
        type=_pattern,
        metavar="REGEX",
        help="price the modules of such names by themselves; None: what was inserted",
    )
    pricing.add_argument("--json", action="store_true", help="print it as JSON")
    _add_block_options(pricing)

    _add_analyze(commands)
    _add_export(commands)

    comparing = _add(
        commands, "compare", "measure a model with blocks against the same model without"
    )
    comparing.add_argument("model", metavar="MODEL", help="name of a timm model")
    comparing.add_argument(
        "--block", action="append", required=True, metavar="NAME", help="repeat for several arms"
    )
    _add_block_options(comparing)
    comparing.add_argument("--out", type=Path, default=Path("tokenconv-report"), metavar="DIR")
    comparing.add_argument("--trace", action="store_true", help="keep profiler traces in DIR")
    comparing.add_argument("--trace-diff", action="store_true", help="print operators that differ")
    comparing.add_argument("--pretrained", action="store_true", help="load pretrained weights")
    comparing.add_argument(
        "--against",
        type=Path,
        metavar="JSON",
        help="earlier compare.json; exit 3 if worse",
    )
    comparing.add_argument(
        "--fail-if",
        action="append",
        type=_rule,
        default=[],
        metavar="RULE",
        help="with --against: ratio>1.05 (if none is given) or memory>1.1; repeat for both",
    )
    comparing.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    comparing.add_argument("--dtype", default="float32", choices=_DTYPES)
    comparing.add_argument("--batch-size", type=_positive, default=4)
    comparing.add_argument(
        "--repeats", type=_positive, help="rounds that count; None: as many as precision needs"
    )
    comparing.add_argument(
        "--precision", type=_fraction, default=0.02, help="half the interval of a ratio, to reach"
    )
    comparing.add_argument(
        "--budget", type=_positive, default=20, metavar="S", help="seconds of rounds per mode"
    )
    comparing.add_argument(
        "--sweep",
        action="append",
        default=[],
        type=_sweep,
        metavar="OPTION=V,V",
        help=f"compare at every value of an option ({', '.join(_SWEPT)}); repeat for several; "
        "what was measured already in DIR is not measured again",
    )
    comparing.add_argument("--mode", default="both", choices=("infer", "train", "both"))
    comparing.add_argument(
        "--compile",
        nargs="?",
        const="on",
        default="off",
        choices=("off", "on", "both"),
        help="use torch.compile in every arm, or have every arm with it and without",
    )
    comparing.add_argument(
        "--memory-format", default="contiguous", choices=("contiguous", "channels_last")
    )
    comparing.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="ARM",
        help="a further arm: a timm model, position (the baseline with learned positions) or "
        "naive (copies tokens to maps and back); repeat for several",
    )
    comparing.add_argument(
        "--images", type=Path, metavar="DIR", help="photographs; None takes scikit-learn's two"
    )
    return parser


def _add(commands: Commands, name: str, about: str) -> argparse.ArgumentParser:
    """A command, whose options cannot be cut short: scripts would break with every new one."""
    return commands.add_parser(
        name,
        help=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def _add_analyze(commands: Commands) -> None:
    analyzing = _add(
        commands,
        "analyze",
        "say how separable a model's convolutions are, and what taking them apart would do",
    )
    analyzing.add_argument("model", metavar="MODEL", help="name of a timm model")
    weights = analyzing.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="load pretrained weights")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="load weights from a file")
    analyzing.add_argument(
        "--hybrid", type=Path, metavar="DIR", help="insert what tokenconv.save wrote, and compare"
    )
    analyzing.add_argument("--num-classes", type=_positive, help="of the weights")
    analyzing.add_argument("--img-size", type=_positive, nargs="+", metavar="N", help="H, or H W")
    analyzing.add_argument(
        "--energy", type=_fraction, default=0.95, help="share of a kernel's energy to keep"
    )
    analyzing.add_argument("--layers", metavar="REGEX", help="only these dense convolutions")
    analyzing.add_argument(
        "--fields", action="store_true", help="also show how far it looks, which runs it on images"
    )
    analyzing.add_argument("--images", type=Path, metavar="DIR", help="photographs for --fields")
    analyzing.add_argument("--batch-size", type=_positive, default=8, help="images for --fields")
    analyzing.add_argument("--out", type=Path, default=Path("tokenconv-analysis"), metavar="DIR")


def _add_export(commands: Commands) -> None:
    exporting = _add(
        commands,
        "export",
        "write a model as ONNX, as a torch.export program, for AOTInductor or ExecuTorch",
    )
    exporting.add_argument("model", metavar="MODEL", help="name of a timm model")
    inserted = exporting.add_mutually_exclusive_group()
    inserted.add_argument("--block", metavar="NAME", help="put this block into the model first")
    inserted.add_argument(
        "--plan", type=Path, metavar="JSON", help="insert what this plan says (tokenconv plan)"
    )
    inserted.add_argument(
        "--hybrid", type=Path, metavar="DIR", help="insert and load what tokenconv.save wrote"
    )
    _add_block_options(exporting)
    exporting.add_argument("--pretrained", action="store_true", help="load pretrained weights")
    exporting.add_argument("--num-classes", type=_positive, help="None takes the model's own")
    exporting.add_argument("--to", default="onnx", choices=("onnx", "pt2", "aoti", "executorch"))
    exporting.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="ending in .onnx, .pt2 or .pte"
    )
    exporting.add_argument(
        "--dynamic",
        type=_axes,
        default=("batch",),
        metavar="AXES",
        help="what stays open: batch, hw, both (hw,batch) or none",
    )
    exporting.add_argument(
        "--multiple-of",
        type=_positive,
        help="with hw: what H and W are multiples of; None asks the model",
    )
    exporting.add_argument(
        "--batch-size", type=_positive, default=1, help="where batch is not open"
    )
    exporting.add_argument("--dtype", default="float32", choices=_DTYPES)
    exporting.add_argument("--opset", type=_positive, help="of ONNX; None takes torch's choice")
    exporting.add_argument(
        "--fold", action="store_true", help="fold what was inserted first, and say what could be"
    )
    exporting.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="write an ONNX file of eight bits, calibrated with the photographs in DIR",
    )
    exporting.add_argument(
        "--calibration-images", type=_positive, default=64, help="how many of DIR at most"
    )
    exporting.add_argument(
        "--keep-float",
        nargs="+",
        default=(),
        choices=("depthwise", "ends"),
        help="with --calibration: leave these layers in float",
    )


def _axes(text: str) -> tuple[str, ...]:
    axes = () if text == "none" else tuple(text.split(","))
    if not {*axes} <= {"batch", "hw"} or len({*axes}) < len(axes):
        raise argparse.ArgumentTypeError(f"expected batch, hw, hw,batch or none, got {text!r}")
    return axes


def _add_block_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel-size", type=_positive, help="None takes the block's own")
    parser.add_argument("--site", metavar="SITE", help="where in a block, such as beside_mlp")
    parser.add_argument(
        "--blocks",
        metavar="N|A:B|REGEX",
        help="which blocks, such as 0, 6:, or stages.2; None: all",
    )
    parser.add_argument(
        "--img-size", type=_positive, nargs="+", metavar="H [W]", help="None takes the model's own"
    )


def _sweep(text: str) -> tuple[str, list[str]]:
    option, _, values = text.partition("=")
    listed = values.split(",")
    if option not in _SWEPT or not all(listed) or len(set(listed)) < len(listed):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(_SWEPT)}, and different values, such as batch-size=1,8; "
            f"got {text!r}"
        )
    return option, listed


def _rule(text: str) -> object:
    from tokenconv.profiling import Rule  # imports torch: not for --help

    try:
        return Rule.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return compiled(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _positive(text: str) -> int:
    if text.isdecimal() and len(text) > 9:  # torch could not count what it asks for
        raise argparse.ArgumentTypeError(f"expected at most nine digits, got {text}")
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)
