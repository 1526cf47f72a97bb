"""What keys of the papers' repositories are called here: mixers."""

from torch import nn

from tokenconv.blocks.official.renames import Renames, Sources
from tokenconv.blocks.reparam import DILATIONS


def _numbered(theirs: str, ours: str, *places: int) -> Renames:
    """A row of which only some places have values."""
    return {f"{theirs}.{place}": f"{ours}.{place}" for place in places}


def _conv_norm(theirs: str, ours: str, *, conv: str = "conv", norm: str = "bn") -> Renames:
    return {f"{theirs}.{conv}": f"{ours}.conv", f"{theirs}.{norm}": f"{ours}.norm"}


_INCEPTION: Renames = {
    "dwconv_hw": "branches.1",
    "dwconv_w": "branches.2",
    "dwconv_h": "branches.3",
}
_CONVNEXT: Renames = {
    "dwconv": "body.dwconv",
    "norm": "body.norm",
    "pwconv1": "body.fc1",
    "grn.gamma": "body.grn.weight",
    "grn.beta": "body.grn.bias",
    "pwconv2": "body.fc2",
    "gamma": "body.layer_scale.gamma",
    "conv_dw": "body.dwconv",  # timm's names from here on
    "mlp.fc1": "body.fc1",
    "mlp.grn": "body.grn",
    "mlp.fc2": "body.fc2",
}
_MIXER, _SUM = "body.mix.mixer.branches", "body.sum.branches"
_REPMIXER: Renames = {
    "norm.rbr_skip": "body.mix.norm",
    **_conv_norm("mixer.rbr_conv.0", f"{_MIXER}.0"),
    **_conv_norm("mixer.rbr_scale", f"{_MIXER}.1"),
    "mixer.rbr_skip": f"{_MIXER}.2",
    "norm.identity": "body.mix.norm",  # timm's names from here on
    **_conv_norm("mixer.conv_kxk.0", f"{_MIXER}.0"),
    **_conv_norm("mixer.conv_scale", f"{_MIXER}.1"),
    "mixer.identity": f"{_MIXER}.2",
    "layer_scale.gamma": "body.layer_scale.gamma",
    "layer_scale": "body.layer_scale.gamma",
}
_REPVIT: Renames = {
    **_conv_norm("conv", f"{_SUM}.0", conv="c"),
    "conv1": f"{_SUM}.1",
    "bn": "body.norm",
}


def _dilated(theirs: str, ours: str, side: int) -> Renames:
    """The branches, which are named after their side and dilation."""
    names = {f"{theirs}lk_origin": f"{ours}.0.conv", f"{theirs}origin_bn": f"{ours}.0.norm"}
    for i, (dilation, small) in enumerate(DILATIONS.get(side, {}).items(), 1):
        names[f"{theirs}dil_conv_k{small}_{dilation}"] = f"{ours}.{i}.conv"
        names[f"{theirs}dil_bn_k{small}_{dilation}"] = f"{ours}.{i}.norm"
    return names


def _side(block: nn.Module) -> int:
    return int(block.kernel_size)  # pyright: ignore[reportArgumentType]


def _dilated_reparam(block: nn.Module) -> Renames:
    return _dilated("", _SUM, _side(block))


def _unireplknet_block(block: nn.Module) -> Renames:
    side = _side(block)
    return {
        **_dilated("dwconv.", f"body.dwconv.{_SUM}", side),
        **({} if side in DILATIONS and side > 5 else {"dwconv": "body.dwconv"}),
        "norm": "body.norm",
        "se.down": "body.se.reduce",
        "se.up": "body.se.expand",
        "pwconv1.1": "body.fc1",
        "act.1.gamma": "body.grn.weight",
        "act.1.beta": "body.grn.bias",
        "pwconv2.0": "body.fc2",
        "pwconv2.2": "body.norm2",
        "gamma": "body.layer_scale.gamma",
    }


def _sam(block: nn.Module) -> Renames:
    heads = len(block.kernel_size)  # pyright: ignore[reportArgumentType]
    context = "body.modulate.context"
    return {
        "v": "body.modulate.value",
        "s": f"{context}.0",
        **{f"local_conv_{i + 1}": f"{context}.1.branches.{i}" for i in range(heads)},
        "proj0": f"{context}.3",
        "bn": f"{context}.4",
        "proj1": f"{context}.6",
        "proj": "body.proj",
    }


