"""``BLOCKS``: one row per block, from its name to what builds it and where it fits."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn

from tokenconv.blocks.adapters import AdaptFormer, ConvAdapter, ConvLoRA, Convpass, Mona, RepAdapter
from tokenconv.blocks.blueprint import BSConvS, BSConvU
from tokenconv.blocks.experts import CondConv, DynamicConv, ResDSC
from tokenconv.blocks.ffn import (
    IRFFN,
    MLP,
    RMTFFN,
    Conv2FormerMLP,
    ConvMLP,
    EfficientFormerV2FFN,
    FastViTFFN,
    LeFF,
    LocalityFFN,
    MixFFN,
    MogaFFN,
    MultiScaleFFN,
    RepLKNetFFN,
    SeparableFFN,
    ShuntedFFN,
    UformerLeFF,
    UniRepLKNetFFN,
)
from tokenconv.blocks.fragments import (
    branch_of,
    conv_around_activation,
    second_kernel,
    separable_branch,
)
from tokenconv.blocks.gated import GDFN, ConvGLU, GatedCNN
from tokenconv.blocks.position import CPE, DPE, LPI, LPU, PEG, AbsPosEmbed, RepCPE, TinyViTConv
from tokenconv.blocks.pyramid import ESP, GroupedConv, MixConv, PydMobileNet
from tokenconv.blocks.registry import BlockInfo, Paper
from tokenconv.blocks.separable import (
    InvertedResidual,
    MBConv,
    MobileNetV1,
    ShuffleNetV1,
    ShuffleNetV2,
    Xception,
)
from tokenconv.errors import UnknownNameError

_TESTS = "tests/blocks/"
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "ffn": {
        "kind": "tokens",
        "prefix_policy": "skip the convolution",
        "parity_test": "test_papers.py::test_block_is_that_of_its_paper",
    },
    "position": {
        "kind": "tokens",
        "prefix_policy": "pass unchanged",
        "parity_test": "test_position.py::test_encoding_is_that_of_its_paper",
    },
    "adapter": {
        "kind": "tokens",
        "prefix_policy": "take part",
        "parity_test": "test_adapters.py::test_adapter_is_that_of_its_paper",
    },
    "separable": {
        "kind": "maps",
        "prefix_policy": "pass unchanged",
        "parity_test": "test_separable.py::test_block_is_that_of_its_oracle",
    },
}
"""What a row says where nothing else is said."""

Sites = Mapping[str, Callable[..., nn.Module]]


def _row(
    group: str, factory: Callable[..., nn.Module], *papers: Paper, sites: Sites, **facts: Any
) -> BlockInfo:
    told = {**_USUAL[group], **facts}
    told["parity_test"] = _TESTS + told["parity_test"]
    return BlockInfo(group=group, factory=factory, papers=papers, sites=sites, **told)


def _everywhere(factory: Callable[..., nn.Module], *sites: str) -> Sites:
    """The whole block, the same at every site."""
    return dict.fromkeys(sites, factory)


def _beside_mlp(factory: Callable[..., Any], **fixed: Any) -> Sites:
    return {"beside_mlp": branch_of(factory, **fixed)}


def _map_beside_mlp(factory: Callable[..., Any]) -> Sites:
    return _beside_mlp(factory, residual=False, stride=1, out_dim=None)


_MIX = "2*C*h + h + C + (K*K + 1)*h"
_MIX_MACS = "N*(2*C*h + K*K*h)"
_ENCODING: Mapping[str, Any] = {
    "formula": "x + DWConv(x)",
    "params": "(K*K + 1)*C",
    "macs": "N*K*K*C",
}
_IN_FRONT = ("before_block", "after_block", "before_attn")

BLOCKS: Mapping[str, BlockInfo] = MappingProxyType(
    {
        # --- feed-forwards ---
        "mlp": _row(
            "ffn",
            MLP,
            Paper("UniFormer", "2201.04676"),
            Paper("iFormer", "2205.12956"),
            Paper("ConvFormer", "2210.13452", "bias=False, act_layer=StarReLU"),
            formula="fc2(act(fc1(x)))",
            params="2*C*h + h + C",
            macs="N*2*C*h",
            prefix_policy="take part",
            parity_test="test_ffn.py::test_mlp_matches_timm",
            sites={},
        ),
        "mix_ffn": _row(
            "ffn",
            MixFFN,
            Paper("PVT v2", "2106.13797", source="pvtv2"),
            Paper("PVT v2 Linear", "2106.13797", "linear=True", source="pvtv2"),
            Paper("SegFormer", "2105.15203", source="segformer"),
            Paper("VAN", "2202.09741", source="van"),
            Paper("LITv2", "2205.13213", source="litv2"),
            Paper("BiFormer", "2303.08810", "mlp_ratio=3", source="biformer"),
            formula="fc2(act(DWConv(fc1(x))))",
            params=_MIX,
            macs=_MIX_MACS,
            parity_test="test_ffn.py::test_mix_ffn_matches_timm",
            sites={
                "before_act": conv_around_activation,
                "after_act": conv_around_activation,
                "merge_conv": second_kernel,
            },
        ),
        "shunted_ffn": _row(
            "ffn",
            ShuntedFFN,
            Paper("Shunted Transformer", "2111.15193", source="shunted"),
            Paper("SMT", "2307.08579", source="smt"),
            formula="fc2(act(y + DWConv(y))), y = fc1(x)",
            params=_MIX,
            macs=_MIX_MACS,
            sites={"before_act": conv_around_activation},
        ),
        "rmt_ffn": _row(
            "ffn",
            RMTFFN,
            Paper("RMT", "2309.11523", source="rmt"),
            formula="fc2(y + DWConv(y)), y = act(fc1(x))",
            params=_MIX,
            macs=_MIX_MACS,
            sites={"after_act": conv_around_activation},
        ),
        "leff": _row(
            "ffn",
            LeFF,
            Paper("CeiT", "2103.11816", source="ceit"),
            formula="BN fc2 act BN DWConv act BN fc1 x",
            params="2*C*h + 5*h + 3*C + (K*K + 1)*h",
            macs=_MIX_MACS,
            prefix_policy="pass unchanged",
            sites=_beside_mlp(LeFF),
        ),
        "uformer_leff": _row(
            "ffn",
            UformerLeFF,
            Paper("Uformer", "2106.03106", source="uformer"),
            formula="fc2(act(DWConv(act(fc1(x)))))",
            params=_MIX,
            macs=_MIX_MACS,
            sites=_beside_mlp(UformerLeFF),
        ),
        "irffn": _row(
            "ffn",
            IRFFN,
            Paper("CMT", "2107.06263", source="cmt"),
            formula="BN fc2 BN act (y + DWConv(y)), y = BN act fc1 x",
            params="2*C*h + 5*h + 3*C + (K*K + 1)*h",
            macs=_MIX_MACS,
            sites=_beside_mlp(IRFFN),
        ),
        "localvit_ffn": _row(
            "ffn",
            LocalityFFN,
            Paper("LocalViT", "2104.05707", source="localvit"),
            formula="x + BN fc2 SE act BN DWConv act BN fc1 x",
            params="2*C*h + K*K*h + 4*h + 2*C + 2*h*(h//4) + h//4 + h",
            macs="N*(2*C*h + K*K*h) + 2*h*(h//4)",
            prefix_policy="pass unchanged",
            sites=_beside_mlp(LocalityFFN, residual=False),
        ),
        "gdfn": _row(
            "ffn",
            GDFN,
            Paper("Restormer", "2111.09881", source="restormer"),
            formula="fc2(act(a) * b), (a, b) = DWConv(fc1(x))",
            params="3*C*h + 2*K*K*h",
            macs="N*(3*C*h + 2*K*K*h)",
            sites=_beside_mlp(GDFN),
        ),
        "conv_glu": _row(
            "ffn",
            ConvGLU,
            Paper("TransNeXt", "2311.17132", source="transnext"),
            formula="fc2(act(DWConv(a)) * b), (a, b) = fc1(x)",
            params="3*C*h + 2*h + C + (K*K + 1)*h",
            macs="N*(3*C*h + K*K*h)",
            sites={**_beside_mlp(ConvGLU), "before_act": conv_around_activation},
        ),
        "multi_scale_ffn": _row(
            "ffn",
            MultiScaleFFN,
            Paper("ViT-Adapter", "2205.08534", source="vit_adapter"),
            formula="mix_ffn on maps of 2, 1 and 1/2 the size",
            params=_MIX,
            macs="N*21/4*(2*C*h + K*K*h)",
            kind="scales",
            parity_test="test_papers.py::test_a_multi_scale_feed_forward_convolves_every_map_by_itself",
            sites={},
        ),
        "conv2former_mlp": _row(
            "ffn",
            Conv2FormerMLP,
            Paper("Conv2Former", "2211.11943", source="conv2former"),
            formula="fc2(y + act(DWConv(y))), y = act(fc1(LN(x)))",
            params="2*C*h + h + 3*C + (K*K + 1)*h",
            macs=_MIX_MACS,
            sites=_beside_mlp(Conv2FormerMLP),
        ),
        "efficientformerv2_ffn": _row(
            "ffn",
            EfficientFormerV2FFN,
            Paper("EfficientFormerV2", "2212.08059", source="efficientformerv2"),
            formula="BN fc2 act BN DWConv act BN fc1 x",
            params="2*C*h + 5*h + 3*C + (K*K + 1)*h",
            macs=_MIX_MACS,
            sites=_beside_mlp(EfficientFormerV2FFN),
        ),
        "fastvit_ffn": _row(
            "ffn",
            FastViTFFN,
            Paper("FastViT", "2303.14189", source="fastvit"),
            formula="fc2(act(fc1(BN(DWConv(x)))))",
            params="2*C*h + h + 3*C + K*K*C",
            macs="N*(2*C*h + K*K*C)",
            sites=_beside_mlp(FastViTFFN),
        ),
        "moga_ffn": _row(
            "ffn",
            MogaFFN,
            Paper("MogaNet", "2211.03295", source="moganet"),
            formula="fc2(aggregate(act(DWConv(fc1(x)))))",
            params="2*C*h + 3*h + C + 1 + (K*K + 1)*h",
            macs="N*(2*C*h + h + K*K*h)",
            sites=_beside_mlp(MogaFFN),
        ),
        "conv_mlp": _row(
            "ffn",
            ConvMLP,
            Paper("ConvMLP", "2109.04454", source="convmlp"),
            formula="MLP, DWConv, MLP, each behind LN",
            params="2*(2*C*h + h + C) + K*K*C + 6*C",
            macs="N*(4*C*h + K*K*C)",
            sites={},
        ),
        "replknet_ffn": _row(
            "ffn",
            RepLKNetFFN,
            Paper("RepLKNet", "2203.06717", source="replknet"),
            formula="x + BN fc2 act BN fc1 BN x",
            params="2*C*h + 2*h + 4*C",
            macs="N*2*C*h",
            prefix_policy="take part",
            sites=_beside_mlp(RepLKNetFFN, residual=False),
        ),
        "unireplknet_ffn": _row(
            "ffn",
            UniRepLKNetFFN,
            Paper("UniRepLKNet", "2311.15599", source="unireplknet"),
            formula="BN(fc2(GRN(act(fc1(x)))))",
            params="2*C*h + 3*h + 2*C",
            macs="N*2*C*h",
            prefix_policy="take part",
            sites=_beside_mlp(UniRepLKNetFFN),
        ),
        "gated_cnn": _row(
            "ffn",
            GatedCNN,
            Paper("MambaOut", "2405.07992", source="mambaout"),
            formula="x + fc2(act(g) * [i, DWConv(c)]), (g, i, c) = fc1(LN(x))",
            params="3*C*h + 2*h + 3*C + (K*K + 1)*C",
            macs="N*(3*C*h + K*K*C)",
            sites=_beside_mlp(GatedCNN, residual=False),
        ),
        "separable_ffn": _row(
            "ffn",
            SeparableFFN,
            Paper("MobileNets, beside an MLP", "1704.04861"),
            formula="fc2(act(fc1(x))) + pointwise(DWConv(x))",
            params="2*C*h + h + C + (K*K + 1)*C + C*C + C",
            macs="N*(2*C*h + K*K*C + C*C)",
            prefix_policy="skip the depthwise part",
            parity_test="test_ffn.py::test_separable_ffn_is_its_formula",
            sites=_everywhere(separable_branch, "beside_mlp", "beside_attn", "replace_attn"),
        ),
        # --- position and local ---
        "peg": _row(
            "position",
            PEG,
            Paper("CPVT", "2102.10882"),
            Paper("Twins", "2104.13840", source="twins"),
            **_ENCODING,
            sites=_everywhere(PEG, "after_block", "before_block", "before_attn"),
        ),
        "abs_pos_embed": _row(
            "position",
            AbsPosEmbed,
            Paper("PVT", "2102.12122"),
            Paper("ViT", "2010.11929"),
            formula="x + P, learned for 14 x 14 positions and resized to the grid",
            params="14*14*C",
            macs="0",
            parity_test="test_position.py::test_learned_positions_are_those_of_pvt",
            sites=_everywhere(AbsPosEmbed, *_IN_FRONT),
        ),
        "lpu": _row(
            "position",
            LPU,
            Paper("CMT", "2107.06263", source="cmt"),
            **_ENCODING,
            sites=_everywhere(LPU, *_IN_FRONT),
        ),
        "cpe": _row(
            "position",
            CPE,
            Paper("CoaT", "2104.06399", source="coat"),
            **_ENCODING,
            sites=_everywhere(CPE, *_IN_FRONT),
        ),
        "dpe": _row(
            "position",
            DPE,
            Paper("UniFormer", "2201.04676", source="uniformer"),
            Paper("RMT", "2309.11523", source="rmt"),
            Paper("BiFormer", "2303.08810", source="biformer"),
            **_ENCODING,
            sites=_everywhere(DPE, *_IN_FRONT),
        ),
        "rep_cpe": _row(
            "position",
            RepCPE,
            Paper("FastViT", "2303.14189", source="fastvit"),
            **_ENCODING,
            sites=_everywhere(RepCPE, *_IN_FRONT),
        ),
        "lpi": _row(
            "position",
            LPI,
            Paper("XCiT", "2106.09681", source="xcit"),
            formula="DWConv(BN(act(DWConv(x))))",
            params="2*(K*K + 1)*C + 2*C",
            macs="N*2*K*K*C",
            parity_test="test_position.py::test_lpi_matches_timm",
            sites=_everywhere(branch_of(LPI), "beside_mlp", "beside_attn"),
        ),
        "tinyvit_conv": _row(
            "position",
            TinyViTConv,
            Paper("TinyViT", "2207.10666", source="tinyvit"),
            formula="BN(DWConv(x))",
            params="K*K*C + 2*C",
            macs="N*K*K*C",
            parity_test="test_position.py::test_tinyvit_conv_matches_timm",
            sites=_everywhere(branch_of(TinyViTConv), "beside_mlp", "beside_attn"),
        ),
        # --- adapters ---
        "convpass": _row(
            "adapter",
            Convpass,
            Paper("Convpass", "2207.07039", source="convpass"),
            formula="s * up(g(conv(g(down(x)))))",
            params="2*C*w + 2*w + C + 9*w*w",
            macs="N*(2*C*w + 9*w*w)",
            prefix_policy="convolved as images of one pixel",
            sites=_everywhere(Convpass, "beside_mlp", "beside_attn"),
        ),
        "conv_adapter": _row(
            "adapter",
            ConvAdapter,
            Paper("Conv-Adapter", "2208.07463", source="conv_adapter"),
            Paper(
                "Conv-Adapter for ConvNeXt",
                "2208.07463",
                "kernel_size=7, act_layer=nn.GELU",
                source="conv_adapter",
            ),
            formula="s * up(act(conv(x))), conv in w groups",
            params="K*K*C + w + w*C + 2*C",
            macs="N*(K*K*C + w*C)",
            prefix_policy="convolved as images of one pixel",
            sites=_everywhere(ConvAdapter, "beside_mlp", "beside_attn"),
        ),
        "conv_lora": _row(
            "adapter",
            ConvLoRA,
            Paper("Conv-LoRA", "2401.17868", source="conv_lora"),
            formula="s * up(y + resize(act(conv_i(resize(y, i))))), y = down(x), one i per image",
            params="2*C*w + E*(9*w*w + w) + 2*w*E",
            macs="N*(2*C*w + 9*w*w*E*(E + 1)*(2*E + 1)//6) + w*E",
            prefix_policy="skip the experts",
            sites=_everywhere(branch_of(ConvLoRA, out_dim=None), "beside_attn", "beside_mlp"),
        ),
        "mona": _row(
            "adapter",
            Mona,
            Paper("Mona", "2408.08345", source="mona"),
            formula="x + up(act(op(down(norm(x)))))",
            params="2*C*w + 5*C + w*w + 88*w",
            macs="N*(2*C*w + w*w + 83*w)",
            prefix_policy="skip the convolution",
            sites=_everywhere(Mona, "after_block"),
        ),
        "rep_adapter": _row(
            "adapter",
            RepAdapter,
            Paper("RepAdapter", "2302.08106", source="repadapter"),
            formula="x + s * up(down(x)), up in groups",
            params="C*w + w + C*w//2 + C",
            macs="N*(C*w + C*w//2)",
            sites=_everywhere(RepAdapter, "before_attn", "before_mlp"),
        ),
        "adaptformer": _row(
            "adapter",
            AdaptFormer,
            Paper("AdaptFormer", "2205.13535", source="adaptformer"),
            formula="s * up(ReLU(down(x)))",
            params="2*C*w + w + C",
            macs="N*2*C*w",
            sites=_everywhere(AdaptFormer, "beside_mlp"),
        ),
        # --- the depthwise separable family, on maps and on tokens ---
        "mobilenetv1": _row(
            "separable",
            MobileNetV1,
            Paper("MobileNets", "1704.04861", source="mobilenetv1"),
            formula="act BN pointwise act BN DWConv x",
            params="K*K*C + 2*C + C*O + 2*O",
            macs="N*(K*K*C + C*O)",
            sites={},
        ),
        "xception": _row(
            "separable",
            Xception,
            Paper("Xception", "1610.02357", source="xception"),
            formula="x + 3 times (BN pointwise DWConv ReLU)",
            params="3*(K*K*C + C*C + 2*C)",
            macs="N*3*(K*K*C + C*C)",
            sites=_map_beside_mlp(Xception),
        ),
        "inverted_residual": _row(
            "separable",
            InvertedResidual,
            Paper("MobileNetV2", "1801.04381", source="mobilenetv2"),
            formula="x + BN project act BN DWConv act BN expand x",
            params="C*h + 4*h + K*K*h + h*O + 2*O",
            macs="N*(C*h + K*K*h + h*O)",
            sites=_map_beside_mlp(InvertedResidual),
        ),
        "mbconv": _row(
            "separable",
            MBConv,
            Paper("EfficientNet", "1905.11946", source="efficientnet"),
            formula="x + BN project SE act BN DWConv act BN expand x",
            params="C*h + 4*h + K*K*h + h*O + 2*O + 2*h*(C//4) + C//4 + h",
            macs="N*(C*h + K*K*h + h*O) + 2*h*(C//4)",
            sites=_map_beside_mlp(MBConv),
        ),
        "shufflenetv1": _row(
            "separable",
            ShuffleNetV1,
            Paper("ShuffleNet", "1707.01083", source="shufflenetv1"),
            formula="ReLU(x + BN expand BN DWConv shuffle ReLU BN reduce x), in groups",
            params="2*C*w + K*K*w + 4*w + 2*C",
            macs="N*(2*C*w + K*K*w)",
            sites={},
        ),
        "shufflenetv2": _row(
            "separable",
            ShuffleNetV2,
            Paper("ShuffleNet V2", "1807.11164", source="shufflenetv2"),
            formula="shuffle [a, ReLU BN pointwise BN DWConv ReLU BN pointwise b], (a, b) = x",
            params="2*(C//2)*(C//2) + K*K*(C//2) + 6*(C//2)",
            macs="N*(2*(C//2)*(C//2) + K*K*(C//2))",
            sites={},
        ),
        "pydmobilenet": _row(
            "separable",
            PydMobileNet,
            Paper("PydMobileNet, concatenation", "1811.07083"),
            Paper("PydMobileNet, addition", "1811.07083", "add=True"),
            formula="x + BN project act BN [DWConv3, DWConv5, DWConv7] act BN reduce act BN x",
            params="2*C + C*w + 2*w + 83*w + 6*w + 3*w*O + 2*O",
            macs="N*(C*w + 83*w + 3*w*O)",
            sites=_map_beside_mlp(PydMobileNet),
        ),
        "esp": _row(
            "separable",
            ESP,
            Paper("ESPNet", "1803.06815", source="espnet"),
            formula="PReLU(BN(x + fused [conv(y), dilations 1, 2, 4, 8, 16])), y = reduce(x)",
            params="C*w + 9*w*O + 3*O",
            macs="N*(C*w + 9*w*O)",
            sites=_map_beside_mlp(ESP),
        ),
        "bsconv_u": _row(
            "separable",
            BSConvU,
            Paper("BSConv-U", "2003.13549", source="bsconv"),
            formula="DWConv(pointwise(x))",
            params="C*O + (K*K + 1)*O",
            macs="N*(C*O + K*K*O)",
            sites=_map_beside_mlp(BSConvU),
        ),
        "bsconv_s": _row(
            "separable",
            BSConvS,
            Paper("BSConv-S", "2003.13549", source="bsconv"),
            formula="DWConv(pointwise(pointwise(x)))",
            params="C*w + w*O + (K*K + 1)*O",
            macs="N*(C*w + w*O + K*K*O)",
            sites=_map_beside_mlp(BSConvS),
        ),
        "resdsc": _row(
            "separable",
            ResDSC,
            Paper("Depthwise Convolution is All You Need", "1902.00927", source="resdsc"),
            Paper("the same, soft sharing", "1902.00927", "num_domains=10"),
            formula="ReLU(x + BN pointwise DWConv ReLU BN pointwise DWConv x)",
            params="K*K*C + C*O + 2*O + K*K*O + O*O + 2*O",
            macs="N*(K*K*C + C*O + K*K*O + O*O)",
            sites={},
        ),
        "mixconv": _row(
            "separable",
            MixConv,
            Paper("MixConv", "1907.09595"),
            formula="[DWConv3(a), DWConv5(b), DWConv7(c)], (a, b, c) = x",
            params="9*(C - 2*(C//3)) + 74*(C//3)",
            macs="N*(9*(C - 2*(C//3)) + 74*(C//3))",
            sites=_map_beside_mlp(MixConv),
        ),
        "condconv": _row(
            "separable",
            CondConv,
            Paper("CondConv", "1904.04971"),
            formula="conv of the kernel sum_e gate_e(x) * W_e, gate = sigmoid(linear(mean(x)))",
            params="E*K*K*C*O + E*(C + 1)",
            macs="N*K*K*C*O + E*C + E*K*K*C*O",
            sites=_map_beside_mlp(CondConv),
        ),
        "dynamic_conv": _row(
            "separable",
            DynamicConv,
            Paper("Dynamic Convolution", "1912.03458"),
            formula="conv of the kernel sum_e gate_e(x) * W_e, gate = softmax(MLP(mean(x)) / T)",
            params="E*(K*K*C*O + O) + C*w + w + w*E + E",
            macs="N*K*K*C*O + C*w + w*E + E*(K*K*C*O + O)",
            sites=_map_beside_mlp(DynamicConv),
        ),
        "grouped_conv": _row(
            "separable",
            GroupedConv,
            Paper("Xception, section 1.2", "1610.02357"),
            formula="conv(x), in groups from 1 (standard) to C (depthwise)",
            params="K*K*C*O + O",
            macs="N*K*K*C*O",
            sites=_map_beside_mlp(GroupedConv),
        ),
    }
)


def create_block(name: str, dim: int, **kwargs: Any) -> nn.Module:
    """Build a block by name.

    Args:
        name: A key of ``BLOCKS``.
        dim: Channels C.
        **kwargs: Keyword arguments of the block.

    Returns:
        The block; it is called ``block(x, H, W)``, those of kind ``maps`` also ``block(fmap)``.

    Raises:
        UnknownNameError: If there is no such block; the nearest names are listed.
        ValueError: If an argument does not fit the block.
    """
    return block_info(name).factory(dim, **kwargs)


def block_info(name: str) -> BlockInfo:
    """The row of ``BLOCKS`` with this name, or an error that lists the nearest ones."""
    if name not in BLOCKS:
        raise UnknownNameError("block", name, BLOCKS)
    return BLOCKS[name]


def list_blocks(pattern: str = "*") -> list[str]:
    """Names of the blocks that match a shell-style pattern, sorted."""
    return sorted(name for name in BLOCKS if fnmatchcase(name, pattern))
