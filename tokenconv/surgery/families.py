"""What each timm family looks like: where its grid is made, and how its blocks are named.

A row says only what cannot be seen from a forward pass. The rest (which blocks there are, what
each of their modules is given) is found by ``sites.survey``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Size = tuple[Any, Any]
"""Rows and columns: integers, or symbols while a compiler traces."""

# --- how a module tells the size of the grid that it makes: (module, arguments, result) -> Size ---


def of_image(source: Any, args: tuple[Any, ...], out: Any) -> Size:
    """The embedding computes the grid of an image ``(B, C, H, W)``."""
    return source.dynamic_feat_size(args[0].shape[-2:])


def of_patches(source: Any, args: tuple[Any, ...], out: Any) -> Size:
    """The embedding cuts the image ``(B, C, H, W)`` into whole patches."""
    rows, cols = source.patch_size
    return args[0].shape[-2] // rows, args[0].shape[-1] // cols


def of_first_map(source: Any, args: tuple[Any, ...], out: Tensor) -> Size:
    """The result is a map ``(B, C, H, W)``."""
    return out.shape[2], out.shape[3]


def of_last_map(source: Any, args: tuple[Any, ...], out: Tensor) -> Size:
    """The result is a map ``(B, H, W, C)``."""
    return out.shape[1], out.shape[2]


def of_returned(source: Any, args: tuple[Any, ...], out: Any) -> Size:
    """The result is ``(tokens, (H, W))``."""
    return out[1][0], out[1][1]


def of_packed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Where the patches of NaFlexViT's packed images lie; None for plain images."""
    given = {**dict(zip(("x", "patch_coord", "patch_valid"), args, strict=False)), **kwargs}
    coords, valid = given.get("patch_coord"), given.get("patch_valid")
    if coords is None:
        return None
    coords = coords.long()
    return coords if valid is None else coords.masked_fill(~valid.bool()[..., None], -1)


def of_strides(source: Any, args: tuple[Any, ...], out: Any) -> Size:
    """The embedding is one convolution, or several: CrossViT's."""
    rows, cols = args[0].shape[-2:]
    for conv in [source.proj] if isinstance(source.proj, nn.Conv2d) else source.proj:
        if isinstance(conv, nn.Conv2d):
            rows = (rows + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
            cols = (cols + 2 * conv.padding[1] - conv.kernel_size[1]) // conv.stride[1] + 1
    return rows, cols


@dataclass(frozen=True, kw_only=True)
class Source:
    """A module that makes a grid."""

    module: str
    size: Callable[[Any, tuple[Any, ...], Any], Size]
    coords: Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | None] | None = None
    """Where its tokens lie, if its arguments tell: see ``grid.SparseGrid``."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of timm models."""

    name: str
    """Name of the file in ``timm.models``."""
    model_class: str
    """Name of the class in that file; classes that derive from it belong to the family."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """By the text that ``stage`` finds in a block's name, or ``""`` for the first grid; empty where
    every block sees maps ``(B, H, W, C)``."""
    stage: str | None = None
    """Regular expression that finds the stage in a block's name. Where the stage has no source of
    its own, its number says how often the first grid has been halved."""
    rounds_up: bool = True
    """What happens to an odd side when it is halved."""
    skipped: str | None = None
    """Regular expression over names of modules that look like blocks and are none."""
    rerolls: bool = False
    """Whether tokens lie in another order than in the image, which ``reroll`` undoes: Hiera's."""
    in_chans: int | None = None
    """Channels of an image, where the first convolution does not tell."""
    refusal: str | None = None
    """Why this family cannot be served, where it cannot."""


def _tokens(name: str, model_class: str, size: Any = of_image, **row: Any) -> Family:
    """A family that keeps one grid, made by ``patch_embed``."""
    sources = {"": Source(module="patch_embed", size=size)}
    return Family(name=name, model_class=model_class, sources=sources, **row)


def _pyramid(
    name: str, model_class: str, source: str, size: Any, stages: str, **row: Any
) -> Family:
    """A family that halves one grid from stage to stage."""
    return Family(
        name=name,
        model_class=model_class,
        sources={"": Source(module=source, size=size)},
        stage=rf"^{stages}\.(\d+)\.",
        **row,
    )


def family_of(module: nn.Module) -> Family | None:
    """The family that a module, taken by itself, belongs to."""
    for ancestor in type(module).__mro__:
        package, _, name = ancestor.__module__.rpartition(".")
        if package == "timm.models" and (row := _ROWS.get((name, ancestor.__name__))):
            return row
    return None


