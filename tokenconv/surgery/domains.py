"""Several visual domains in one model, after Guo et al., AAAI 2019.

"Depthwise Convolution is All You Need for Learning Multiple Visual Domains"
(https://arxiv.org/abs/1902.00927) shares the pointwise convolutions of a network between domains
and gives each domain its own depthwise convolutions, norms and classifier. In a Transformer the
linear layers and attention are what is shared. A domain owns the inserted blocks, the depthwise
convolutions that the model has of its own, the norms and the head.

One domain is active: its ``Parameter`` objects are in the modules. Those of the others wait outside
the model, where ``state_dict`` and ``parameters()`` do not see them; ``copy.deepcopy`` and pickle
keep them. They follow the model to its device and dtype when they become active. ``remove_`` keeps
the values that the active domain has in the model's own modules and drops the other domains;
``save``, ``state_dict`` and ``load_state_dict`` are about the active one.
"""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenconv.errors import CheckpointError, SurgeryError, UnknownNameError
from tokenconv.surgery.checkpoint import (
    check_architecture,
    check_shapes,
    compare_base,
    describe,
    refuse_meta,
    saved_plan,
    standing,
    tensors_of,
)
from tokenconv.surgery.edits import Edit, Insertion, inserted_modules, insertion_of
from tokenconv.surgery.fragments import MergedConv
from tokenconv.surgery.plans import Plan
from tokenconv.surgery.roles import heads, is_depthwise, is_norm
from tokenconv.surgery.sites import locate
from tokenconv.surgery.storage import Files, Manifest, read, write

Values = dict[str, Tensor]


@dataclass
class Bank:
    """The domains of a model."""

    active: str
    values: dict[str, Values]
    """By domain, in the order they were added; empty while the domain is active."""


def add_domain(model: nn.Module, name: str, *, num_classes: int | None = None) -> None:
    """Add a domain to a model under surgery.

    The first one is a name for the values that the model has, and is active. A further one starts
    from a copy of the active domain, which stays active and unchanged until ``set_domain``.

    Args:
        model: A model that ``insert_`` has changed.
        name: Letters, digits, ``_``, ``-`` and ``.``, since files will bear it.
        num_classes: Give the domain a fresh head of this many classes; None copies the head.

    Raises:
        SurgeryError: If nothing is inserted, the domain exists already, or ``num_classes`` is given
            and the head is no single ``nn.Linear``.
    """
    insertion = _unfolded(model)
    bank = _check_new(insertion, name)
    if bank is None:
        if num_classes is not None:
            raise SurgeryError(
                f"the first domain is the model as it is, and cannot have a head of {num_classes} "
                f"classes; call the model's reset_classifier({num_classes}) before"
            )
        insertion.domains = Bank(name, {name: {}})
        return
    values = _copied(_owned(model))
    if num_classes is not None:
        values |= _fresh_head(model, num_classes)
    bank.values[name] = values


def set_domain(model: nn.Module, name: str) -> None:
    """Make a domain active: put its parameters and buffers into the modules of the model.

    The ``Parameter`` objects of a domain stay the same ones, so an optimizer over them stays valid.
    What wraps the model and keeps parameters of its own (DDP, FSDP) has to be made anew.

    Args:
        model: A model with domains.
        name: The domain.

    Raises:
        UnknownNameError: If there is no such domain; the nearest ones are listed.
        SurgeryError: If the model has no domains, or other modules than when they were added.
    """
    bank = _bank(model)
    _check_known(bank, name)
    if name == bank.active:
        return
    present, coming = _owned(model), bank.values[name]
    if unlike := present.keys() ^ coming.keys():
        raise SurgeryError(
            f"the modules of the model are not those of when {name!r} was added: {min(unlike)} is "
            f"only in {'the model' if min(unlike) in present else 'the domain'}"
        )
    for key, value in coming.items():
        _follow(value, present[key])
    _put(model, coming)
    bank.values[bank.active], bank.values[name] = present, {}
    bank.active = name


def list_domains(model: nn.Module) -> list[str]:
    """Names of the domains of a model, in the order they were added; none before ``add_domain``.

    Raises:
        SurgeryError: If nothing is inserted in the model.
    """
    bank = insertion_of(model).domains
    return list(bank.values) if bank else []


