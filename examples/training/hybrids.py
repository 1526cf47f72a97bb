"""The model to train: one of timm's, with blocks in it, and with a part of it to be trained."""

import argparse
import ast
from functools import reduce
from itertools import count
from operator import add
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import load_state_dict, register_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import tokenconv as tc
import tokenconv.models  # registers hybrids with timm
from training.errors import TrainingError
from training.settings import Settings


def add_model_options(parser: argparse.ArgumentParser, *, is_compared: bool = True) -> None:
    """Which model, what goes in, and what is trained.

    Args:
        parser: Gets the options.
        is_compared: Whether it has ``--control`` and ``--trainable``, too.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="vit_tiny_patch16_224", help="name of a timm model")
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    group.add_argument("--base", metavar="FILE", help="start from these weights of the model")
    group.add_argument(
        "--insert", action="append", default=[], metavar="PLAN|NAME",
        help="a block, or the JSON file of a plan; repeat for several",
    )  # fmt: skip
    if is_compared:
        group.add_argument(
            "--control", action="store_true",
            help="leave out what --insert says, and the convolutions of the model's MLPs: the same "
            "run with attention only",
        )  # fmt: skip
        group.add_argument(
            "--trainable", default="all",
            choices=("all", "inserted+head", "inserted", "depthwise+norm+head"),
            help="what is trained",
        )  # fmt: skip
    else:
        parser.set_defaults(control=False, trainable="all")
    group.add_argument("--drop-path", type=float, default=0.0, help="rate of stochastic depth")
    group.add_argument("--img-size", type=int, nargs="+", metavar="H [W]", help="size of an image")
    group.add_argument(
        "--model-arg", action="append", default=[], type=_assignment, metavar="NAME=VALUE",
        help="a further argument of timm.create_model, such as patch_size=8 or class_token=False",
    )  # fmt: skip


def create_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """A timm model for the images and classes, with what was asked for put in.

    Raises:
        TrainingError: If there is no such model, or it does not take an argument.
        TokenConvError: If a block does not go into it.
    """
    model = _plain(args, num_classes)
    wanted = planned(model, args)
    if wanted is not None:
        tc.insert_(model, wanted)
    return model


_numbers = count(1)


def register_hybrid(args: argparse.Namespace) -> str:
    """Make what was asked for an architecture of timm, for libraries that build models by name.

    With ``features_only`` it gives the maps of whole blocks or stages, and is in the wrapper as it
    is, not taken apart.

    Returns:
        The name.
    """
    plan = planned(_plain(args, num_classes=0), args)

    def hybrid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = {**kwargs, **_arguments(args)}  # the caller knows no weights: encoder_weights=None
        if kwargs.get("features_only"):
            kwargs["feature_cls"] = "getter"
        if plan is None:
            return timm.create_model(args.model, **kwargs)
        return timm.create_model("tokenconv", base=args.model, tokenconv=plan.to_json(), **kwargs)

    hybrid.__name__ = f"hybrid_{next(_numbers)}"
    register_model(hybrid)
    return hybrid.__name__


def _plain(args: argparse.Namespace, num_classes: int) -> nn.Module:
    if args.base is not None:
        _check_weights(args.base)
    if taken := {name for name, _ in args.model_arg} & _WEIGHTS:
        raise TrainingError(f"--model-arg {min(taken)} is not taken: weights come from --base FILE")
    if not 0 <= args.drop_path < 1:
        raise TrainingError(f"expected --drop-path from 0 to below 1, got {args.drop_path}")
    try:
        return timm.create_model(args.model, num_classes=num_classes, **_arguments(args))
    except (TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise TrainingError(f"timm cannot make {args.model}: {error}") from error


_WEIGHTS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Other ways to have timm read a file, which older versions unpickle."""


