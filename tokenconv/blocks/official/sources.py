"""What keys of the papers' repositories are called here, by source and block."""

from torch import nn

from tokenconv.blocks.official.renames import Renames, Sources

_MIX: Renames = {"fc1": "fc1", "dwconv.dwconv": "dwconv", "dwconv": "dwconv", "fc2": "fc2"}
_TRANSFORMERS: Renames = {"dense1": "fc1", "dense2": "fc2"}
_ENCODING: Renames = {"weight": "proj.weight", "bias": "proj.bias"}
_TIMM_CONVS: Renames = {
    "conv_pwl": "body.project",
    "conv_pw": "body.expand",
    "conv_dw": "body.depthwise",
    "bn1": "body.norm1",
    "bn2": "body.norm2",
    "bn3": "body.norm3",
    "se.conv_reduce": "body.se.reduce",
    "se.conv_expand": "body.se.expand",
}


def _localvit(block: nn.Module) -> Renames:
    """The gate, where there is one, moves what is behind it."""
    part = "branch." if hasattr(block, "branch") else ""
    gated = any(key.startswith(f"{part}gate.") for key in block.state_dict())
    return {
        "conv.0": f"{part}fc1",
        "conv.1": f"{part}norm1",
        "conv.3": f"{part}dwconv",
        "conv.4": f"{part}norm2",
        **({"conv.6.fc.0": f"{part}gate.reduce"} if gated else {}),
        **({"conv.6.fc.2": f"{part}gate.expand"} if gated else {}),
        **({"conv.6.conv": f"{part}gate.conv"} if gated else {}),
        f"conv.{6 + gated}": f"{part}fc2",
        f"conv.{7 + gated}": f"{part}norm3",
    }


def _torchvision_inverted(block: nn.Module) -> Renames:
    """Without an expansion everything comes one earlier, and timm numbers the norms anew."""
    if "body.expand.weight" in block.state_dict():
        return {
            "conv.0.0": "body.expand",
            "conv.0.1": "body.norm1",
            "conv.1.0": "body.depthwise",
            "conv.1.1": "body.norm2",
            "conv.2": "body.project",
            "conv.3": "body.norm3",
            **_TIMM_CONVS,
        }
    return {
        "conv.0.0": "body.depthwise",
        "conv.0.1": "body.norm2",
        "conv.1": "body.project",
        "conv.2": "body.norm3",
        **_timm_unexpanded(),
    }


def _efficientnet(block: nn.Module) -> Renames:
    if "body.expand.weight" in block.state_dict():
        first = {"block.0.0": "body.expand", "block.0.1": "body.norm1"}
        later, timm = 1, _TIMM_CONVS
    else:
        first, later, timm = {}, 0, _timm_unexpanded()
    return {
        **first,
        f"block.{later}.0": "body.depthwise",
        f"block.{later}.1": "body.norm2",
        f"block.{later + 1}.fc1": "body.se.reduce",
        f"block.{later + 1}.fc2": "body.se.expand",
        f"block.{later + 2}.0": "body.project",
        f"block.{later + 2}.1": "body.norm3",
        **timm,
    }


def _timm_unexpanded() -> Renames:
    return {**_TIMM_CONVS, "conv_pw": "body.project", "bn1": "body.norm2", "bn2": "body.norm3"}


def _xception(block: nn.Module) -> Renames:
    """The activations count in the numbers of the row, and the first one may be missing."""
    names: dict[str, str | None] = {}
    at = 1 if "act1" in dict(block.get_submodule("body").named_children()) else 0
    for i in range(1, sum("pointwise" in key for key in block.state_dict()) + 1):
        names[f"rep.{at}.conv1"] = f"body.depthwise{i}"
        names[f"rep.{at}.pointwise"] = f"body.pointwise{i}"
        names[f"rep.{at + 1}"] = f"body.norm{i}"
        at += 3
    return {**names, "skipbn": "skip.1", "skip": "skip.0"}


