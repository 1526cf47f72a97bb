"""``BLOCKS``: one row per block, from its name to what builds it and where it fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from tokenconv.blocks.adapters import AdaptFormer, ConvAdapter, Convpass, Mona, RepAdapter
from tokenconv.blocks.feed_forward import FeedForward
from tokenconv.blocks.ffn import (
    IRFFN,
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
from tokenconv.blocks.position import CPE, DPE, LPI, LPU, PEG, RepCPE
from tokenconv.errors import UnknownNameError


@dataclass(frozen=True, kw_only=True)
class BlockInfo:
    """What there is to know about a block without building it."""

    factory: Callable[..., nn.Module]
    """``factory(dim, **kwargs)`` builds the whole block."""
    group: str
    """Where it stands in a Transformer: ``ffn``, ``position``, ``adapter``, ..."""
    paper: str
    """Address of the source paper."""
    prefix_policy: str
    """What happens to class and register tokens."""
    kind: Literal["tokens", "scales"]
    """``tokens`` blocks obey ``forward(x, *grid)`` on any grid, ``scales`` take several maps."""
    parity_test: str
    """The pytest node that proves the block equal to code we did not write."""
    sites: Mapping[str, Callable[..., nn.Module]] = field(default_factory=dict)
    """Where surgery can put it, the usual place first: from a site to ``fragment(dim, **kwargs)``,
    which builds only what is new; ``dim`` is the width of the tokens at the site. A fragment maps
    tokens to tokens like a block. Its ``init_neutral_()``, which also resets it there, makes it
    return its input where it stands ``before_`` or ``after_`` something, and zero ``beside_``
    something. For ``merge_conv`` it is a ``DWConv`` whose kernel is added to that of the MLP's own
    convolution."""


def _ffn(
    name: str,
    factory: Callable[..., FeedForward],
    paper: str,
    sites: Mapping[str, Callable[..., nn.Module]] | None = None,
    *,
    prefix_policy: str = "skip the convolution",
    kind: Literal["tokens", "scales"] = "tokens",
    parity_test: str = "test_papers.py::test_block_is_that_of_its_paper",
) -> tuple[str, BlockInfo]:
    """Row of a feed-forward; it goes beside an MLP if nothing else is said."""
    return name, BlockInfo(
        factory=factory,
        group="ffn",
        paper=f"https://arxiv.org/abs/{paper}",
        prefix_policy=prefix_policy,
        kind=kind,
        parity_test=f"tests/blocks/{parity_test}",
        sites={"beside_mlp": branch_of(factory)} if sites is None else sites,
    )


def _position(
    name: str,
    factory: Callable[..., nn.Module],
    paper: str,
    *sites: str,
) -> tuple[str, BlockInfo]:
    """Row of a position encoding; it goes in front of a block if nothing else is said."""
    return name, BlockInfo(
        factory=factory,
        group="position",
        paper=f"https://arxiv.org/abs/{paper}",
        prefix_policy="pass unchanged",
        kind="tokens",
        parity_test="tests/blocks/test_position.py::test_encoding_is_that_of_its_paper",
        sites=dict.fromkeys(sites or ("before_block", "after_block", "before_attn"), factory),
    )


def _adapter(
    name: str, factory: Callable[..., nn.Module], paper: str, *sites: str, prefix_policy: str
) -> tuple[str, BlockInfo]:
    return name, BlockInfo(
        factory=factory,
        group="adapter",
        paper=f"https://arxiv.org/abs/{paper}",
        prefix_policy=prefix_policy,
        kind="tokens",
        parity_test="tests/blocks/test_adapters.py::test_adapter_is_that_of_its_paper",
        sites=dict.fromkeys(sites, factory),
    )


BLOCKS: Mapping[str, BlockInfo] = MappingProxyType(
    dict(
        [
            _ffn(
                "mix_ffn",
                MixFFN,
                "2106.13797",
                {
                    "before_act": conv_around_activation,
                    "after_act": conv_around_activation,
                    "merge_conv": second_kernel,
                },
                parity_test="test_ffn.py::test_mix_ffn_matches_timm",
            ),
            _ffn("shunted_ffn", ShuntedFFN, "2111.15193", {"before_act": conv_around_activation}),
            _ffn("rmt_ffn", RMTFFN, "2309.11523", {"after_act": conv_around_activation}),
            _ffn("leff", LeFF, "2103.11816", prefix_policy="pass unchanged"),
            _ffn("uformer_leff", UformerLeFF, "2106.03106"),
            _ffn("irffn", IRFFN, "2107.06263"),
            _ffn(
                "localvit_ffn",
                LocalityFFN,
                "2104.05707",
                {"beside_mlp": branch_of(LocalityFFN, residual=False)},
                prefix_policy="pass unchanged",
            ),
            _ffn("gdfn", GDFN, "2111.09881"),
            _ffn(
                "conv_glu",
                ConvGLU,
                "2311.17132",
                {"beside_mlp": branch_of(ConvGLU), "before_act": conv_around_activation},
            ),
            _ffn("multi_scale_ffn", MultiScaleFFN, "2205.08534", {}, kind="scales"),
            _ffn("conv2former_mlp", Conv2FormerMLP, "2211.11943"),
            _ffn("efficientformerv2_ffn", EfficientFormerV2FFN, "2212.08059"),
            _ffn("fastvit_ffn", FastViTFFN, "2303.14189"),
            _ffn("moga_ffn", MogaFFN, "2211.03295"),
            _ffn("conv_mlp", ConvMLP, "2109.04454", {}),
            _ffn(
                "replknet_ffn",
                RepLKNetFFN,
                "2203.06717",
                {"beside_mlp": branch_of(RepLKNetFFN, residual=False)},
                prefix_policy="take part",
            ),
            _ffn("unireplknet_ffn", UniRepLKNetFFN, "2311.15599", prefix_policy="take part"),
            _ffn(
                "gated_cnn",
                GatedCNN,
                "2405.07992",
                {"beside_mlp": branch_of(GatedCNN, residual=False)},
            ),
            _ffn(
                "separable_ffn",
                SeparableFFN,
                "1704.04861",
                {
                    "beside_mlp": separable_branch,
                    "beside_attn": separable_branch,
                    "replace_attn": separable_branch,
                },
                prefix_policy="skip the depthwise part",
                parity_test="test_ffn.py::test_separable_ffn_is_its_formula",
            ),
            _position("peg", PEG, "2102.10882", "after_block", "before_block", "before_attn"),
            _position("lpu", LPU, "2107.06263"),
            _position("cpe", CPE, "2104.06399"),
            _position("dpe", DPE, "2201.04676"),
            _position("rep_cpe", RepCPE, "2303.14189"),
            (
                "lpi",
                BlockInfo(
                    factory=LPI,
                    group="position",
                    paper="https://arxiv.org/abs/2106.09681",
                    prefix_policy="pass unchanged",
                    kind="tokens",
                    parity_test="tests/blocks/test_position.py::test_lpi_matches_timm",
                    sites={"beside_mlp": branch_of(LPI), "beside_attn": branch_of(LPI)},
                ),
            ),
            _adapter(
                "convpass",
                Convpass,
                "2207.07039",
                "beside_mlp",
                "beside_attn",
                prefix_policy="convolved as images of one pixel",
            ),
            _adapter(
                "conv_adapter",
                ConvAdapter,
                "2208.07463",
                "beside_mlp",
                "beside_attn",
                prefix_policy="convolved as images of one pixel",
            ),
            _adapter(
                "mona", Mona, "2408.08345", "after_block", prefix_policy="skip the convolution"
            ),
            _adapter(
                "rep_adapter", RepAdapter, "2302.08106", "before_attn", prefix_policy="take part"
            ),
            _adapter(
                "adaptformer", AdaptFormer, "2205.13535", "beside_mlp", prefix_policy="take part"
            ),
        ]
    )
)


def create_block(name: str, dim: int, **kwargs: Any) -> nn.Module:
    """Build a block by name.

    Args:
        name: A key of ``BLOCKS``.
        dim: Channels C.
        **kwargs: Keyword arguments of the block.

    Returns:
        The block; ``kind="tokens"`` blocks are called ``block(x, H, W)``.

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
