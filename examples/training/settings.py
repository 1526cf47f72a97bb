"""How to train: a dataclass that the command line is made from and a resumed run is checked by."""

import argparse
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from training.errors import TrainingError


def option(default: Any, text: str, *, may_change: bool = False, **argument: Any) -> Any:
    """A field that is an option of the command line as well.

    Args:
        default: Its value where nothing is said.
        text: What ``--help`` says.
        may_change: Whether a run may be resumed with another value.
        **argument: Further arguments of ``add_argument``.
    """
    return field(
        default=default, metadata={"help": text, "may_change": may_change, "argument": argument}
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; every field is an option of the scripts."""

    out: Path = option(Path("runs/train"), "folder of the run", may_change=True)
    resume: str = option(
        "no", "auto goes on from the last checkpoint, if there is one", choices=("no", "auto"),
        may_change=True,
    )  # fmt: skip
    epochs: int = option(20, "passes over the training data")
    batch_size: int = option(64, "images of one optimizer step, over all processes")
    accumulate: int = option(1, "parts that they are computed in; the loss is the mean of theirs")
    lr: float = option(1e-3, "learning rate of AdamW at its peak")
    weight_decay: float = option(0.05, "of AdamW, on weights")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises")
    layer_decay: float = option(1.0, "factor of the learning rate per layer below the head")
    inserted_lr_scale: float = option(1.0, "factor of the learning rate of what was inserted")
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 does not clip")
    ema: float = option(0.0, "decay of an average of the weights, which is evaluated then; 0: none")
    precision: str = option("no", "mixed precision", choices=("no", "bf16", "fp16"))
    fsdp: bool = option(False, "shard weights and optimizer over the processes (FSDP2)")
    compile: bool = option(False, "torch.compile the model")
    grad_checkpointing: bool = option(False, "compute activations again instead of keeping them")
    seed: int = option(0, "of weights, data and augmentation")
    workers: int = option(2, "processes that load data", may_change=True)
    save_every: int = option(
        0, "steps between checkpoints; 0: at the end of every epoch", may_change=True
    )
    log_every: int = option(10, "steps between logged losses", may_change=True)

    def __post_init__(self) -> None:
        at_least_1 = ("epochs", "batch_size", "accumulate", "log_every")
        at_least_0 = ("lr", "weight_decay", "clip_grad", "seed", "workers", "save_every")
        up_to_1 = ("warmup", "ema", "layer_decay")
        for names, low, high in (
            (at_least_1, 1, math.inf), (at_least_0, 0, math.inf), (up_to_1, 0, 1),
        ):  # fmt: skip
            for name in names:
                value = getattr(self, name)
                if not low <= value <= high:
                    flag = f"--{name.replace('_', '-')}"
                    raise TrainingError(f"expected {flag} in {low} to {high}, got {value}")
        if self.batch_size % self.accumulate:
            raise TrainingError(
                f"expected --batch-size to be a multiple of --accumulate, "
                f"got {self.batch_size} and {self.accumulate}"
            )

    @classmethod
    def add_options(cls, parser: argparse._ArgumentGroup) -> None:
        """Make an option of every field."""
        types = get_type_hints(cls)
        for one in fields(cls):
            words: dict[str, Any] = {"help": one.metadata["help"], "default": one.default}
            if types[one.name] is bool:
                words["action"] = argparse.BooleanOptionalAction
            else:
                words["type"] = types[one.name]
            name = f"--{one.name.replace('_', '-')}"
            parser.add_argument(name, **words, **one.metadata["argument"])

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """The settings that were asked for."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls)})

    @classmethod
    def may_change(cls) -> set[str]:
        """Names of what a run may be resumed with another value of."""
        return {one.name for one in fields(cls) if one.metadata["may_change"]}
