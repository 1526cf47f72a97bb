"""Keys of separable blocks in the papers' repositories, and in timm's and torchvision's code."""

from torch import nn

from tokenconv.blocks.official.renames import Renames, Sources

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
