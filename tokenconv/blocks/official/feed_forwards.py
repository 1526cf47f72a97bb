"""Keys of feed-forwards, position encodings and adapters in the papers' repositories."""

from torch import nn

from tokenconv.blocks.official.renames import Renames, Sources

_MIX: Renames = {"fc1": "fc1", "dwconv.dwconv": "dwconv", "dwconv": "dwconv", "fc2": "fc2"}
_TRANSFORMERS: Renames = {"dense1": "fc1", "dense2": "fc2"}
_ENCODING: Renames = {"weight": "proj.weight", "bias": "proj.bias"}


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
}
