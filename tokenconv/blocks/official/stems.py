"""Keys of the stems in the papers' repositories, and in timm's and torchvision's code."""

from collections.abc import Callable, Mapping

from torch import nn

from tokenconv.blocks.official.renames import Renames, Sources

_EMBED: Renames = {"proj": "body.proj", "norm": "body.norm", "layer_norm": "body.norm"}


def _steps(names: Mapping[str, str]) -> Renames:
    return {theirs: f"body.{ours}" for theirs, ours in names.items()}


def _numbered(block: nn.Module) -> Mapping[int, str]:
    """Names of the steps that have values, by their place in the row."""
    row = list(block.get_submodule("body").named_children())
    return {
        i: name for i, (name, step) in enumerate(row) if next(step.parameters(), None) is not None
    }


def _in_a_row(prefix: str = "") -> Callable[[nn.Module], Renames]:
    """Steps that have numbers in the source."""

    def names(block: nn.Module) -> Renames:
        return _steps({f"{prefix}{i}": name for i, name in _numbered(block).items()})

    return names


def _metaformer(block: nn.Module) -> Renames:
    """In timm both norms are called ``norm``."""
    before = hasattr(block.get_submodule("body"), "pre_norm")
    return _steps(
        {
            "conv": "proj",
            "pre_norm": "pre_norm",
            "post_norm": "norm",
            "norm": "pre_norm" if before else "norm",
        }
    )


def _shunted(block: nn.Module) -> Renames:
    return {**_in_a_row("conv.")(block), "norm": "body.norm"}


def _torchvision(block: nn.Module) -> Renames:
    count = len(_numbered(block)) // 2
    rows = {f"conv_bn_relu_{i}.0": f"conv{i + 1}" for i in range(count)}
    norms = {f"conv_bn_relu_{i}.1": f"norm{i + 1}" for i in range(count)}
    return _steps({**rows, **norms, "conv_last": "proj"})


def _xcit(block: nn.Module) -> Renames:
    """Activations have numbers of their own."""
    count = len(_numbered(block)) // 2
    convs = {f"proj.{2 * i}.0": f"conv{i + 1}" for i in range(count)}
    norms = {f"proj.{2 * i}.1": f"norm{i + 1}" for i in range(count)}
    return _steps({**convs, **norms})


def _mobilevit(block: nn.Module) -> Renames:
    """Its names in timm."""
    names = {"stem.conv": "conv1", "stem.bn": "norm1"}
    blocks = ["stages.0.0", *(f"stages.1.{i}" for i in range(len(_numbered(block)) - 3))]
    parts = (("conv1_1x1", "expand", 1), ("conv2_kxk", "depthwise", 2), ("conv3_1x1", "project", 3))
    for i, theirs in enumerate(blocks, 1):
        for old, new, norm in parts:
            names[f"{theirs}.{old}.conv"] = f"block{i}.body.{new}"
            names[f"{theirs}.{old}.bn"] = f"block{i}.body.norm{norm}"
    return _steps(names)


def _fastvit() -> Renames:
    names: dict[str, str] = {}
    for i in range(3):
        branches = f"one{i + 1}.branches"
        for theirs, branch in (
            ("conv_kxk.0", 0), ("conv_scale", 1), ("rbr_conv.0", 0), ("rbr_scale", 1),
        ):  # fmt: skip
            names[f"{i}.{theirs}.conv"] = f"{branches}.{branch}.0"
            names[f"{i}.{theirs}.bn"] = f"{branches}.{branch}.1"
        for theirs in ("identity", "rbr_skip"):
            names[f"{i}.{theirs}"] = f"{branches}.1"
    return _steps(names)


def _spatial_prior() -> Renames:
    names = {"level_embed": "level_embed"}
    for i in range(3):
        names |= {
            f"stem.{3 * i}": f"stages.0.conv{i + 1}",
            f"stem.{3 * i + 1}": f"stages.0.norm{i + 1}",
        }
        names |= {
            f"conv{i + 2}.0": f"stages.{i + 1}.conv1",
            f"conv{i + 2}.1": f"stages.{i + 1}.norm1",
        }
    return names | {f"fc{i + 1}": f"proj.{i}" for i in range(4)}


SOURCES: Sources = {
    "pvtv2": {"patch_embed": _EMBED},
    "segformer": {"patch_embed": _EMBED},
    "transnext": {"patch_embed": _EMBED},
    "shunted": {"patch_embed": _EMBED, "shunted_stem": _shunted},
    "smt": {"patch_embed": _EMBED, "shunted_stem": _shunted},
    "cvt": {"conv_embed": {**_EMBED, "projection": "body.proj", "normalization": "body.norm"}},
    "metaformer": {"metaformer_stem": _metaformer},
    "convnext": {"convnext_stem": _in_a_row()},
    "early_conv": {"early_conv": _torchvision},
    "cct": {"cct_tokenizer": {f"conv_layers.{i}.0": f"body.conv{i + 1}" for i in range(9)}},
    "ceit": {
        "ceit_stem": {"backbone.conv": "body.conv", "backbone.bn": "body.norm", "proj": "body.proj"}
    },
    "xcit": {"xcit_stem": _xcit},
    "cmt": {
        "patch_embed": _EMBED,
        "cmt_stem": {
            **{f"stem_conv{i}": f"body.conv{i}" for i in (1, 2, 3)},
            **{f"stem_norm{i}": f"body.norm{i}" for i in (1, 2, 3)},
            "patch_embed_a.proj": "body.proj",
            "patch_embed_a.norm": "body.norm",
        },
    },
    "conv2former": {"conv2former_stem": _in_a_row()},
    "mobilevit": {"mobilevit_stem": _mobilevit},
    "fastvit": {"fastvit_stem": _fastvit()},
    "vit_adapter": {"spatial_prior": _spatial_prior()},
}
