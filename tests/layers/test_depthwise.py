import copy
import math
import re

import pytest
import torch
from torch import nn

import tokenconv as tc
from tokenconv.layers import unlike_dwconv


def as_conv2d(layer, x, rows, cols):
    """The same layer through ``nn.Conv2d`` on an NCHW copy of the tokens."""
    dim, side = layer.dim, layer.kernel_size
    conv = nn.Conv2d(
        dim, dim, side, groups=dim, dilation=layer.dilation, bias=layer.bias is not None,
        padding=layer.dilation * (side // 2), dtype=x.dtype,
    )  # fmt: skip
    conv.load_state_dict(layer.state_dict())
    fmap = x.transpose(1, 2).reshape(len(x), dim, rows, cols).contiguous()
    return conv(fmap).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 64, 768), (8, 8)), ((1, 35, 12), (5, 7)), ((3, 9, 10), (1, 9))]
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"kernel_size": 5, "bias": False}, {"dilation": 2}], ids=str
)
def test_matches_conv2d(shape, grid, kwargs):
    layer = tc.DWConv(shape[-1], dtype=torch.float64, **kwargs)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x, *grid), as_conv2d(layer, x, *grid), rtol=1e-11, atol=1e-11)


def test_has_no_parameter_but_weight_and_bias():
    assert {n: tuple(p.shape) for n, p in tc.DWConv(6, 5).named_parameters()} == {
        "weight": (6, 1, 5, 5),
        "bias": (6,),
    }
    assert list(tc.DWConv(6, bias=False).state_dict()) == ["weight"]
    assert not list(tc.DWConv(6).buffers())


def test_residual_adds_the_input_on_the_grid_and_leaves_the_prefix():
    plain = tc.DWConv(6)
    residual = tc.DWConv(6, residual=True)
    residual.load_state_dict(plain.state_dict())
    grid = tc.TokenGrid((3, 5), num_prefix_tokens=2)
    x = torch.randn(2, 17, 6)
    expected = plain(x, grid).detach()
    expected[:, 2:] += x[:, 2:]
    torch.testing.assert_close(residual(x, grid), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_loads_the_keys_of_the_classic_module(bias):
    class Classic(nn.Module):
        def __init__(self):
            super().__init__()
            self.dwconv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias)

    classic, ours = Classic(), tc.DWConv(6, bias=bias)
    ours.load_state_dict(classic.state_dict(), strict=True)
    assert torch.equal(ours.weight, classic.dwconv.weight)
    nested = nn.ModuleDict({"mlp": tc.DWConv(6, bias=bias)})
    nested.load_state_dict({f"mlp.{k}": v for k, v in classic.state_dict().items()}, strict=True)
    assert torch.equal(nested["mlp"].weight, classic.dwconv.weight)


def test_loading_stays_strict():
    with pytest.raises(RuntimeError, match="Missing key"):
        tc.DWConv(6).load_state_dict({"dwconv.weight": torch.zeros(6, 1, 3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        tc.DWConv(6, bias=False).load_state_dict(tc.DWConv(6).state_dict())


def test_starts_as_conv2d_does():
    torch.manual_seed(0)
    ours = tc.DWConv(9, 5)
    torch.manual_seed(0)
    theirs = nn.Conv2d(9, 9, 5, padding=2, groups=9)
    assert torch.equal(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-6, atol=0)
    assert ours.bias.abs().max() <= 1 / math.sqrt(25)


def test_survives_deepcopy_and_takes_device_and_dtype():
    layer = tc.DWConv(6, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta
    assert layer.bias.dtype == torch.bfloat16
    assert copy.deepcopy(tc.DWConv(6))(torch.zeros(1, 6, 6), 2, 3).shape == (1, 6, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((8, 4), {}, "odd kernel_size, got 4"),
        ((8, 0), {}, "odd kernel_size, got 0"),
        ((0,), {}, "dim=0"),
        ((8,), {"dilation": 0}, "dilation=0"),
        ((8,), {"impl": "conv3d"}, "unknown impl 'conv3d': did you mean conv2d"),
    ],
)
def test_bad_arguments_are_refused(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tc.DWConv(*args, **kwargs)


def test_wrong_token_count_is_refused():
    with pytest.raises(tc.GridError, match="expected 196 tokens"):
        tc.DWConv(8)(torch.zeros(2, 197, 8), 14, 14)


@pytest.mark.compile
def test_compiles_without_graph_break():
    layer = tc.DWConv(6, residual=True)
    compiled = torch.compile(layer, fullgraph=True)
    for grid in (tc.TokenGrid((3, 5), 1), tc.TokenGrid((4, 2), 1)):
        x = torch.randn(2, grid.num_tokens, 6)
        torch.testing.assert_close(compiled(x, grid), layer(x, grid), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({}, ""),
        ({"padding": "same"}, ""),
        ({"dilation": 2, "padding": 2}, ""),
        ({"kernel_size": 1, "padding": 0}, ""),
        ({"groups": 3}, "it has 3 groups for 6 -> 6 channels"),
        ({"out_channels": 12}, "it has 6 groups for 6 -> 12 channels"),
        ({"stride": (1, 2)}, r"it has a stride of \(1, 2\)"),
        ({"dilation": (1, 2), "padding": (1, 2)}, r"it has a dilation of \(1, 2\)"),
        (
            {"kernel_size": (3, 5), "padding": (1, 2)},
            r"its kernel of \(3, 5\) is not odd and square",
        ),
        ({"kernel_size": 4, "padding": "same"}, r"its kernel of \(4, 4\) is not odd and square"),
        ({"padding": 0}, "its padding does not keep the size with zeros"),
        ({"dilation": 2}, "its padding does not keep the size with zeros"),
        ({"padding_mode": "reflect"}, "its padding does not keep the size with zeros"),
    ],
)
def test_says_which_convolutions_it_computes(kwargs, why):
    usual = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6}
    conv = nn.Conv2d(**{**usual, **kwargs})
    assert re.fullmatch(why, unlike_dwconv(conv))
    if not why:
        layer = tc.DWConv(6, conv.kernel_size[0], dilation=conv.dilation[0])
        layer.load_state_dict(conv.state_dict())
        fmap = torch.randn(2, 6, 5, 7)
        out = layer(tc.map_to_tokens(fmap), 5, 7)
        torch.testing.assert_close(out, tc.map_to_tokens(conv(fmap)), rtol=1e-5, atol=1e-6)