def domain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the active domain, by key: what its optimizer may train.

    An optimizer over these leaves the outputs of every other domain bit-equal. All other
    parameters are shared, and training them changes every domain.

    Raises:
        SurgeryError: If nothing is inserted in the model.
    """
    _unfolded(model)
    return {key: value for key, value in _owned(model).items() if isinstance(value, nn.Parameter)}


def save_domain(model: nn.Module, name: str, folder: str | Path) -> None:
    """Save what belongs to one domain, active or not, and a note of what is shared.

    Args:
        model: A model with domains.
        name: The domain.
        folder: Gets ``domain-NAME.json`` and ``domain-NAME.safetensors``, written or replaced at
            once; it may hold other domains, and what ``save`` wrote.

    Raises:
        UnknownNameError: If there is no such domain.
        SurgeryError: If the model has no domains.
        CheckpointError: If the model is on the meta device, or files of these names are no
            checkpoint.
        OSError: If the files cannot be written.
    """
    bank = _bank(model)
    _check_known(bank, name)
    values = bank.values[name] or _owned(model)
    write(_files(folder, name), describe(model, values, name), values)


def load_domain(
    model: nn.Module, name: str, folder: str | Path, *, check_base: bool = True
) -> None:
    """Add a domain that ``save_domain`` has saved.

    It takes dtype, device and ``requires_grad`` of the active one, which stays active. In a model
    without domains it takes the place of the values that the model has, and is active. After an
    error the model is as it was.

    Args:
        model: A model with the same blocks inserted and the same shared values as then.
        name: The domain.
        folder: What ``save_domain`` was given.
        check_base: Refuse a model with other shared values, as ``load_`` does.

    Raises:
        SurgeryError: If nothing is inserted, or the domain exists already.
        CheckpointError: If the files are missing, damaged or of a newer version, or do not belong
            to this model.
    """
    insertion = _unfolded(model)
    bank = _check_new(insertion, name)
    manifest, tensors = read(_files(folder, name))
    _check_belongs(model, manifest, name)
    if check_base:
        compare_base(manifest, model)
    values = _copied(_owned(model))
    for key, value in values.items():
        value.data = tensors[key].to(value.device, value.dtype)
    if bank is None:
        _put(model, values)
        insertion.domains = Bank(name, {name: {}})
    else:
        bank.values[name] = values


# --- where the domains are kept ---


def _unfolded(model: nn.Module) -> Insertion:
    insertion = insertion_of(model)
    if insertion.folded:
        raise SurgeryError(
            "the inserted blocks are folded into the weights of the model; domains need them apart"
        )
    if any(isinstance(m, MergedConv) and m.kernel is not None for m in model.modules()):
        raise SurgeryError(
            "kernels of the inserted blocks are merged by fold_, and would stay those of this "
            "domain; model.train() takes them apart"
        )
    return insertion


def _bank(model: nn.Module) -> Bank:
    if (bank := _unfolded(model).domains) is None:
        raise SurgeryError(
            "the model has no domains yet; add_domain(model, name) names the values it has"
        )
    return bank


def _check_known(bank: Bank, name: str) -> None:
    if name not in bank.values:
        raise UnknownNameError("domain", name, bank.values)


def _check_new(insertion: Insertion, name: str) -> Bank | None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise SurgeryError(
            f"expected a name of letters, digits, '_', '-' and '.', since files bear it, got "
            f"{name!r}"
        )
    bank = insertion.domains
    if bank and name in bank.values:
        raise SurgeryError(f"the model has a domain {name!r} already; take another name")
    return bank


# --- what belongs to a domain ---


def _owned(model: nn.Module) -> Values:
    """Values that the active domain has in the model, by key."""
    whole = [*inserted_modules(model).values(), *heads(model)]
    owned = {id(module) for top in whole for module in top.modules()}
    return tensors_of(
        model, lambda module: id(module) in owned or is_norm(module) or is_depthwise(module)
    )


def _copied(values: Values) -> Values:
    with torch.inference_mode(False):  # or the copies could never be trained
        return copy.deepcopy(values)


def _follow(value: Tensor, like: Tensor) -> None:
    """Move a waiting value, and its gradient, to where the model is now."""
    value.data = value.data.to(like.device, like.dtype)
    if value.grad is not None:
        value.grad.data = value.grad.data.to(like.device, like.dtype)


def _put(model: nn.Module, values: Values) -> None:
    for key, value in values.items():
        name, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(name), leaf, value)
    if head := _linear_head(model):
        head.out_features = _root(model).num_classes = head.weight.shape[0]


# --- the head ---


def _root(model: nn.Module) -> Any:
    return model.get_submodule(locate(model)[0])


def _linear_head(model: nn.Module) -> nn.Linear | None:
    """The head, if it is a single linear layer."""
    found = heads(model)
    return found[0] if len(found) == 1 and isinstance(found[0], nn.Linear) else None


def _key_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _fresh_head(model: nn.Module, num_classes: int) -> Values:
    head = _linear_head(model)
    if head is None:
        kinds = ", ".join(type(module).__name__ for module in heads(model))
        raise SurgeryError(
            f"num_classes needs a head that is a single nn.Linear, got {kinds}; leave num_classes "
            f"out to copy the head"
        )
    if num_classes < 1:
        raise SurgeryError(f"expected num_classes >= 1, got {num_classes}")
    with torch.inference_mode(False):
        fresh = nn.Linear(head.in_features, num_classes, head.bias is not None)
    return {f"{_key_of(model, head)}.{leaf}": p for leaf, p in fresh.named_parameters()}


# --- whether a saved domain belongs to a model ---


def _files(folder: str | Path, name: str) -> Files:
    stem = Path(folder) / f"domain-{name}"
    return Files(stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors"))


def _check_belongs(model: nn.Module, manifest: Manifest, name: str) -> None:
    everything, owned, head = tensors_of(model), _owned(model), _linear_head(model)
    refuse_meta(everything)
    check_architecture(model, manifest)
    if manifest.domain != name:
        raise CheckpointError(f"expected the domain {name!r}, the file holds {manifest.domain!r}")
    present = Plan.from_json(standing(model, insertion_of(model).plan).to_json())
    if _changes(saved_plan(manifest)) != _changes(present):
        raise CheckpointError(
            "the domain was saved from a model with other blocks inserted; insert the same ones"
        )
    relevant = {
        key: value
        for key, value in everything.items()
        if key in owned or isinstance(value, nn.Parameter)
    }
    prefix = f"{_key_of(model, head)}." if head else None
    check_shapes(manifest, relevant, {k for k in owned if prefix and k.startswith(prefix)})
    if unlike := owned.keys() ^ manifest.tensors.keys():
        raise CheckpointError(
            f"the domain was saved from a model that owns other modules: {min(unlike)} is only in "
            f"{'the model' if min(unlike) in owned else 'the file'}"
        )


def _changes(plan: Plan) -> list[Edit]:
    return [replace(edit, added_params=0, added_macs=0) for edit in plan.edits]
