"""Rows of attention with convolution."""

from collections.abc import Mapping
from typing import Any

from tokenconv.blocks.attention.channels import CrossCovarianceAttention, TransposedAttention
from tokenconv.blocks.attention.inception import InceptionMixer, SplitTransposeAttention
from tokenconv.blocks.attention.linear import (
    AdditiveAttention,
    FactorisedAttention,
    LiteMultiScaleAttention,
)
from tokenconv.blocks.attention.mobilevit import MobileViT, MobileViTV2
from tokenconv.blocks.attention.nextvit import ConvAttention, EfficientAttention
from tokenconv.blocks.attention.projection import ConvProjectionAttention, PoolingAttention
from tokenconv.blocks.attention.reduction import (
    LightweightAttention,
    ShuntedAttention,
    SpatialReductionAttention,
)
from tokenconv.blocks.attention.windows import (
    CrossShapedAttention,
    HiLoAttention,
    LePEAttention,
)
from tokenconv.blocks.catalogue.rows import Sites, everywhere, row
from tokenconv.blocks.fragments import branch_of
from tokenconv.blocks.registry import BlockInfo, Paper


def _attn(factory: Any) -> Sites:
    return everywhere(factory, "replace_attn", "beside_attn")


def _mixer(factory: Any) -> Sites:
    """Of a block on maps, which prefix tokens get nothing from there."""
    branch = branch_of(factory, residual=False, stride=1, out_dim=None)
    return everywhere(branch, "replace_attn", "beside_attn")


_MAPS: Mapping[str, Any] = {"kind": "maps", "prefix_policy": "pass unchanged"}

