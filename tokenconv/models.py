"""Hybrids as architectures of timm: ``timm.create_model("vit_small_patch16_224_mix_ffn")``.

Importing this module registers them. A hybrid is built as timm builds its base, takes the base's
weights where ``pretrained=True``, and only then is given the blocks; so it starts with the output
of the base, and every keyword argument of the base works.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
import torch
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    load_pretrained,
    load_state_dict,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from tokenconv.errors import SurgeryError, UnknownNameError
from tokenconv.surgery.binding import GridBinding
from tokenconv.surgery.edits import CHILDREN, insertion_of
from tokenconv.surgery.features import bind_stages
from tokenconv.surgery.lifecycle import insert_
from tokenconv.surgery.plans import Plan

__all__ = ["HYBRIDS", "checkpoint_filter_fn"]  # timm adds the names of the entrypoints

_BASES = (
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base")),
    *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base")),
    *(f"pvt_v2_{size}" for size in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")),
)
_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "mix_ffn": {},
    "peg": {"blocks": r"\bblocks\.0$"},  # once per stage, as in CPVT and Twins
    "separable_ffn": {},
    "conv_glu": {},
    "leff": {},
}
HYBRIDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    f"{base}_{block}": (base, {"block": block, **arguments})
    for block, arguments in _BLOCKS.items()
    for base in _BASES
}
"""From the name of every registered hybrid to its base and to what is inserted in it."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Fit a checkpoint to a hybrid as timm fits one to the base: positions are resized, and so on.

    Args:
        state_dict: A checkpoint of the base or of the hybrid.
        model: A hybrid, for ``timm.models.load_checkpoint(model, path, filter_fn=...)``.

    Returns:
        The state dict, which loads with ``strict=True``.
    """
    family = sys.modules[type(model).__module__]
    base_filter = getattr(family, "checkpoint_filter_fn", None)
    return base_filter(state_dict, model) if base_filter else state_dict


def _build(
    name: str, base: str, request: Mapping[str, Any], pretrained: bool, **kwargs: Any
) -> nn.Module:
    """Build the base, load its weights, insert, and wrap where features are wanted."""
    base, tag = _known(base)
    build = model_entrypoint(base)
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or tag
    overlay = {**(kwargs.get("pretrained_cfg_overlay") or {}), "architecture": name}
    kwargs["pretrained_cfg_overlay"] = overlay
    # The weights of a hybrid do not fit its base: they are loaded once the blocks are there.
    own = pretrained and _is_hybrid(resolve_pretrained_cfg(base, kwargs["pretrained_cfg"], overlay))
    kwargs["pretrained"] = pretrained and not own

    def finish(model: nn.Module) -> None:
        insertion_of(insert_(model, **request)).base = base
        if own:
            _load_own(model, **kwargs)

    if kwargs.get("features_only"):
        return _build_features(build, finish, kwargs)
    model = build(**kwargs)
    finish(model)
    return model


def _known(base: str) -> tuple[str, str]:
    """Architecture and tag of a base; hybrids are none."""
    architecture, tag = split_model_name_tag(base)
    ours = {*HYBRIDS, "tokenconv"}
    if architecture in ours or not timm.is_model(architecture):
        raise UnknownNameError("base", architecture, {*timm.list_models()} - ours)
    return architecture, tag


def _is_hybrid(cfg: PretrainedCfg) -> bool:
    """Whether pretrained weights are those of a hybrid, and not of its base."""
    if cfg.source in ("local-dir", "hf-hub"):  # saved together with the name of the hybrid
        return True
    keys: Iterable[str] = cfg.state_dict or ()
    if not keys and cfg.file and not cfg.custom_load:
        keys = load_state_dict(cfg.file, weights_only=True)  # older timm's default is False
    return any(set(CHILDREN.values()) & set(key.split(".")) for key in keys)


def _load_own(model: Any, **kwargs: Any) -> None:
    """Load the weights of a hybrid, adapted to its input and classes as timm adapts them."""
    load_pretrained(
        model,
        num_classes=model.num_classes,
        in_chans=kwargs.get("in_chans", model.pretrained_cfg["input_size"][0]),
        filter_fn=checkpoint_filter_fn,
        strict=kwargs.get("pretrained_strict", True),
        cache_dir=kwargs.get("cache_dir"),
    )


def _build_features(
    build: Callable[..., nn.Module], finish: Callable[[nn.Module], None], kwargs: dict[str, Any]
) -> nn.Module:
    """Let timm build its feature extractor, around a model that is finished first.

    Which class it takes is seen from one built without weights.
    """
    trial = {key: value for key, value in kwargs.items() if key != "device"}
    with torch.device("meta"):
        usual: Any = type(build(**{**trial, "pretrained": False}))
    bindings: list[GridBinding] = []

    class FinishFirst(usual):
        def __init__(self, model: nn.Module, *args: Any, **feature_cfg: Any):
            finish(model)
            bindings.extend(vars(m)["_binding"] for m in model.modules() if "_binding" in vars(m))
            super().__init__(model, *args, **feature_cfg)

    extractor = build(**{**kwargs, "feature_cls": FinishFirst})
    extractor.__class__ = usual
    if bindings:
        bind_stages(extractor, bindings[0])
    return extractor


def tokenconv(
    pretrained: bool = False, *, base: str, tokenconv: str | Mapping[str, Any], **kwargs: Any
) -> nn.Module:
    """Any timm architecture with blocks inserted.

    Args:
        pretrained: Load the weights of the base, or those of a saved hybrid.
        base: A timm architecture, with or without a pretrained tag.
        tokenconv: A plan as JSON text, or the arguments of ``insert_``, such as
            ``{"block": "mix_ffn", "blocks": [6, 7]}``. Both can be saved by timm.
        **kwargs: Arguments of the base.

    Returns:
        The hybrid; a feature extractor where ``features_only=True``.

    Raises:
        UnknownNameError: If there is no such architecture or block.
        SurgeryError: If the blocks cannot be inserted there.
    """
    if isinstance(tokenconv, str):
        request: Mapping[str, Any] = {"block": Plan.from_json(tokenconv)}
    elif isinstance(tokenconv, Mapping) and isinstance(tokenconv.get("block"), str):
        request = tokenconv
    else:
        raise SurgeryError(
            f'expected tokenconv={{"block": "mix_ffn", ...}} or the text of plan.to_json(), '
            f"got {tokenconv!r}"
        )
    return _build("tokenconv", base, request, pretrained, **kwargs)


def _entrypoint(name: str, base: str, request: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False, *, tokenconv: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> nn.Module:
        given = tokenconv or {}
        if not isinstance(given, Mapping) or "block" in given:
            raise SurgeryError(
                f"{name} takes arguments of {request['block']} as tokenconv, such as "
                f'{{"kernel_size": 5}}, got {tokenconv!r}; for other blocks create "tokenconv"'
            )
        return _build(name, base, {**request, **given}, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"``{base}`` with ``{request['block']}`` inserted; ``tokenconv`` adds to {dict(request)}."
    )
    return build


default_cfgs = generate_default_cfgs(
    {
        name + tagged.removeprefix(base): cfg
        for name, (base, _) in HYBRIDS.items()
        for tagged, cfg in get_arch_pretrained_cfgs(base).items()
    }
)
"""Those of the bases, tags included: the weights are theirs, and so is the output to begin with."""

register_model(tokenconv)
for _name, (_base, _request) in HYBRIDS.items():
    globals()[_name] = register_model(_entrypoint(_name, _base, _request))
