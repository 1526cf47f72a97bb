r"""Train one hybrid for several visual domains that share all but their depthwise convolutions.

python examples/train_domains.py
python examples/train_domains.py --share none --out runs/full
python examples/train_domains.py --data decathlon --domains imagenet12 aircraft vgg-flowers
python examples/train_domains.py --img-size 32 --scenes 2048 --epochs 8 --batch-size 32 \
    --model-arg patch_size=4 --model-arg embed_dim=64 --model-arg depth=4 --model-arg num_heads=2

After Guo et al., "Depthwise Convolution is All You Need for Learning Multiple Visual Domains"
(https://arxiv.org/abs/1902.00927). All of the model is trained on the first domain. Every other
domain begins with what the first has learned, and a new head, and --share says what it keeps:

pointwise  the paper: linear layers and attention; depthwise kernels, norms and head are its own
depthwise  the reverse: linear layers, norms and head are its own
soft       as pointwise; then every domain mixes the trained kernels of all, by gates of its own
none       nothing: all of the model is trained again

--data is a folder in the layout of the Visual Decathlon, DOMAIN/{train,val}/CLASS/*.jpg. Without it
the domains are digit scenes (training/digits.py), negatives of them, and their edges. The run's
folder gets a folder per domain, domains/ for tokenconv.surgery.load_domain where domains share one
model, and domains.json with the table that is printed.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from train_classification import (
    Sample,
    add_augmentations,
    make_task,
    open_data,
    transforms,
)
from training.checkpoints import write_json
from training.data import make_data
from training.engine import Training, make_accelerator
from training.errors import TrainingError, told_in_one_line
from training.hybrids import add_model_options, create_model
from training.loading import Indexed
from training.settings import Settings

import tokenconv as tc
from tokenconv.layers import GridModule
from tokenconv.surgery import add_domain, save_domain, set_domain


def _edges(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.FIND_EDGES)


SCENES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "digits": Image.Image.copy,
    "negatives": ImageOps.invert,
    "edges": _edges,
}
"""Domains without --data: what is made of a digit scene."""


class Changed:
    """Samples whose pictures are changed."""

    def __init__(self, samples: Indexed, change: Callable[[Image.Image], Image.Image]):
        self.samples = samples
        self.change = change

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.samples[index]
        return self.change(image), label


class Domain(NamedTuple):
    """Pictures and classes of a domain."""

    train: Any
    val: Any
    classes: tuple[str, ...]


def open_domains(args: argparse.Namespace) -> dict[str, Domain]:
    """All domains, by name, that which is learned first in front.

    Raises:
        TrainingError: If one is missing, or there are fewer than two.
    """
    if args.data is None:
        known = list(SCENES)
    elif Path(args.data).is_dir():
        known = sorted(path.name for path in Path(args.data).iterdir() if path.is_dir())
    else:
        raise TrainingError(f"--data {args.data} is no folder")
    names = args.domains or known
    if missing := sorted(set(names) - set(known)):
        raise TrainingError(f"no domain {missing[0]}: there are {', '.join(known) or 'none'}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise TrainingError(f"expected two or more --domains, each once, got {names}")
    found = {}
    for name in names:
        if args.data is None:
            train, val, classes = open_data(args)
            train, val = Changed(train, SCENES[name]), Changed(val, SCENES[name])
        else:
            folder = str(Path(args.data) / name)
            train, val, classes = open_data(argparse.Namespace(**{**vars(args), "data": folder}))
        found[name] = Domain(train, val, classes)
    return found


class SoftDepthwise(GridModule):
    """The depthwise convolutions of all domains; every image takes a mixture of its own.

    ``sum_i gate_i * conv_i(x)``, ``gate = softmax(fc2(ReLU(fc1(means))))`` of the means of the
    channels, ``fc1`` to ``C//4 + 1``. The convolutions are not trained any more.

    Args:
        layers: A convolution per domain, on maps ``(B, C, H, W)`` or tokens ``(B, N, C)``.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers).requires_grad_(False)
        dim = len(self.layers[0].get_parameter("weight"))
        width = dim // 4 + 1
        self.gate = nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, len(layers)), nn.Softmax(dim=-1)
        )

    def forward(self, x: Tensor, *grid: Any) -> Tensor:
        """As one of the layers."""
        fmap = tc.tokens_to_map(x, *grid) if grid else x
        gates = self.gate(fmap.mean((2, 3))).T.unflatten(1, (-1, *(1,) * (x.ndim - 1)))
        return sum(
            (gate * layer(x, *grid) for gate, layer in zip(gates, self.layers, strict=True)),
            start=torch.zeros((), dtype=x.dtype, device=x.device),
        )


