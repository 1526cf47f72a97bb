"""Saved hybrids: the plan of a model, and the values that were added to it or trained.

A folder holds ``plan.json`` and ``delta.safetensors``, see ``storage``. Values that are not saved
must be those of the model that a checkpoint is loaded into. Some of them are therefore noted, and
compared within what a cast to bfloat16 or float16 changes.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenconv.costs import meta_copy
from tokenconv.errors import CheckpointError, TokenConvError
from tokenconv.surgery.edits import carry_out, inserted_modules, insertion_of, take_back
from tokenconv.surgery.plans import Plan, check_fits, check_untouched
from tokenconv.surgery.sites import locate
from tokenconv.surgery.storage import Files, Manifest, form_of, noted, read, shape_of, write

_SAMPLES = 8
_RTOL = 2**-7  # two roundings to bfloat16
_ATOL = 1e-7  # what float16 loses below its normal numbers


def save(model: nn.Module, folder: str | Path) -> None:
    """Save what was inserted into a model and what was trained, without the rest of the model.

    Written are every value of the inserted blocks, every parameter with ``requires_grad=True`` and
    every persistent buffer, such as the statistics of BatchNorm. What a plan took out of the model
    is not saved. Where several processes save to one folder, each waits for the other, and the last
    one's checkpoint stays.

    Args:
        model: A model that ``insert_`` has changed.
        folder: Made if missing. A checkpoint in it is replaced, at once; other files are left.

    Raises:
        SurgeryError: If nothing is inserted, or an argument of a block has no JSON form.
        CheckpointError: If the model is folded or on the meta device, or the folder holds files
            of these names that are no checkpoint.
        OSError: If the files cannot be written; a checkpoint that was there stays.
    """
    insertion_of(model)
    kept = {id(p) for block in inserted_modules(model).values() for p in block.parameters()}
    tensors = {
        key: value
        for key, value in tensors_of(model).items()
        if value.requires_grad or id(value) in kept or not isinstance(value, nn.Parameter)
    }
    write(_files(folder), describe(model, tensors), tensors)


def load_(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> nn.Module:
    """Insert what ``save`` saved into an untouched model, in place, and load its values.

    Values are copied into the parameters of the model, which keep dtype, device and
    ``requires_grad``. Nothing that is loaded can run code. After an error the model is as it was.

    Args:
        model: A live timm model of the same architecture, with the same values as then where they
            are not saved; their dtype may be another.
        folder: What ``save`` was given.
        check_base: Refuse a model with other values. It compares eight values of each parameter
            that is not saved, so it sees another initialisation or pretrained tag, and not that a
            few values were changed.

    Returns:
        The same model.

    Raises:
        SurgeryError: If the model already holds blocks, or is no timm model.
        CheckpointError: If the files are missing, damaged or of a newer version, or do not belong
            to this model.
    """
    check_untouched(model)
    manifest, tensors = read(_files(folder))
    refuse_meta(tensors_of(model))
    check_architecture(model, manifest)
    plan = _fitting_plan(model, manifest)
    check_shapes(manifest, tensors_of(_rehearsed(model, plan)))
    if check_base:
        compare_base(manifest, model)
    carry_out(model, plan.edits, plan)
    try:
        _fill(model, tensors)
    except BaseException:
        take_back(model)
        raise
    return model


# --- what a checkpoint says about a model ---


def describe(
    model: nn.Module, tensors: Mapping[str, Tensor], domain: str | None = None
) -> Manifest:
    """What to write beside some values of a model under surgery.

    Raises:
        CheckpointError: If the model is folded or on the meta device.
    """
    insertion, own = insertion_of(model), tensors_of(model)
    if insertion.folded:
        raise CheckpointError(
            "the inserted blocks are folded into the weights of the model; save before folding"
        )
    refuse_meta({**own, **tensors})
    return Manifest(
        architecture=_architecture(model),
        plan=json.loads(standing(model, insertion.plan).to_json()),
        tensors={key: form_of(value) for key, value in tensors.items()},
        base={
            key: _note(value)
            for key, value in own.items()
            if isinstance(value, nn.Parameter) and key not in tensors
        },
        domain=domain,
    )


def standing(model: nn.Module, plan: Plan) -> Plan:
    """A plan without what has left the model since, when blocks were pruned."""
    names = dict(model.named_modules())
    edits = tuple(edit for edit in plan.edits if (edit.inserted or edit.place.host) in names)
    if not edits:
        raise CheckpointError("none of the inserted blocks is in the model any more")
    return replace(plan, edits=edits)


def tensors_of(
    model: nn.Module, filter_fn: Callable[[nn.Module], bool] = lambda module: True
) -> dict[str, Tensor]:
    """Parameters and persistent buffers by key, those of chosen modules; tied ones repeat."""
    return {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        if filter_fn(module)
        for key, value in (module._parameters | module._buffers).items()
        if value is not None and key not in module._non_persistent_buffers_set
    }


def refuse_meta(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors without values."""
    if key := next((key for key, value in tensors.items() if value.is_meta), None):
        raise CheckpointError(
            f"{key} is on the meta device and has no values; expected a model with weights. Build "
            f"it on a real device"
        )


