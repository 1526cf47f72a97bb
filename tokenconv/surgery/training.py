"""What of a hybrid is trained, and how fast: ``requires_grad`` and parameter groups."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from tokenconv.errors import SurgeryError, UnknownNameError
from tokenconv.surgery.edits import inserted_modules, insertion_of
from tokenconv.surgery.roles import heads, is_depthwise, is_norm

PRESETS = ("inserted", "inserted+head", "depthwise+norm+head", "all")
"""What ``trainable_`` takes."""


def trainable_(model: nn.Module, preset: str) -> nn.Module:
    """Say which parameters are trained: sets ``requires_grad`` of every parameter, in place.

    - ``"inserted"``: what ``insert_`` has put in.
    - ``"inserted+head"``: that, and the classifier.
    - ``"depthwise+norm+head"``: depthwise convolutions, inserted ones and the model's own, with
      their biases; weights and biases of the norm layers, those inside attention and heads too;
      the classifier. LayerScale is no norm and stays frozen, as do pointwise parts.
    - ``"all"``: everything.

    The classifier is what timm's ``get_classifier()`` gives: both heads of a distilled model,
    nothing where there is none. A norm layer is a module that has ``Norm`` in the name of its class
    or of an ancestor, and no parameters but vectors: torch's and timm's, RMS and global response
    norms included. BatchNorm goes on updating its statistics in training mode, trained or not.

    Args:
        model: A model that ``insert_`` has changed; any model for the presets that do not name what
            is inserted.
        preset: One of the above.

    Returns:
        The same model.

    Raises:
        UnknownNameError: If there is no such preset.
        SurgeryError: If nothing is inserted and the preset names it, or an inserted kernel could
            get no gradient, because a part behind it is zero and not trained.
    """
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    if "inserted" in preset:
        insertion_of(model)
    modules = [part for name in preset.split("+") for part in _PARTS[name](model)]
    chosen = {id(p) for recurse, module in modules for p in module.parameters(recurse)}
    _refuse_dead_kernels(model, chosen)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return model


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    inserted_lr_scale: float = 1.0,
    no_weight_decay_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of torch or timm.

    Built on timm's ``param_groups_weight_decay`` and ``param_groups_layer_decay``: parameters with
    one axis (biases, norms, inserted or not) and those of timm's ``no_weight_decay()`` get no
    weight decay, inserted kernels do. ``PEG`` has a ``no_weight_decay()`` too, since Twins keeps
    its kernels out. Under layer decay an inserted block belongs to the layer that it stands in.

    Every group has its final ``lr``, so schedulers of torch and timm, which scale the ``lr`` that
    they find, work as usual. timm's ``lr_scale`` is multiplied in and left out, or timm's
    schedulers would apply it twice; values that these set absolutely (``lr_min``,
    ``warmup_lr_init``) are therefore the same for all groups.

    Args:
        model: A timm model, with or without an insertion, after ``trainable_``.
        lr: Learning rate of the last layer.
        weight_decay: Of the parameters that have any.
        layer_decay: Factor on the learning rate from a layer to the one before it; None has one
            learning rate for all.
        inserted_lr_scale: Factor on the learning rate of what was inserted.
        no_weight_decay_list: Further names without weight decay; ``*`` stands for any text.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``, each trained parameter in one of them.

    Raises:
        SurgeryError: If ``layer_decay`` is asked of a model that does not know its layers.

    References:
        Layer decay: BEiT, https://arxiv.org/abs/2106.08254; PEG without weight decay: Twins,
        https://arxiv.org/abs/2104.13840
    """
    spared = _no_weight_decay(model) | set(no_weight_decay_list)
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
    elif callable(getattr(model, "group_matcher", None)):
        groups = param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay
        )
    else:
        raise SurgeryError(
            f"layer_decay needs a timm model, whose group_matcher() tells its layers, got a "
            f"{type(model).__name__}; pass the model inside it"
        )
    inserted = {id(p) for _, block in _inserted(model) for p in block.parameters()}
    return [part for group in groups for part in _split(group, lr, inserted, inserted_lr_scale)]


def _split(
    group: dict[str, Any], lr: float, inserted: set[int], inserted_lr_scale: float
) -> Iterator[dict[str, Any]]:
    """The model's own and the inserted parameters of a group of timm, each with their ``lr``."""
    lr = lr * group.pop("lr_scale", 1.0)
    own = [p for p in group["params"] if id(p) not in inserted]
    new = [p for p in group["params"] if id(p) in inserted]
    if own:
        yield {**group, "params": own, "lr": lr}
    if new:
        yield {**group, "params": new, "lr": lr * inserted_lr_scale}


def _no_weight_decay(model: nn.Module) -> set[str]:
    """Names that modules keep out of weight decay, as timm's models do."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        listed: Any = getattr(module, "no_weight_decay", tuple)
        names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


# --- parts of a preset: modules to train, each with or without what is inside it ---

_Part = Iterable[tuple[bool, nn.Module]]


def _inserted(model: nn.Module) -> _Part:
    return [(True, block) for block in inserted_modules(model).values()]


def _head(model: nn.Module) -> _Part:
    return [(True, head) for head in heads(model)]


def _depthwise(model: nn.Module) -> _Part:
    return [(False, module) for module in model.modules() if is_depthwise(module)]


def _norms(model: nn.Module) -> _Part:
    return [(False, module) for module in model.modules() if is_norm(module)]


def _everything(model: nn.Module) -> _Part:
    return [(True, model)]


_PARTS: dict[str, Callable[[nn.Module], _Part]] = {
    "inserted": _inserted,
    "head": _head,
    "depthwise": _depthwise,
    "norm": _norms,
    "all": _everything,
}


def _refuse_dead_kernels(model: nn.Module, chosen: set[int]) -> None:
    for name, block in inserted_modules(model).items():
        frozen = {k: p for k, p in block.named_parameters() if id(p) not in chosen}
        if len(frozen) == len(list(block.parameters())):
            continue
        for key, parameter in frozen.items():
            if parameter.ndim > 1 and not parameter.is_meta and not parameter.any():
                raise SurgeryError(
                    f"{name}.{key} is zero and would stay so, and no gradient passes it: train "
                    f'"inserted" or "inserted+head" first'
                )