def _check_weights(path: str) -> None:
    """Read a file of weights in a way that runs none of it, since older timm does not.

    Raises:
        TrainingError: If it cannot be read so.
    """
    if not Path(path).is_file():
        raise TrainingError(f"--base {path} is no file")
    if path.endswith((".npy", ".npz")):
        return  # numpy's, which timm reads without pickle
    try:
        load_state_dict(path, weights_only=True)
    except Exception as error:  # whatever the file makes torch or safetensors raise
        why = shorten(str(error), 300, placeholder=" ...")
        raise TrainingError(f"--base {path} holds no weights: {why}") from error


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"pretrained": args.pretrained, **dict(args.model_arg)}
    overlay: dict[str, Any] = {}
    if args.base is not None:  # as pretrained weights: positions are resized, another head is left
        found["pretrained"] = True
        overlay["file"] = str(args.base)
    if args.drop_path:
        found["drop_path_rate"] = args.drop_path
    if args.img_size:
        size = args.img_size[0], args.img_size[-1]
        config = timm.get_pretrained_cfg(args.model)
        overlay["input_size"] = (3, *size)
        if config is not None and config.fixed_input_size:
            found["img_size"] = size
    return {**found, "pretrained_cfg_overlay": overlay}


def planned(model: nn.Module, args: argparse.Namespace) -> tc.Plan | None:
    """What is to be inserted, or taken out; None where nothing is."""
    size: dict[str, Any] = {}
    if args.img_size:
        size["input_size"] = (3, args.img_size[0], args.img_size[-1])
    if args.control:
        try:
            return tc.plan(model, "none", allow_change=True, **size)
        except tc.SurgeryError:  # it has no convolutions in its MLPs
            return None
    plans = [
        tc.Plan.from_json(Path(wanted).read_text(errors="replace"))
        if wanted.endswith(".json")
        else tc.plan(model, wanted, **size)
        for wanted in args.insert
    ]
    return reduce(add, plans) if plans else None


def backbone_of(model: Any) -> Any:
    """The timm model in a model: itself, or what a head or decoder stands on."""
    if hasattr(model, "encoder"):  # of segmentation_models_pytorch
        return backbone_of(model.encoder.model)
    if isinstance(model, FeatureGetterNet):
        return model.model
    return backbone_of(model.backbone) if hasattr(model, "backbone") else model


def outside(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a model that are not those of its backbone: of a head or decoder."""
    own = {id(parameter) for parameter in backbone_of(model).parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model that are not those of its backbone."""
    own = {id(value) for value in backbone_of(model).state_dict(keep_vars=True).values()}
    state = model.state_dict(keep_vars=True)
    return {key: value.detach() for key, value in state.items() if id(value) not in own}


def choose_trained(model: nn.Module, args: argparse.Namespace) -> None:
    """Say which parameters are trained; a control has nothing inserted, but the same head."""
    backbone = backbone_of(model)
    if args.control and "inserted" in args.trainable:
        backbone.requires_grad_(False)
        if backbone is model:
            backbone.get_classifier().requires_grad_("head" in args.trainable)
    else:
        tc.trainable_(backbone, args.trainable)
    for parameter in outside(model):
        parameter.requires_grad_(args.trainable == "all" or "head" in args.trainable)


def param_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Groups for AdamW: layer decay in the backbone, and no weight decay of what has one axis."""
    groups = tc.param_groups(
        backbone_of(model),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        inserted_lr_scale=settings.inserted_lr_scale,
    )
    rest = [parameter for parameter in outside(model) if parameter.requires_grad]
    for weight_decay, chosen in (
        (settings.weight_decay, [parameter for parameter in rest if parameter.ndim > 1]),
        (0.0, [parameter for parameter in rest if parameter.ndim <= 1]),
    ):
        if chosen:
            groups.append({"params": chosen, "lr": settings.lr, "weight_decay": weight_decay})
    if not groups:
        raise TrainingError("nothing is left to be trained: see --trainable")
    return groups


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # ast's, of what is no literal
        return name, value