def _architecture(model: nn.Module) -> str | None:
    """The architecture that a plan is for: of a registered hybrid, that of its base."""
    insertion = vars(model).get("_tokenconv")
    if insertion is not None and insertion.base is not None:
        return insertion.base
    config = getattr(model.get_submodule(locate(model)[0]), "pretrained_cfg", None) or {}
    return config.get("architecture")


def _note(value: Tensor) -> str:
    return f"{shape_of(value)}: {' '.join(f'{v:.6g}' for v in _sample(value))}"


def _sample(value: Tensor) -> list[float]:
    """Values spread over a tensor by the golden ratio, which falls in step with no axis."""
    flat = value.detach().reshape(-1)
    spread = torch.arange(1, _SAMPLES + 1, dtype=torch.float64) * 0.6180339887498949 % 1
    index = (spread * flat.numel()).long()[: flat.numel()]
    return flat[index.to(flat.device)].double().tolist()


# --- whether it belongs to a model ---


def check_architecture(model: nn.Module, manifest: Manifest) -> None:
    """Refuse a checkpoint of another timm architecture."""
    if (present := _architecture(model)) != manifest.architecture:
        raise CheckpointError(
            f"the checkpoint is for a {manifest.architecture}, got a {present}; build the model "
            f"with timm.create_model({manifest.architecture!r})"
        )


def saved_plan(manifest: Manifest) -> Plan:
    """The plan that was carried out in the saved model."""
    try:
        return Plan.from_json(json.dumps(manifest.plan))
    except TokenConvError as error:
        raise CheckpointError(f"the plan in the checkpoint cannot be read: {error}") from error


def check_shapes(
    manifest: Manifest, present: Mapping[str, Tensor], resizable: Collection[str] = ()
) -> None:
    """Compare keys and shapes with those of a model; the first axis of some may be another."""
    saved = manifest.tensors | manifest.base
    if unlike := saved.keys() ^ present.keys():
        key = min(unlike)
        raise CheckpointError(
            f"{len(unlike)} names are not the same; the first, {key}, is only in the "
            f"{'checkpoint' if key in saved else 'model'}. Build the model as it was built then"
        )
    for key, text in saved.items():
        shape, expected = shape_of(present[key]), text.split(":")[0].split(" ")[0]
        skipped = key in resizable
        if shape.split("x")[skipped:] != expected.split("x")[skipped:]:
            raise CheckpointError(
                f"{key}: expected shape {expected}, the model has {shape}. Build the model as it "
                f"was built then (num_classes, img_size, ...)"
            )


def compare_base(manifest: Manifest, model: nn.Module) -> None:
    """Refuse a model with other values than then, where they are not saved."""
    present = tensors_of(model)
    for key, text in manifest.base.items():
        then, now = noted(text), _sample(present[key])
        alike = [abs(a - b) <= _RTOL * abs(a) + _ATOL for a, b in zip(then, now, strict=False)]
        if not all(alike):
            at = alike.index(False)
            raise CheckpointError(
                f"{key} is not saved and has other values than when the checkpoint was made "
                f"(expected {then[at]:.6g}, got {now[at]:.6g}). Start from the same pretrained "
                f"weights, or pass check_base=False"
            )


def _fitting_plan(model: nn.Module, manifest: Manifest) -> Plan:
    plan = saved_plan(manifest)
    try:
        return check_fits(model, plan)
    except (TokenConvError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not fit this model: {error}") from error


def _rehearsed(model: nn.Module, plan: Plan) -> nn.Module:
    meta = meta_copy(model)
    carry_out(meta, plan.edits, plan)
    return meta


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy values into a model; either all of them or, after an error, none."""
    targets, before = tensors_of(model), dict[str, Tensor]()
    try:
        for key in list(tensors):
            before[key] = targets[key].detach().to("cpu", copy=True)
            targets[key].copy_(tensors.pop(key))
    except BaseException:
        for key in reversed(before):  # a tied tensor was kept twice, the first time untouched
            targets[key].copy_(before[key])
        raise


def _files(folder: str | Path) -> Files:
    return Files(Path(folder) / "plan.json", Path(folder) / "delta.safetensors")
