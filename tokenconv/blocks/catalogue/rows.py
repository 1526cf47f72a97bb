"""How a row of the catalogue is written."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tokenconv.blocks.fragments import branch_of
from tokenconv.blocks.registry import BlockInfo, Paper

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
    "attention": {
        "kind": "tokens",
        "prefix_policy": "attend, unconvolved",
        "parity_test": "test_attention.py::test_attention_is_that_of_its_paper",
    },
    "separable": {
        "kind": "maps",
        "prefix_policy": "pass unchanged",
        "parity_test": "test_separable.py::test_block_is_that_of_its_oracle",
    },
    "stem": {
        "kind": "stem",
        "prefix_policy": "come behind it",
        "parity_test": "test_stems.py::test_stem_is_that_of_its_paper",
    },
    "mixer": {
        "kind": "maps",
        "prefix_policy": "pass unchanged",
        "parity_test": "test_mixers.py::test_mixer_is_that_of_its_paper",
    },
}
"""What a row says where nothing else is said."""

Sites = Mapping[str, Callable[..., nn.Module]]


def row(
    group: str, factory: Callable[..., nn.Module], *papers: Paper, sites: Sites, **facts: Any
) -> BlockInfo:
    """A row, with what is usual in its group where nothing else is said."""
    told = {**_USUAL[group], **facts}
    told["parity_test"] = _TESTS + told["parity_test"]
    return BlockInfo(group=group, factory=factory, papers=papers, sites=sites, **told)


def everywhere(factory: Callable[..., nn.Module], *sites: str) -> Sites:
    """The whole block, the same at every site."""
    return dict.fromkeys(sites, factory)


def beside_mlp(factory: Callable[..., Any], **fixed: Any) -> Sites:
    """The block without its residual."""
    return {"beside_mlp": branch_of(factory, **fixed)}


def map_beside_mlp(factory: Callable[..., Any]) -> Sites:
    """The same for a block on maps, which keeps width and size there."""
    return beside_mlp(factory, residual=False, stride=1, out_dim=None)


def in_place_of_attention(factory: Callable[..., Any]) -> Sites:
    """A mixer on maps without its residual: beside attention or MLP, or in place of attention."""
    branch = branch_of(factory, residual=False, stride=1, out_dim=None)
    return everywhere(branch, "beside_attn", "beside_mlp", "replace_attn")
