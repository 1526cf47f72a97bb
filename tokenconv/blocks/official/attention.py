"""Keys of attention in the papers' repositories, and in timm's code."""

from torch import nn

from tokenconv.blocks.official.renames import Renames, Sources


def _same(*names: str) -> Renames:
    return {name: name for name in names}


def _halves(block: nn.Module) -> Renames:
    """Shunted Transformer numbers what belongs to the larger and the smaller squares."""
    parts = ("sr", "norm", "kv", "local_conv")
    return {
        **_same("q", "proj"),
        **{
            f"{part}{i}": f"{name}.{part}"
            for i, name in ((1, "large"), (2, "small"))
            for part in parts
        },
    }


def _mobilevit(block: nn.Module) -> Renames:
    """Timm's names, of as many layers as there are."""
    return {
        **_normed("conv_kxk", "body.conv_kxk"),
        "conv_1x1": "body.conv_1x1",
        **_layers(block, {"attn.qkv": "qkv", "attn.proj": "proj"}),
        **_normed("conv_proj", "body.conv_proj"),
        **_normed("conv_fusion", "after"),
    }


def _mobilevitv2(block: nn.Module) -> Renames:
    return {
        **_normed("conv_kxk", "body.conv_kxk"),
        "conv_1x1": "body.conv_1x1",
        **_layers(block, {"attn.qkv_proj": "qkv", "attn.out_proj": "proj"}),
        "conv_proj.conv": "body.conv_proj",
        "conv_proj.bn": "body.norm",
    }


def _normed(theirs: str, ours: str) -> Renames:
    """A convolution and its norm."""
    return {f"{theirs}.conv": f"{ours}.0", f"{theirs}.bn": f"{ours}.1"}


def _layers(block: nn.Module, attention: Renames) -> Renames:
    """The layers of a Transformer, and the norm behind them."""
    layer = {**attention, "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    *layers, _ = block.get_submodule("body.transformer").children()
    return {
        **{
            f"transformer.{i}.{theirs}": f"body.transformer.{i}.{ours}"
            for i in range(len(layers))
            for theirs, ours in layer.items()
        },
        "norm": f"body.transformer.{len(layers)}",
    }


SOURCES: Sources = {
    "cvt": {
        "cvt_attn": {
            **{
                f"conv_proj_{name}.{theirs}": f"conv_proj_{name}.{ours}"
                for name in "qkv"
                for theirs, ours in (("conv", 0), ("bn", 1))
            },
            **_same("proj_q", "proj_k", "proj_v", "proj"),
        }
    },
    "pvtv2": {"sra": _same("q", "kv", "sr", "norm", "proj")},
    "segformer": {"sra": _same("q", "kv", "sr", "norm", "proj")},
    "cmt": {"lmhsa": _same("q", "k", "v", "sr", "proj", "relative_pos")},
    "restormer": {
        "mdta": {
            "temperature": "temperature",
            "qkv_dwconv": "dwconv",
            "qkv": "qkv",
            "project_out": "proj",
        }
    },
    "coat": {
        "coat_attn": {
            **_same("qkv", "proj"),
            **{f"crpe.conv_list.{i}": f"crpe.{i}.conv" for i in range(3)},
        }
    },
    "mvitv2": {
        "mvitv2_attn": _same(
            "qkv",
            "proj",
            "pool_q",
            "norm_q",
            "pool_k",
            "norm_k",
            "pool_v",
            "norm_v",
            "rel_pos_h",
            "rel_pos_w",
        )
    },
    "cswin": {
        "cswin_attn": {
            **_same("qkv", "proj"),
            **{f"attns.{i}.get_v": f"lepe.{i}" for i in range(2)},
        }
    },
    "shunted": {
        "shunted_attn": _halves,
        "lepe_attn": {**_same("q", "kv", "proj"), "local_conv": "lepe.conv"},
    },
    "xcit": {"xca": _same("temperature", "qkv", "proj")},
    "litv2": {"hilo": _same("h_qkv", "h_proj", "l_q", "l_kv", "l_proj")},
    "smt": {"lepe_attn": {**_same("q", "kv", "proj"), "local_conv": "lepe.conv"}},
    "efficientvit_mit": {
        "lite_mla": {
            "qkv.conv": "qkv",
            **{f"aggreg.{i}.0": f"aggreg.{i}.conv" for i in range(4)},
            **{f"aggreg.{i}.1": f"aggreg.{i}.linear" for i in range(4)},
            "proj.conv": "proj.0",
            "proj.norm": "proj.1",
        }
    },
    "swiftformer": {
        "additive_attn": {
            **_same("to_query", "to_key", "w_g"),
            "Proj": "linear",
            "proj": "linear",  # as timm calls it
            "final": "proj",
        }
    },
    "nextvit": {
        "nextvit_attn": _same("q", "k", "v", "proj", "norm"),
        "nextvit_conv": {
            "group_conv3x3": "body.conv",
            "norm": "body.norm",
            "projection": "body.project",
        },
    },
    "mobilevit": {"mobilevit": _mobilevit},
    "mobilevitv2": {"mobilevitv2": _mobilevitv2},
    "edgenext": {
        "sdta": {
            **{f"convs.{i}": f"body.scales.convs.{i}" for i in range(3)},
            "pos_embd.token_projection": "body.position.proj",
            "norm_xca": "body.xca.norm",
            "gamma_xca": "body.xca.gamma.gamma",
            "xca": "body.xca.xca",
            "norm": "body.norm",
            "pwconv1": "body.fc1",
            "pwconv2": "body.fc2",
            "mlp.fc1": "body.fc1",  # as timm calls it
            "mlp.fc2": "body.fc2",
            "gamma": "body.gamma.gamma",
        }
    },
    "iformer": {
        "inception_mixer": {
            "high_mixer.conv1": "body.mix.branches.0.0",
            "high_mixer.proj1": "body.mix.branches.0.1",
            "high_mixer.proj2": "body.mix.branches.1.1",
            "low_mixer.qkv": "body.mix.branches.2.qkv",
            "conv_fuse": "body.fuse.0",
            "proj": "body.proj",
        }
    },
}