def _resdsc(block: nn.Module) -> Renames:
    names: dict[str, str | None] = {}
    for i in (1, 2):
        theirs = f"SeparableConv2d{i}"
        names[f"{theirs}.depthwise.0"] = f"body.depthwise{i}"
        names[f"{theirs}.pointwise"] = f"body.pointwise{i}"
        names[f"bns{i}.0"] = f"body.norm{i}"
    return names


SOURCES: Sources = {
    "pvtv2": {"mix_ffn": {**_MIX, **_TRANSFORMERS}},
    "segformer": {"mix_ffn": {**_MIX, **_TRANSFORMERS}},
    "van": {"mix_ffn": _MIX},
    "litv2": {"mix_ffn": _MIX},
    "biformer": {
        "mix_ffn": {"0": "fc1", "1.dwconv": "dwconv", "3": "fc2"},
        "dpe": _ENCODING,
    },
    "ceit": {
        "leff": {
            "conv1": "fc1",
            "conv2": "dwconv",
            "conv3": "fc2",
            "bn1": "norm1",
            "bn2": "norm2",
            "bn3": "norm3",
        }
    },
    "cmt": {
        "irffn": {
            "conv1.0": "fc1",
            "conv1.2": "norm1",
            "proj_bn": "norm2",
            "proj": "dwconv",
            "conv2.0": "fc2",
            "conv2.1": "norm3",
        },
        "lpu": _ENCODING,
    },
    "localvit": {"localvit_ffn": _localvit},
    "uformer": {
        "uformer_leff": {"linear1.0": "fc1", "dwconv.0": "dwconv", "linear2.0": "fc2", "eca": "eca"}
    },
    "restormer": {"gdfn": {"project_in": "fc1", "dwconv": "dwconv", "project_out": "fc2"}},
    "transnext": {"conv_glu": {"fc1": "fc1", "dwconv.dwconv": "gate.gate.dwconv", "fc2": "fc2"}},
    "vit_adapter": {"multi_scale_ffn": _MIX},
    "shunted": {"shunted_ffn": _MIX},
    "smt": {"shunted_ffn": _MIX},
    "rmt": {
        "rmt_ffn": {
            "fc1": "fc1",
            "fc2": "fc2",
            "ffn_layernorm": "local.norm",
            "dwconv.conv": "local.dwconv",
        },
        "dpe": {"conv": "proj"},
    },
    "conv2former": {
        "conv2former_mlp": {"norm": "norm", "fc1": "fc1", "pos": "local.dwconv", "fc2": "fc2"}
    },
    "efficientformerv2": {
        "efficientformerv2_ffn": {
            "fc1.conv": "fc1",  # timm's names first
            "fc1.bn": "norm1",
            "mid.conv": "dwconv",
            "mid.bn": "norm2",
            "fc2.conv": "fc2",
            "fc2.bn": "norm3",
            "fc1": "fc1",
            "fc2": "fc2",
            "mid_norm": "norm2",
            "mid": "dwconv",
            "norm1": "norm1",
            "norm2": "norm3",
        }
    },
    "fastvit": {
        "fastvit_ffn": {"conv.conv": "dwconv", "conv.bn": "norm", "fc1": "fc1", "fc2": "fc2"},
        "rep_cpe": {"pe": "proj", "pos_enc": "proj"},
    },
    "moganet": {
        "moga_ffn": {
            "fc1": "fc1",
            "dwconv": "dwconv",
            "fc2": "fc2",
            "decompose": "aggregate.fc",
            "sigma.scale": "aggregate.scale",
        }
    },
    "convmlp": {
        "conv_mlp": {
            "norm1": "mlp1.norm",
            "channel_mlp1": "mlp1",
            "connect_norm": "norm",
            "connect": "dwconv",
            "norm2": "mlp2.norm",
            "channel_mlp2": "mlp2",
        }
    },
    "replknet": {
        "replknet_ffn": {
            "preffn_bn": "branch.norm",
            "pw1.conv": "branch.fc1",
            "pw1.bn": "branch.norm1",
            "pw2.conv": "branch.fc2",
            "pw2.bn": "branch.norm2",
        }
    },
    "unireplknet": {
        "unireplknet_ffn": {
            "pwconv1.1": "fc1",
            "act.1.gamma": "grn.weight",
            "act.1.beta": "grn.bias",
            "pwconv2.0": "fc2",
            "pwconv2.2": "norm",
        }
    },
    "mambaout": {
        "gated_cnn": {
            "norm": "branch.norm",
            "fc1": "branch.fc1",
            "conv": "branch.gate.value.conv",
            "fc2": "branch.fc2",
        }
    },
    "twins": {"peg": {"proj.0": "proj"}},
    "coat": {"cpe": {"proj": "proj"}},
    "xcit": {"lpi": {"conv1": "dwconv1", "bn": "norm", "conv2": "dwconv2"}},
    "uniformer": {"dpe": _ENCODING},
    "tinyvit": {"tinyvit_conv": {"c": "dwconv", "conv": "dwconv", "bn": "norm"}},
    "convpass": {"convpass": {"adapter_conv": "conv", "adapter_down": "down", "adapter_up": "up"}},
    "conv_adapter": {
        "conv_adapter": {"se": "channel_scale.weight", "conv1": "conv", "conv2": "up"}
    },
    "conv_lora": {
        "conv_lora": {
            "lora_A": "down.weight",
            "lora_B": "up.weight",
            "lora_moe_gating.w_gate": "local.experts.body.mixture.w_gate",
            "lora_moe_gating.w_noise": "local.experts.body.mixture.w_noise",
            "lora_moe_gating": None,  # mean and std, which are constants
            "lora_moe_experts": "local.experts.body.mixture.experts",
            "weight": None,  # of the layer that the branch stands beside
            "bias": None,
        }
    },
    "mona": {
        "mona": {
            "gammax": "norm.gammax",
            "gamma": "norm.gamma",
            "norm": "norm.norm",
            "project1": "down",
            "project2": "up",
            "adapter_conv.conv1": "local.convs.convs.0",
            "adapter_conv.conv2": "local.convs.convs.1",
            "adapter_conv.conv3": "local.convs.convs.2",
            "adapter_conv.projector": "mix.linear",
        }
    },
    "repadapter": {"rep_adapter": {"conv_A": "down", "conv_B": "up"}},
    "adaptformer": {"adaptformer": {"down_proj": "down", "up_proj": "up"}},
    "mobilenetv1": {
        "mobilenetv1": {
            "conv_dw": "body.depthwise",
            "bn1": "body.norm1",
            "conv_pw": "body.pointwise",
            "bn2": "body.norm2",
        }
    },
    "xception": {"xception": _xception},
    "mobilenetv2": {"inverted_residual": _torchvision_inverted},
    "efficientnet": {"mbconv": _efficientnet},
    "shufflenetv1": {
        "shufflenetv1": {
            "branch_main_1.0": "body.reduce",
            "branch_main_1.1": "body.norm1",
            "branch_main_1.3": "body.depthwise",
            "branch_main_1.4": "body.norm2",
            "branch_main_2.0": "body.expand",
            "branch_main_2.1": "body.norm3",
        }
    },
    "shufflenetv2": {
        "shufflenetv2": {"branch1": "body.halves.branches.0", "branch2": "body.halves.branches.1"}
    },
    "espnet": {
        "esp": {
            "c1.conv": "body.reduce",
            **{f"d{2**i}.conv": f"body.pyramid.branches.{i}" for i in range(5)},
            "bn.bn": "after.0",
            "bn.act": "after.1",
            "bn": "after.0",  # the downsampler has no shell around them
            "act": "after.1",
        }
    },
    "bsconv": {
        "bsconv_u": {"pw": "body.pw", "bn": "body.bn", "dw": "body.dw"},
        "bsconv_s": {
            "pw1": "body.pw1",
            "bn1": "body.bn1",
            "pw2": "body.pw2",
            "bn2": "body.bn2",
            "dw": "body.dw",
        },
    },
    "resdsc": {"resdsc": _resdsc},
}
"""By the name of a model: the blocks it has, and what its keys are called in them. Read in the
official code, or in timm's and transformers', whose names fit as well."""
