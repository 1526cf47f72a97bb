"""Rows of attention with convolution."""

from collections.abc import Mapping
from typing import Any

from tokenconv.blocks.attention.channels import CrossCovarianceAttention, TransposedAttention
from tokenconv.blocks.attention.linear import FactorisedAttention
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
from tokenconv.blocks.registry import BlockInfo, Paper


def _attn(factory: Any) -> Sites:
    return everywhere(factory, "replace_attn", "beside_attn")


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
}
