"""Rows of the stems."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tokenconv.blocks.catalogue.rows import everywhere, row
from tokenconv.blocks.registry import BlockInfo, Paper
from tokenconv.blocks.stems import (
    CCTTokenizer,
    CeiTStem,
    CMTStem,
    Conv2FormerStem,
    ConvEmbed,
    ConvNeXtStem,
    EarlyConv,
    FastViTStem,
    MetaFormerStem,
    MobileViTStem,
    PatchEmbed,
    ShuntedStem,
    SpatialPrior,
    XCiTStem,
)


def _stem(factory: Callable[..., nn.Module], *papers: Paper, **facts: Any) -> BlockInfo:
    return row("stem", factory, *papers, **facts, sites=everywhere(factory, "replace_patch_embed"))


_LATER = "kernel_size=3, stride=2"
_ONE: Mapping[str, Any] = {
    "formula": "LN conv x",
    "params": "K*K*I*C + 3*C",
    "macs": "N*K*K*I*C",
}

STEMS: Mapping[str, BlockInfo] = {
    "patch_embed": _stem(
        PatchEmbed,
        Paper("PVTv2", "2106.13797", source="pvtv2"),
        Paper("PVTv2, later stages", "2106.13797", _LATER, source="pvtv2"),
        Paper("SegFormer", "2105.15203", source="segformer"),
        Paper("TransNeXt", "2311.17132", source="transnext"),
        Paper("Shunted Transformer, later stages", "2111.15193", _LATER, source="shunted"),
        Paper("SMT, later stages", "2307.08579", _LATER, source="smt"),
        Paper("CMT, later stages", "2107.06263", "kernel_size=2, stride=2, padding=0", "cmt"),
        **_ONE,
    ),
    "conv_embed": _stem(
        ConvEmbed,
        Paper("CvT", "2103.15808", source="cvt"),
        Paper("CvT, later stages", "2103.15808", _LATER, source="cvt"),
        **_ONE,
    ),
    "metaformer_stem": _stem(
        MetaFormerStem,
        Paper("ConvFormer, CAFormer", "2210.13452", source="metaformer"),
        Paper("the same, later stages", "2210.13452", f"{_LATER}, pre_norm=True", "metaformer"),
        formula="LN conv x, LN without bias",
        params="K*K*I*C + 2*C",
        macs="N*K*K*I*C",
    ),
    "convnext_stem": _stem(
        ConvNeXtStem,
        Paper("ConvNeXt", "2201.03545", source="convnext"),
        Paper(
            "ConvNeXt, later stages",
            "2201.03545",
            "kernel_size=2, stride=2, pre_norm=True",
            "convnext",
        ),
        Paper("ViT", "2010.11929", "kernel_size=16, stride=16, norm=False"),
        **_ONE,
    ),
    "early_conv": _stem(
        EarlyConv,
        Paper("Early Convolutions, 4 GF", "2106.14881", source="early_conv"),
        Paper("Early Convolutions, 1 GF", "2106.14881", "widths=(24, 48, 96, 192)", "early_conv"),
        formula="pointwise 4 times (ReLU BN conv) x, every conv of stride 2",
        params="9*(48*I + 48*96 + 96*192 + 192*384) + 2*(48 + 96 + 192 + 384) + 384*C + C",
        macs="N*(9*(64*48*I + 16*48*96 + 4*96*192 + 192*384) + 384*C)",
    ),
    "cct_tokenizer": _stem(
        CCTTokenizer,
        Paper("CCT, 7x2", "2104.05704", source="cct"),
        Paper("CCT, 3x1", "2104.05704", "kernel_size=3, num_layers=1", "cct"),
        formula="twice (max ReLU conv) x, all of stride 2",
        params="K*K*w*(I + C)",
        macs="N*K*K*w*(64*I + 4*C)",
    ),
    "ceit_stem": _stem(
        CeiTStem,
        Paper("CeiT", "2103.11816", source="ceit"),
        formula="conv4 max BN conv7 x, of strides 4, 2 and 2",
        params="49*I*w + 2*w + 16*w*C + C",
        macs="N*(64*49*I*w + 16*w*C)",
    ),
    "xcit_stem": _stem(
        XCiTStem,
        Paper("XCiT", "2106.09681", source="xcit"),
        Paper("XCiT, patches of 8", "2106.09681", "patch_size=8", "xcit"),
        formula="4 times (BN conv), GELU in between, every conv of stride 2",
        params="9*(I*C//8 + C*C//32 + C*C//8 + C*C//2) + 2*(C//8 + C//4 + C//2 + C)",
        macs="N*9*(8*I*C + 3*C*C//2)",
    ),
    "cmt_stem": _stem(
        CMTStem,
        Paper("CMT-S", "2107.06263", source="cmt"),
        Paper("CMT-Ti", "2107.06263", "width=16", "cmt"),
        formula="LN conv2 3 times (BN GELU conv) x, the first and the last conv of stride 2",
        params="9*I*w + 18*w*w + 9*w + 4*w*C + 3*C",
        macs="N*(36*(I*w + 2*w*w) + 4*w*C)",
    ),
    "conv2former_stem": _stem(
        Conv2FormerStem,
        Paper("Conv2Former", "2211.11943", source="conv2former"),
        formula="conv2 twice (BN GELU conv) x, the first and the last conv of stride 2",
        params="9*I*w + 9*w*w + 4*w + 4*w*C",
        macs="N*(36*(I*w + w*w) + 4*w*C)",
    ),
    "shunted_stem": _stem(
        ShuntedStem,
        Paper("Shunted Transformer, T", "2111.15193", source="shunted"),
        Paper("Shunted Transformer, B", "2111.15193", "depth=2", "shunted"),
        Paper("SMT", "2307.08579", "kernel_size=3", "smt"),
        formula="LN conv2 ReLU BN conv x, both of stride 2",
        params="K*K*I*C + 4*C*C + 5*C",
        macs="N*(4*K*K*I*C + 4*C*C)",
    ),
    "mobilevit_stem": _stem(
        MobileViTStem,
        Paper("MobileViT-S", "2110.02178", source="mobilevit"),
        Paper("MobileViT-XXS", "2110.02178", "widths=(16, 16), expand_ratio=2", "mobilevit"),
        formula="4 inverted residuals of SiLU BN conv x, conv and the second of stride 2",
        params="9*I*w + 2*w + 4*w*(3*w + 13) + 4*w + 8*w*(2*w + C + 13) + 2*C"
        " + 2*(4*C*(2*C + 13) + 2*C)",
        macs="N*(4*(9*I*w + 4*w*(3*w + 9) + 16*w*w) + 8*w*(9 + C) + 2*4*C*(2*C + 9))",
    ),
    "fastvit_stem": _stem(
        FastViTStem,
        Paper("FastViT", "2303.14189", source="fastvit"),
        formula="GELU one1 GELU one-depthwise GELU one3 x, one = sum of BN conv, BN conv1, BN x",
        params="10*I*C + C*C + 22*C",
        macs="N*(40*I*C + 10*C + C*C)",
    ),
    "spatial_prior": row(
        "stem",
        SpatialPrior,
        Paper("ViT-Adapter", "2205.08534", source="vit_adapter"),
        formula="pointwise f + e at strides 8, 16 and 32, f = ReLU BN conv of the scale above",
        params="9*I*w + 252*w*w + 26*w + 11*w*C + 7*C",
        macs="N*(2304*(I*w + 2*w*w) + 720*w*w + 116*w*C)//21",
        parity_test="test_stems.py::test_spatial_prior_is_that_of_vit_adapter",
        sites={},
    ),
}