FAMILIES = (
    _tokens("vision_transformer", "VisionTransformer"),  # and deit, which derives from it
    _tokens("eva", "Eva"),
    _tokens("beit", "Beit"),
    _tokens("vision_transformer_relpos", "VisionTransformerRelPos"),
    _tokens("vision_transformer_sam", "VisionTransformerSAM"),
    _tokens("qwen3_vit", "Qwen3VitEncoder", of_last_map),
    _tokens("deepseek_vit", "DeepseekVitEncoder", of_last_map),
    _tokens("gemma4_vit", "Gemma4VitEncoder", of_patches),
    _tokens("cait", "Cait", skipped=r"^blocks_token_only\b"),
    _tokens("convit", "ConVit"),
    _tokens("xcit", "Xcit", of_returned, skipped=r"^cls_attn_blocks\b"),
    Family(
        name="naflexvit",
        model_class="NaFlexVit",
        sources={"": Source(module="embeds", size=of_returned, coords=of_packed)},
    ),
    Family(
        name="mlp_mixer",
        model_class="MlpMixer",
        sources={"": Source(module="stem", size=of_image)},
    ),
    Family(
        name="tnt",
        model_class="TNT",
        sources={"": Source(module="pixel_embed", size=of_image)},
    ),
    Family(
        name="crossvit",
        model_class="CrossVit",
        sources={
            str(branch): Source(module=f"patch_embed.{branch}", size=of_strides)
            for branch in range(2)
        },
        stage=r"^blocks\.\d+\.blocks\.(\d+)\.",
    ),
    Family(
        name="twins",
        model_class="Twins",
        sources={
            str(stage): Source(module=f"patch_embeds.{stage}", size=of_returned)
            for stage in range(4)
        },
        stage=r"^blocks\.(\d+)\.",
    ),
    Family(
        name="coat",
        model_class="CoaT",
        sources={
            str(stage): Source(module=f"patch_embed{stage}", size=of_image) for stage in range(1, 5)
        },
        stage=r"^serial_blocks(\d+)\.",
    ),
    _pyramid("pvt_v2", "PyramidVisionTransformerV2", "patch_embed", of_last_map, "stages"),
    _pyramid("swin_transformer", "SwinTransformer", "patch_embed", of_last_map, "layers"),
    _pyramid("swin_transformer_v2", "SwinTransformerV2", "patch_embed", of_last_map, "layers"),
    _pyramid(
        "swin_transformer_v2_cr", "SwinTransformerV2Cr", "patch_embed", of_first_map, "stages"
    ),
    _pyramid("mvitv2", "MultiScaleVit", "patch_embed", of_returned, "stages"),
    _pyramid("tiny_vit", "TinyVit", "patch_embed", of_first_map, "stages"),
    _pyramid("davit", "DaVit", "stem", of_first_map, "stages"),
    _pyramid("levit", "Levit", "stem", of_first_map, "stages"),
    _pyramid("metaformer", "MetaFormer", "stem", of_first_map, "stages"),
    _pyramid("efficientformer", "EfficientFormer", "stem", of_first_map, "stages"),
    _pyramid("pit", "PoolingVisionTransformer", "patch_embed", of_first_map, "transformers"),
    _pyramid("csatv2", "CSATv2", "stem_dct", of_first_map, "stages", rounds_up=False, in_chans=3),
    Family(name="volo", model_class="VOLO", skipped=r"^post_network\b"),
    Family(name="gcvit", model_class="GlobalContextVit"),
    Family(name="hieradet_sam2", model_class="HieraDet"),
    Family(name="sequencer", model_class="Sequencer2d"),
    Family(name="maxxvit", model_class="MaxxVit"),
    Family(name="convnext", model_class="ConvNeXt"),
    Family(name="edgenext", model_class="EdgeNeXt"),
    Family(name="hiera", model_class="Hiera", rerolls=True),
    Family(
        name="nest",
        model_class="Nest",
        refusal="its tokens are (B, T, N, C): separate square blocks, not one map",
    ),
    Family(
        name="mambaout",
        model_class="MambaOut",
        refusal="its blocks have no MLP; they gate a convolution of their own",
    ),
    Family(
        name="byobnet",
        model_class="ByobNet",
        refusal="it is convolutional; the tokens of MobileViT are unfolded patches (B*P, N, C)",
    ),
)
_ROWS = {(family.name, family.model_class): family for family in FAMILIES}