SOURCES: Sources = {
    "metaformer": {
        "sep_conv": {
            "pwconv1": "body.pwconv1",
            "act1": "body.act1",
            "dwconv": "body.dwconv",
            "act2": "body.act2",
            "pwconv2": "body.pwconv2",
        }
    },
    "inceptionnext": {
        "inception_dwconv": {k: f"body.dwconv.{v}" for k, v in _INCEPTION.items()},
        "inceptionnext_block": {
            **{f"token_mixer.{k}": f"body.token_mixer.{v}" for k, v in _INCEPTION.items()},
            "norm": "body.norm",
            "mlp.fc1": "body.fc1",
            "mlp.fc2": "body.fc2",
            "gamma": "body.layer_scale.gamma",
        },
    },
    "van": {
        "lka": {
            "proj_1": "body.proj_1",
            "spatial_gating_unit.conv0": "body.lka.context.0",
            "spatial_gating_unit.conv_spatial": "body.lka.context.1",
            "spatial_gating_unit.conv1": "body.lka.context.2",
            "proj_2": "body.proj_2",
        }
    },
    "conv2former": {
        "conv_modulation": {
            "norm": "body.norm",
            **_numbered("att", "body.modulate.context", 0, 2),
            "v": "body.modulate.value",
            "proj": "body.proj",
        }
    },
    "focalnet": {
        "focal_modulation": {
            "f": "body.f",
            "focal_layers": "body.focal.layers",
            "h": "body.focal.h",
            "ln": "body.norm",
            "norm": "body.norm",  # timm's
            "proj": "body.proj",
        }
    },
    "fastvit": {"rep_mixer": _REPMIXER},
    "replknet": {
        "replknet_block": {
            "prelkb_bn": "body.norm",
            **_conv_norm("pw1", "body.pw1"),
            **_conv_norm("large_kernel.lkb_origin", f"body.large_kernel.{_SUM}.0"),
            **_conv_norm("large_kernel.small_conv", f"body.large_kernel.{_SUM}.1"),
            **_conv_norm("pw2", "body.pw2"),
        }
    },
    "unireplknet": {
        "dilated_reparam": _dilated_reparam,
        "unireplknet_block": _unireplknet_block,
    },
    "convnext": {"convnext_block": _CONVNEXT},
    "moganet": {
        "moga_aggregation": {
            "proj_1": "body.proj_1",
            "sigma.scale": "body.decompose.scale",
            "gate": "body.modulate.value.0",
            "value.DW_conv0": "body.modulate.context.0",
            "value.DW_conv1": "body.modulate.context.1.branches.1",
            "value.DW_conv2": "body.modulate.context.1.branches.2",
            "value.PW_conv": "body.modulate.context.2",
            "proj_2": "body.proj_2",
        }
    },
    "uniformer": {
        "uniformer_mixer": {
            "norm1": "body.norm",
            "conv1": "body.conv1",
            "attn": "body.attn",
            "conv2": "body.conv2",
        }
    },
    "smt": {"sam": _sam},
    "starnet": {
        "starnet_block": {
            **_conv_norm("dwconv", "body.dwconv"),
            "f1.conv": "body.star.context.0",
            "f2.conv": "body.star.value",
            **_conv_norm("g", "body.g"),
            "dwconv2.conv": "body.dwconv2",
        }
    },
    "repvit": {
        "repvit_mixer": _REPVIT,
        "repvit_block": {
            **{f"token_mixer.{k}": f"body.token_mixer.{v}" for k, v in _REPVIT.items()},
            "se.fc1": "body.se.reduce",
            "se.fc2": "body.se.expand",
            **_conv_norm("channel_mixer.conv1", "body.channel_mixer.fc1", conv="c"),
            **_conv_norm("channel_mixer.conv2", "body.channel_mixer.fc2", conv="c"),
        },
    },
    "mobilenetv4": {
        "uib": {
            **_conv_norm("dw_start", "body.dw_start"),
            **_conv_norm("pw_exp", "body.pw_exp"),
            **_conv_norm("dw_mid", "body.dw_mid"),
            **_conv_norm("pw_proj", "body.pw_proj"),
            **_conv_norm("dw_end", "body.dw_end"),
            "layer_scale": "body.layer_scale",
        }
    },
}
"""Read in the official code; those of RepViT and MobileNetV4 are timm's."""
