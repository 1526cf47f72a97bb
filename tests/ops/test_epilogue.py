"""Activation, gate and prefix tokens, whatever convolves."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import tokenconv as tc

from .conftest import ACTIVATIONS, PREFIX_TOKENS, formula, inputs, wide


@pytest.mark.parametrize("impl", ["reference", "conv2d", "naive"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula_forward_and_gradients(impl, activation):
    grid = tc.TokenGrid((3, 5), 2)
    for gated, residual, prefix_tokens in itertools.product((0, 1), (False, True), PREFIX_TOKENS):
        tensors = inputs(grid, 6, gate=bool(gated), dtype=torch.float64)
        one, other = wide(tensors), wide(tensors)
        told = {"residual": residual, "activation": activation, "prefix_tokens": prefix_tokens}
        out = tc.depthwise_conv(*one[:3], grid, gate=one[3], impl=impl, **told)
        expected = formula(*other, grid, **told)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
        cotangent = torch.randn(out.shape, dtype=out.dtype)
        pairs = zip(
            torch.autograd.grad(out, one[: 3 + gated], cotangent),
            torch.autograd.grad(expected, other[: 3 + gated], cotangent),
            strict=True,
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_of_several_maps_and_of_missing_tokens():
    coords = torch.tensor([[[0, 0], [2, 3], [1, 1]], [[1, 2], [-1, -1], [0, 2]]])
    for grid in (tc.MultiGrid(((2, 2), (1, 3)), 1), tc.SparseGrid(coords, 1)):
        x, weight, bias, gate = wide(inputs(grid, 3, gate=True))
        for prefix_tokens in PREFIX_TOKENS:

            def call(x, weight, bias, gate, grid=grid, prefix_tokens=prefix_tokens):
                return tc.depthwise_conv(
                    x, weight, bias, grid, activation="gelu", gate=gate, prefix_tokens=prefix_tokens
                )

            assert gradcheck(call, (x, weight, bias, gate))
            out = call(x, weight, bias, gate)
            plain = tc.depthwise_conv(x, weight, bias, grid)
            expected = ACTIVATIONS["gelu"](plain) * gate
            torch.testing.assert_close(out[:, 1:], expected[:, 1:])
            first = {"act": expected, "pass": x, "zero": torch.zeros_like(x)}[prefix_tokens]
            torch.testing.assert_close(out[:, :1], first[:, :1])


@pytest.mark.parametrize("prefix_tokens", PREFIX_TOKENS)
def test_prefix_tokens_have_the_dtype_of_the_others(prefix_tokens, grid):
    x, weight, bias, _ = inputs(grid, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = tc.depthwise_conv(x, weight, bias, grid, prefix_tokens=prefix_tokens)
    assert out.dtype == torch.bfloat16


def test_a_layer_has_the_activation_and_takes_the_gate(grid):
    layer = tc.DWConv(6, activation="silu").double()
    x, weight, bias, gate = inputs(grid, 6, gate=True, dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": bias})
    told = {"residual": False, "activation": "silu", "prefix_tokens": "act"}
    torch.testing.assert_close(layer(x, grid), formula(x, weight, bias, None, grid, **told))
    expected = formula(x, weight, bias, gate, grid, **told)
    torch.testing.assert_close(layer(x, grid, gate=gate), expected)
    assert repr(layer).endswith("activation=silu)")
    assert tc.DWConv(6).activation is None
    with pytest.raises(tc.UnknownNameError, match="unknown activation 'swish'"):
        tc.DWConv(6, activation="swish")
