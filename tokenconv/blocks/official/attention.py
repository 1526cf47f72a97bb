"""What keys of the papers' repositories are called in attention, by source and block."""

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


ATTENTION: Sources = {
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
}
"""As ``SOURCES``."""
