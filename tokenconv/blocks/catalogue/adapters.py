"""Rows of adapters."""

from collections.abc import Mapping

from tokenconv.blocks.adapters import AdaptFormer, ConvAdapter, ConvLoRA, Convpass, Mona, RepAdapter
from tokenconv.blocks.catalogue.rows import everywhere, row
from tokenconv.blocks.fragments import branch_of
from tokenconv.blocks.registry import BlockInfo, Paper

ADAPTERS: Mapping[str, BlockInfo] = {
    "convpass": row(
        "adapter",
        Convpass,
        Paper("Convpass", "2207.07039", source="convpass"),
        formula="s * up(g(conv(g(down(x)))))",
        params="2*C*w + 2*w + C + 9*w*w",
        macs="N*(2*C*w + 9*w*w)",
        prefix_policy="convolved as images of one pixel",
        sites=everywhere(Convpass, "beside_mlp", "beside_attn"),
    ),
    "conv_adapter": row(
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
        sites=everywhere(ConvAdapter, "beside_mlp", "beside_attn"),
    ),
    "conv_lora": row(
        "adapter",
        ConvLoRA,
        Paper("Conv-LoRA", "2401.17868", source="conv_lora"),
        formula="s * up(y + resize(act(conv_i(resize(y, i))))), y = down(x), one i per image",
        params="2*C*w + E*(9*w*w + w) + 2*w*E",
        macs="N*(2*C*w + 9*w*w*E*(E + 1)*(2*E + 1)//6) + w*E",
        prefix_policy="skip the experts",
        sites=everywhere(branch_of(ConvLoRA, out_dim=None), "beside_attn", "beside_mlp"),
    ),
    "mona": row(
        "adapter",
        Mona,
        Paper("Mona", "2408.08345", source="mona"),
        formula="x + up(act(op(down(norm(x)))))",
        params="2*C*w + 5*C + w*w + 88*w",
        macs="N*(2*C*w + w*w + 83*w)",
        prefix_policy="skip the convolution",
        sites=everywhere(Mona, "after_block"),
    ),
    "rep_adapter": row(
        "adapter",
        RepAdapter,
        Paper("RepAdapter", "2302.08106", source="repadapter"),
        formula="x + s * up(down(x)), up in groups",
        params="C*w + w + C*w//2 + C",
        macs="N*(C*w + C*w//2)",
        sites=everywhere(RepAdapter, "before_attn", "before_mlp"),
    ),
    "adaptformer": row(
        "adapter",
        AdaptFormer,
        Paper("AdaptFormer", "2205.13535", source="adaptformer"),
        formula="s * up(ReLU(down(x)))",
        params="2*C*w + w + C",
        macs="N*2*C*w",
        sites=everywhere(AdaptFormer, "beside_mlp"),
    ),
}
