"""Rows of position encodings and local interaction."""

from collections.abc import Mapping
from typing import Any

from tokenconv.blocks.catalogue.rows import everywhere, row
from tokenconv.blocks.fragments import branch_of
from tokenconv.blocks.position import CPE, DPE, LPI, LPU, PEG, AbsPosEmbed, RepCPE, TinyViTConv
from tokenconv.blocks.registry import BlockInfo, Paper

_ENCODING: Mapping[str, Any] = {
    "formula": "x + DWConv(x)",
    "params": "(K*K + 1)*C",
    "macs": "N*K*K*C",
}
_IN_FRONT = ("before_block", "after_block", "before_attn")

POSITIONS: Mapping[str, BlockInfo] = {
    "peg": row(
        "position",
        PEG,
        Paper("CPVT", "2102.10882"),
        Paper("Twins", "2104.13840", source="twins"),
        **_ENCODING,
        sites=everywhere(PEG, "after_block", "before_block", "before_attn"),
    ),
    "abs_pos_embed": row(
        "position",
        AbsPosEmbed,
        Paper("PVT", "2102.12122"),
        Paper("ViT", "2010.11929"),
        formula="x + P, learned for 14 x 14 positions and resized to the grid",
        params="14*14*C",
        macs="0",
        parity_test="test_position.py::test_learned_positions_are_those_of_pvt",
        sites=everywhere(AbsPosEmbed, *_IN_FRONT),
    ),
    "lpu": row(
        "position",
        LPU,
        Paper("CMT", "2107.06263", source="cmt"),
        **_ENCODING,
        sites=everywhere(LPU, *_IN_FRONT),
    ),
    "cpe": row(
        "position",
        CPE,
        Paper("CoaT", "2104.06399", source="coat"),
        **_ENCODING,
        sites=everywhere(CPE, *_IN_FRONT),
    ),
    "dpe": row(
        "position",
        DPE,
        Paper("UniFormer", "2201.04676", source="uniformer"),
        Paper("RMT", "2309.11523", source="rmt"),
        Paper("BiFormer", "2303.08810", source="biformer"),
        **_ENCODING,
        sites=everywhere(DPE, *_IN_FRONT),
    ),
    "rep_cpe": row(
        "position",
        RepCPE,
        Paper("FastViT", "2303.14189", source="fastvit"),
        **_ENCODING,
        sites=everywhere(RepCPE, *_IN_FRONT),
    ),
    "lpi": row(
        "position",
        LPI,
        Paper("XCiT", "2106.09681", source="xcit"),
        formula="DWConv(BN(act(DWConv(x))))",
        params="2*(K*K + 1)*C + 2*C",
        macs="N*2*K*K*C",
        parity_test="test_position.py::test_lpi_matches_timm",
        sites=everywhere(branch_of(LPI), "beside_mlp", "beside_attn"),
    ),
    "tinyvit_conv": row(
        "position",
        TinyViTConv,
        Paper("TinyViT", "2207.10666", source="tinyvit"),
        formula="BN(DWConv(x))",
        params="K*K*C + 2*C",
        macs="N*K*K*C",
        parity_test="test_position.py::test_tinyvit_conv_matches_timm",
        sites=everywhere(branch_of(TinyViTConv), "beside_mlp", "beside_attn"),
    ),
}