def depthwise(model: nn.Module) -> dict[str, nn.Module]:
    """Depthwise convolutions of a model by name, without those inside another."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 4 and weight.shape[1] == 1 and not is_inside:
            found[name] = module
    return found


def begin(model: Any, first: str, name: str, num_classes: int, share: str) -> nn.Module:
    """The model for a further domain: the same one where it is shared, else a copy.

    Args:
        model: Trained on the first domain.
        first: Name of that.
        name: Of the domain.
        num_classes: Of the domain.
        share: What is shared, as ``--share`` says.
    """
    set_domain(model, first)
    if share in ("pointwise", "soft"):
        add_domain(model, name, num_classes=num_classes)
        set_domain(model, name)
        return tc.trainable_(model, "depthwise+norm+head")
    own = copy.deepcopy(model)
    own.reset_classifier(num_classes)
    if share == "none":
        return tc.trainable_(own, "all")
    tc.trainable_(own, "depthwise+norm+head")
    for layer in depthwise(own).values():
        layer.requires_grad_(False)
    for layer in own.modules():
        if isinstance(layer, nn.Linear):
            layer.requires_grad_(True)
    return own


def soften(model: nn.Module, name: str, names: Sequence[str]) -> nn.Module:
    """A copy of the model in a domain, with gates for the depthwise convolutions of all domains.

    Gates, norms and head are to be trained.
    """
    layers: dict[str, list[nn.Module]] = {}
    for each in names:
        set_domain(model, each)
        for path, layer in depthwise(model).items():
            layers.setdefault(path, []).append(copy.deepcopy(layer))
    set_domain(model, name)
    own = tc.trainable_(copy.deepcopy(model), "depthwise+norm+head")
    for path, all_of_them in layers.items():
        host, _, child = path.rpartition(".")
        setattr(own.get_submodule(host), child, SoftDepthwise(all_of_them))
    return own


def trained(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Lessons:
    """Trains models on domains, each as a run in a folder of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.settings = Settings.of(args)
        if self.settings.fsdp or self.settings.ema:
            raise TrainingError("--fsdp and --ema keep weights outside the model: not for domains")
        self.domains = open_domains(args)

    def learn(self, model: nn.Module, name: str, run: str) -> None:
        """Train a model on a domain; with ``--resume auto`` take what a finished run has learned.

        Raises:
            SystemExit: If it was asked to terminate; what it has learned is saved.
        """
        settings = replace(self.settings, out=self.settings.out / run)
        accelerator = make_accelerator(settings)
        accelerator.print(f"{run}: {trained(model):,} parameters to train")
        domain = self.domains[name]
        augment, judge = transforms(self.args, model, len(domain.classes))
        data = make_data(
            domain.train, domain.val, augment, judge, settings=settings, accelerator=accelerator,
        )  # fmt: skip
        told = {"task": "domain", **vars(self.args), "domain": name, "classes": domain.classes}
        task = make_task(self.args, domain.classes)
        training = Training(accelerator, model, task, data, settings, told)
        training.run()
        accelerator.unwrap_model(training.model, keep_fp32_wrapper=False)
        accelerator.free_memory()
        if not training.finished:  # asked to terminate, and has said so
            sys.exit(0)

    @torch.inference_mode()
    def accuracy(self, model: nn.Module, name: str) -> float:
        """Share of a domain's pictures to be judged by that are right."""
        accelerator = make_accelerator(self.settings)
        domain = self.domains[name]
        augment, judge = transforms(self.args, model, len(domain.classes))
        data = make_data(
            domain.train, domain.val, augment, judge,
            settings=self.settings, accelerator=accelerator,
        )  # fmt: skip
        model.eval()
        right = 0
        for batch in data.val:
            images, labels = send_to_device(batch, accelerator.device)
            right += int((model(images).argmax(1) == labels).sum())
        return right / len(domain.val)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser, is_compared=False)
    parser.add_argument(
        "--share", default="pointwise", choices=("pointwise", "depthwise", "soft", "none"),
        help="what further domains keep of the first",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="None: digit scenes")
    data.add_argument(
        "--domains", nargs="+", metavar="NAME", help="the first is learned first; None: all"
    )
    data.add_argument("--scenes", type=int, default=8192, help="how many to train on")
    add_augmentations(data)
    Settings.add_options(parser.add_argument_group("training"))
    parser.set_defaults(
        out=Path("runs/domains"), splits=["train", "val"], data_root=None, num_classes=None
    )
    args = parser.parse_args(words)
    args.insert = args.insert or ["mix_ffn"]
    if args.data is None and args.img_size is None:
        args.img_size = [64]
    return args


def run(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train; accuracy and number of trained parameters of every domain, at the end of all."""
    lessons = Lessons(args)
    accelerator = make_accelerator(lessons.settings)  # seeds the model's weights
    names = list(lessons.domains)
    first = names[0]
    model = create_model(args, len(lessons.domains[first].classes))
    models, counts = {first: model}, {first: trained(model)}
    lessons.learn(model, first, first)
    add_domain(model, first)
    for name in names[1:]:
        classes = lessons.domains[name].classes
        models[name] = begin(model, first, name, len(classes), args.share)
        counts[name] = trained(models[name])
        lessons.learn(models[name], name, name)
    if args.share in ("pointwise", "soft") and accelerator.is_main_process:
        for name in names:
            save_domain(model, name, args.out / "domains")
    if args.share == "soft":
        for name in names:
            models[name] = soften(model, name, names)
            counts[name] = trained(models[name])
            lessons.learn(models[name], name, f"{name}-soft")
    table = {}
    for name in names:
        if models[name] is model:
            set_domain(model, name)
        accuracy = lessons.accuracy(models[name], name)
        table[name] = {"accuracy": accuracy, "trained": counts[name]}
    if accelerator.is_main_process:
        write_json(table, args.out / "domains.json")
        print(f"{'domain':>16} {'accuracy':>9} {'trained parameters':>19}")
        for name, row in table.items():
            print(f"{name:>16} {row['accuracy']:9.4f} {row['trained']:19,}")
    return table


if __name__ == "__main__":
    with told_in_one_line():
        run(parse())
