"""Make a hybrid simpler for inference, where that changes nothing but rounding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from tokenconv.errors import SurgeryError
from tokenconv.surgery.edits import inserted_modules, insertion_of
from tokenconv.surgery.fragments import MergedConv, Replacement

_REASONS = {
    "beside": "it runs beside {host}, and has no simpler form",
    "replace": "it stands in place of {host}, and has no simpler form",
}
"""By the first word of a site."""


@runtime_checkable
class Foldable(Protocol):
    """A module that knows a simpler form of itself, which ``fold_`` turns it into.

    It folds what is inside it as well. A fragment of surgery that holds a block may be one too, and
    then decides for the block.
    """

    def fold_(self) -> bool:
        """Take the simpler form, in place; the output stays equal in real arithmetic.

        Returns:
            Whether anything changed.

        Raises:
            ValueError: With the reason, if it cannot; nothing has changed then.
        """
        ...


@dataclass(frozen=True)
class FoldReport:
    """What ``fold_`` did; print it to read it."""

    folded: tuple[str, ...]
    """Names of the inserted modules that are simpler now."""
    kept: dict[str, str]
    """Why others run as before, by name; what was folded earlier is in neither list."""

    def __str__(self) -> str:
        names = [*self.folded, *self.kept]
        width = max((len(name) for name in names), default=0)
        lines = [f"{len(self.folded)} of {len(names)} inserted modules folded"]
        lines.extend(f"  {name:<{width}}  folded" for name in self.folded)
        lines.extend(f"  {name:<{width}}  kept: {reason}" for name, reason in self.kept.items())
        return "\n".join(lines)


def fold_(model: nn.Module) -> FoldReport:
    """Fold what was inserted into simpler computations, in place, for inference.

    Equal in real arithmetic, and within 1e-5 (relative) in float32:

    - ``x + conv(x)`` becomes one convolution, whose kernel has grown by 1 in the centre. Not for
      kernels stored in float16 or bfloat16, in which ``1 + w`` loses most of a small ``w``; nor
      should the model be converted to them, or run under autocast, afterwards.
    - A kernel that was added to a convolution of the model is added once, and not in every forward
      pass.
    - A BatchNorm inside a block becomes part of the linear layer or convolution beside it, and its
      keys are gone.

    No other key of the state dict changes. A kernel of the first kind has its folded value there,
    marked in the metadata of the state dict, so that ``load_state_dict`` refuses to mix models
    before and after folding (a copy without metadata, as in safetensors, cannot be told apart: save
    before folding). Kernels of the second kind keep the values that they have: loading others
    brings the sum up to date, ``model.train()`` drops it, and a change by hand in evaluation mode
    is not seen. The model's own parameters are not touched, and ``remove_`` gives the model back as
    before.

    Args:
        model: A model that ``insert_`` has changed, in evaluation mode.

    Returns:
        What was folded now, and what could not be, with the reason.

    Raises:
        SurgeryError: If nothing is inserted, or the model is in training mode.
    """
    insertion = insertion_of(model)
    if model.training:
        raise SurgeryError("folding is for inference: call model.eval() first")
    folded: list[str] = []
    kept: dict[str, str] = {}
    for name, block in inserted_modules(model).items():
        host = model.get_submodule(name.rpartition(".")[0])
        start = host if isinstance(host, Replacement) and isinstance(host, Foldable) else block
        changed, refusal = _fold(start)
        if changed:
            folded.append(name)
            insertion.folded = insertion.folded or not isinstance(host, MergedConv)
            vars(block)["tokenconv_folded"] = True
        if refusal or "tokenconv_folded" not in vars(block):
            kept[name] = refusal or _reason(name, block)
    return FoldReport(tuple(folded), kept)


def _fold(module: nn.Module) -> tuple[bool, str]:
    """Fold what is in a module: whether anything changed, and what else was refused."""
    changed, refusal = False, ""
    for part in _foldable(module):
        try:
            changed = part.fold_() or changed
        except ValueError as error:
            refusal = str(error)
    return changed, refusal


def _foldable(module: nn.Module) -> Iterator[Foldable]:
    """The outermost modules that can fold themselves."""
    if isinstance(module, Foldable):
        yield module
        return
    for child in module.children():
        yield from _foldable(child)


def _reason(name: str, block: nn.Module) -> str:
    position = vars(block)["tokenconv_site"].partition("_")[0]
    generic = f"a {type(block).__name__} has no simpler form with the same output"
    return _REASONS.get(position, generic).format(host=name.rpartition(".")[0])