ATTENTION: Mapping[str, BlockInfo] = {
    "cvt_attn": row(
        "attention",
        ConvProjectionAttention,
        Paper("CvT", "2103.15808", source="cvt"),
        formula="proj(softmax(q k^T / sqrt(C)) v), q = Linear(BN(DWConv(x))), k and v on stride 2",
        params="4*C*C + 4*C + 3*(K*K*C + 2*C)",
        macs="N*(2*C*C + K*K*C) + M*(2*C*C + 2*K*K*C) + 2*N*M*C",
        sites=_attn(ConvProjectionAttention),
    ),
    "sra": row(
        "attention",
        SpatialReductionAttention,
        Paper("PVTv2", "2106.13797", source="pvtv2"),
        Paper("PVTv2, linear", "2106.13797", "linear=True", source="pvtv2"),
        Paper("SegFormer", "2105.15203", source="segformer"),
        formula="proj(softmax(q k^T) v), q = Linear(x), k, v = Linear(LN(conv(x))) of s x s tokens",
        params="4*C*C + 4*C + s*s*C*C + 3*C",
        macs="N*2*C*C + M*(s*s*C*C + 2*C*C) + 2*N*M*C",
        sites=_attn(SpatialReductionAttention),
    ),
    "lmhsa": row(
        "attention",
        LightweightAttention,
        Paper("CMT", "2107.06263", source="cmt"),
        formula="proj(softmax(q k^T + P) v), q = Linear(x), k, v = Linear(BN(DWConv(x))) of s x s "
        "tokens, P learned for 14 x 14 positions and resized",
        params="4*C*C + C + s*s*C + 3*C + n*196*49",
        macs="N*2*C*C + M*(s*s*C + 2*C*C) + 2*N*M*C",
        sites=_attn(LightweightAttention),
    ),
    "mdta": row(
        "attention",
        TransposedAttention,
        Paper("Restormer", "2111.09881", source="restormer"),
        formula="proj(softmax(t q k^T) v) between channels, q, k, v = DWConv(Linear(x)), q and "
        "k of length 1",
        params="4*C*C + 27*C + n",
        macs="N*(4*C*C + 27*C + 2*C*C//n)",
        sites=_attn(TransposedAttention),
    ),
    "coat_attn": row(
        "attention",
        FactorisedAttention,
        Paper("CoaT", "2104.06399", "num_heads=8", source="coat"),
        formula="proj(q softmax(k)^T v + q DWConv(v)), sides 3, 5 and 7 for groups of heads",
        params="4*C*C + C + 50*C",
        macs="N*(4*C*C + 49*C + 2*C*C//n)",
        prefix_policy="attend, and get nothing from the convolution",
        sites=_attn(FactorisedAttention),
    ),
    "mvitv2_attn": row(
        "attention",
        PoolingAttention,
        Paper("MViTv2", "2112.01526", source="mvitv2"),
        formula="proj(softmax(q k^T + q R) v + q), q, k, v = LN(DWConv(Linear(x))) in every head, "
        "k and v on stride 2, R learned for 14 rows and 14 columns and resized",
        params="4*C*C + 4*C + 3*(K*K + 2)*C//n + 54*C//n",
        macs="N*(4*C*C + K*K*C) + 2*M*K*K*C + 2*N*M*C + N*C*(H//2 + W//2)",
        sites=_attn(PoolingAttention),
    ),
    "cswin_attn": row(
        "attention",
        CrossShapedAttention,
        Paper("CSWin", "2107.00652", source="cswin"),
        formula="proj(softmax(q k^T) v + DWConv(v)), half the heads in stripes of s columns, half "
        "of s rows",
        params="4*C*C + C + 10*C",
        macs="N*(4*C*C + 9*C) + 2*N*M*C",
        prefix_policy="see all and are seen in every stripe, unconvolved",
        sites=_attn(CrossShapedAttention),
    ),
    "shunted_attn": row(
        "attention",
        ShuntedAttention,
        Paper("Shunted Transformer", "2111.15193", source="shunted"),
        formula="proj(softmax(q k^T) (v + DWConv(v))), k, v = Linear(GELU(LN(conv(x)))), for half "
        "the heads of s x s tokens, for half of s/2 x s/2",
        params="4*C*C + 4*C + s*s*C*C + s*s*C*C//4 + 16*C",
        macs="2*N*C*C + M*(s*s*C*C + C*C + 9*C//2 + N*C) + 4*M*(s*s*C*C//4 + C*C + 9*C//2 + N*C)",
        sites=_attn(ShuntedAttention),
    ),
    "xca": row(
        "attention",
        CrossCovarianceAttention,
        Paper("XCiT", "2106.09681", "qkv_bias=True", source="xcit"),
        formula="proj(softmax(t q k^T) v) between channels, q, k, v = Linear(x), q and k of "
        "length 1",
        params="4*C*C + C + n",
        macs="N*(4*C*C + 2*C*C//n)",
        prefix_policy="take part",
        sites=_attn(CrossCovarianceAttention),
    ),
    "hilo": row(
        "attention",
        HiLoAttention,
        Paper("LITv2", "2205.13213", source="litv2"),
        formula="[Linear(softmax(q k^T) v) in windows of s x s tokens, the same to averages "
        "of them], half the heads each",
        params="7*C*C//2 + C",
        macs="N*(5*C*C//2 + s*s*C) + M*C*C + N*M*C",
        prefix_policy="see all and are seen in every window",
        sites=_attn(HiLoAttention),
    ),
    "lepe_attn": row(
        "attention",
        LePEAttention,
        Paper("SMT", "2307.08579", source="smt"),
        Paper("Shunted Transformer, last stage", "2111.15193", "qkv_bias=True", source="shunted"),
        Paper("BiFormer, NHWC", "2303.08810", "kernel_size=5, of_input=True, qkv_bias=True"),
        formula="proj(softmax(q k^T) v + DWConv(v)), q, k, v = Linear(x)",
        params="4*C*C + C + (K*K + 1)*C",
        macs="N*(4*C*C + K*K*C) + 2*N*N*C",
        prefix_policy="attend, and get nothing from the convolution",
        sites=_attn(LePEAttention),
    ),
    "lite_mla": row(
        "attention",
        LiteMultiScaleAttention,
        Paper("EfficientViT (MIT)", "2205.14756", source="efficientvit_mit"),
        formula="BN(proj(q (k^T v) / (q sum(k)))), q, k = ReLU, of Linear(x) and conv1x1(DWConv("
        "Linear(x)))",
        params="5*C*C + 3*K*K*C + 3*C*C//n + 2*C",
        macs="N*(5*C*C + 3*K*K*C + 3*C*C//n + 4*C*(C//n + 1))",
        sites=_attn(LiteMultiScaleAttention),
    ),
    "additive_attn": row(
        "attention",
        AdditiveAttention,
        Paper("SwiftFormer", "2303.15446", source="swiftformer"),
        formula="proj(Linear(sum(a q) k) + q), a = q w, q, k = Linear(x), all of length 1",
        params="4*C*C + 5*C",
        macs="N*(4*C*C + C)",
        prefix_policy="take part",
        sites=_attn(AdditiveAttention),
    ),
    "nextvit_attn": row(
        "attention",
        EfficientAttention,
        Paper("Next-ViT, E-MHSA", "2207.05501", source="nextvit"),
        formula="proj(softmax(q k^T) v), q = Linear(x), k, v = Linear(BN(mean)) of runs of "
        "s*s tokens",
        params="4*C*C + 6*C",
        macs="N*2*C*C + M*2*C*C + 2*N*M*C",
        sites=_attn(EfficientAttention),
    ),
    "nextvit_conv": row(
        "attention",
        ConvAttention,
        Paper("Next-ViT, MHCA", "2207.05501", source="nextvit"),
        formula="conv1x1(ReLU(BN(conv(x)))), in groups of w channels",
        params="K*K*C*w + 2*C + C*O",
        macs="N*(K*K*C*w + C*O)",
        sites=_mixer(ConvAttention),
        **_MAPS,
    ),
    "mobilevit": row(
        "attention",
        MobileViT,
        Paper("MobileViT", "2110.02178", source="mobilevit"),
        formula="conv([x, conv1x1(Transformer(conv1x1(conv(x))))]) with BN and SiLU, between "
        "pixels at the same place of all 2 x 2 patches",
        params="45*C*C + 30*C",
        macs="N*(45*C*C + 4*M*C)",
        sites=_mixer(MobileViT),
        **_MAPS,
    ),
    "mobilevitv2": row(
        "attention",
        MobileViTV2,
        Paper("MobileViTv2", "2206.02680", source="mobilevitv2"),
        formula="BN(conv1x1(Transformer(conv1x1(SiLU(BN(DWConv(x))))))), its attention "
        "conv1x1(ReLU(v) sum(softmax(s) k))",
        params="16*C*C + (K*K + 28)*C + 2",
        macs="N*(16*C*C + K*K*C + 2*C)",
        sites=_mixer(MobileViTV2),
        **_MAPS,
    ),
    "sdta": row(
        "attention",
        SplitTransposeAttention,
        Paper("EdgeNeXt", "2206.10589", source="edgenext"),
        formula="x + g Linear(GELU(Linear(LN(y + g XCA(LN(y)))))), y = [DWConv(x1), x2] + position",
        params="12*C*C + 85*C + n",
        macs="N*(12*C*C + 2*C*C//n + 64*C + K*K*C//2)",
        sites=_mixer(SplitTransposeAttention),
        **_MAPS,
    ),
    "inception_mixer": row(
        "attention",
        InceptionMixer,
        Paper("iFormer", "2205.12956", source="iformer"),
        formula="conv1x1(y + DWConv(y)), y = [GELU(DWConv(conv1x1(a))), GELU(conv1x1(maxpool(b))), "
        "attention of means of s x s tokens of c], [a, b, c] = x",
        params="5*C*C//2 + K*K*C//2 + 15*C",
        macs="N*(7*C*C//4 + K*K*C//2 + 27*C//2) + M*(3*C*C//4 + M*C)",
        sites=_mixer(InceptionMixer),
        **_MAPS,
    ),
}
