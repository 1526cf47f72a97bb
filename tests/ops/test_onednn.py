"""oneDNN's fused convolution on packed kernels, and when it is taken."""

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenconv as tc
from tokenconv.ops.depthwise_conv import conv2d, onednn

from .conftest import ACTIVATIONS, PREFIX_TOKENS, formula, inputs, wide

PRIMITIVE = "mkldnn::_convolution_pointwise"
pytestmark = pytest.mark.skipif(
    not onednn._is_there(), reason="this PyTorch has no oneDNN operators"
)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "not packed"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue(activation, gated, residual, packed):
    for (size, kernel_size), prefix_tokens in itertools.product(
        [((3, 5), 3), ((4, 9), 5), ((2, 3, 4), 7), ((1, 1), 3)], PREFIX_TOKENS
    ):
        grid = tc.TokenGrid(size, 2)
        x, weight, bias, gate = inputs(grid, 20, kernel_size, gate=gated)
        weight = torch.nn.Parameter(weight) if packed else weight
        told = {"residual": residual, "activation": activation, "prefix_tokens": prefix_tokens}
        with torch.no_grad():
            out = tc.depthwise_conv(x, weight, bias, grid, gate=gate, impl="onednn", **told)
        expected = formula(*wide([x, weight, bias, gate]), grid, **told)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_bias_and_with_dilation():
    grid = tc.TokenGrid((6, 9), 1)
    x, weight, _, _ = inputs(grid, 20)
    weight = torch.nn.Parameter(weight)
    call = {"dilation": 2, "activation": "silu"}
    with torch.no_grad():
        out = tc.depthwise_conv(x, weight, None, grid, impl="onednn", **call)
        expected = tc.depthwise_conv(x, weight, None, grid, impl="reference", **call)
        plain = tc.depthwise_conv(x, weight, None, grid, impl="onednn", activation="silu")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, plain)


def test_one_kernel_with_and_without_a_residual():
    grid = tc.TokenGrid((6, 9), 1)
    x, weight, bias, _ = inputs(grid, 20)
    weight = torch.nn.Parameter(weight)
    for residual in (False, True, False):
        call = {"residual": residual, "activation": "gelu"}
        with torch.no_grad():
            out = tc.depthwise_conv(x, weight, bias, grid, impl="onednn", **call)
            expected = tc.depthwise_conv(x, weight, bias, grid, impl="reference", **call)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bias_of_any_layout():
    grid = tc.TokenGrid((3, 5), 1)
    x, weight, bias, _ = inputs(grid, 16)
    for own in (torch.stack([bias, -bias], 1)[:, 0], bias[:1].expand(16)):
        one, other = (tc.depthwise_conv(x, weight, own, grid, impl=i) for i in ("onednn", "conv2d"))
        assert torch.equal(one, other)


def test_a_plain_convolution_is_the_same_to_the_bit():
    grid = tc.TokenGrid((6, 9), 1)
    x, weight, bias, _ = inputs(grid, 20)
    weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        for residual in (False, True):
            one, other = (
                tc.depthwise_conv(x, weight, bias, grid, residual=residual, impl=impl)
                for impl in ("onednn", "conv2d")
            )
            assert torch.equal(one, other)


# --- packed kernels are those of now ---


def changed_in_place(layer):
    layer.weight.mul_(2)


def changed_through_data(layer):
    """Which no version counter sees."""
    layer.weight.data.mul_(2)


def loaded(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def loaded_by_assignment(layer):
    doubled = {name: 2 * value for name, value in layer.state_dict().items()}
    layer.load_state_dict(doubled, assign=True)


def replaced(layer):
    layer.weight = torch.nn.Parameter(2 * layer.weight)


def trained(layer):
    with torch.enable_grad():
        layer(torch.ones(1, 15, 16), 3, 5).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


@pytest.mark.parametrize(
    "change",
    [changed_in_place, changed_through_data, loaded, loaded_by_assignment, replaced, trained],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_packed_kernels_follow_the_weights(change, mode, profiled):
    layer = tc.DWConv(16, activation="gelu")
    x = torch.randn(2, 15, 16)
    with mode():
        assert PRIMITIVE in profiled(lambda: layer(x, 3, 5))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        change(layer)
    assert not torch.equal(layer.weight, before)
    with mode():
        out = layer(x, 3, 5)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    expected = tc.depthwise_conv(x, weight, bias, (3, 5), activation="gelu", impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_kernels_are_not_kept_longer_than_the_weights_nor_copied():
    onednn._packed.clear()
    layer = tc.DWConv(16)
    layer(torch.randn(2, 15, 16), 3, 5)
    assert len(onednn._packed) == 1
    file = io.BytesIO()
    torch.save(layer, file)
    plain = io.BytesIO()
    torch.save(tc.DWConv(16), plain)
    assert file.tell() == plain.tell()
    twin = copy.deepcopy(layer)
    assert vars(twin).keys() == vars(layer).keys()
    assert len(onednn._packed) == 1
    gone = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert gone() is None
    assert not len(onednn._packed)


@torch.no_grad()
def test_weights_that_are_no_parameters_are_not_packed():
    """Such as sums of two kernels, which are new in every call."""
    onednn._packed.clear()
    grid = tc.TokenGrid((3, 5))
    x, weight, bias, _ = inputs(grid, 16)
    tc.depthwise_conv(x, weight, bias, grid, impl="onednn")
    assert not len(onednn._packed)


# --- when it is taken, and what it refuses ---


@torch.no_grad()
def test_it_is_taken_where_it_can_be(profiled, grid):
    layer = tc.DWConv(16)
    x = torch.randn(2, 16, 16)
    assert PRIMITIVE in profiled(lambda: layer(x, grid))
    assert PRIMITIVE not in profiled(lambda: tc.DWConv(16, impl="conv2d")(x, grid))
    assert "aten::mkldnn_convolution" in profiled(lambda: tc.DWConv(16, impl="conv2d")(x, grid))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_where_it_cannot_be_taken_another_one_is(monkeypatch, profiled, grid):
    layer = tc.DWConv(16)
    x = torch.randn(2, 16, 16)
    assert PRIMITIVE not in profiled(lambda: layer(x, grid))  # has a gradient
    with torch.no_grad():
        assert PRIMITIVE not in profiled(lambda: layer.double()(x.double(), grid))
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert PRIMITIVE not in profiled(lambda: layer(x, grid))
        with FlopCounterMode(display=False) as counter:
            layer(x, grid)
        assert counter.get_total_flops() == 2 * 2 * 15 * 9 * 16
        traced = torch.jit.trace(lambda x: layer.requires_grad_(False)(x, 4, 4), x)
        assert "mkldnn" not in str(traced.graph)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert PRIMITIVE not in profiled(lambda: layer(x, grid))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("which", ["x", "weight", "bias", "gate"])
def test_whatever_is_differentiated_has_its_derivative(which, grid):
    values = dict(zip(("x", "weight", "bias", "gate"), inputs(grid, 16, gate=True), strict=True))
    one = values.pop(which)

    def run(t, impl):
        return tc.depthwise_conv(**{**values, which: t}, grid=grid, activation="gelu", impl=impl)

    for derivative in (
        lambda impl: torch.func.grad(lambda t: run(t, impl).square().sum())(one),
        lambda impl: torch.func.jvp(lambda t: run(t, impl), (one,), (one,))[1],
    ):
        torch.testing.assert_close(derivative(None), derivative("reference"), rtol=1e-4, atol=1e-4)


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, layer: layer(x, 3, 5), r"has no gradient; call it under torch.no_grad\(\)"),
        (lambda x, layer: layer.double().requires_grad_(False)(x.double(), 3, 5), "not float64"),
        (lambda x, layer: layer.requires_grad_(False)(x.as_subclass(Tagged), 3, 5), "plain tens"),
        (lambda x, layer: layer.requires_grad_(False)(x.mT.contiguous().mT, 3, 5), "next to each"),
    ],
    ids=["gradient", "dtype", "subclass", "layout"],
)  # fmt: skip
def test_a_forced_choice_is_honoured_or_refused(call, message):
    layer = tc.DWConv(16, impl="onednn")
    with pytest.raises(ValueError, match=f"impl='onednn' is refused: .*{message}"):
        call(torch.randn(2, 15, 16), layer)


@pytest.mark.parametrize("impl", ["onednn", "triton"])
def test_where_nothing_is_computed_nothing_is_refused(impl):
    """Plans and costs run on the meta device."""
    with torch.device("meta"):
        assert tc.DWConv(16, impl=impl)(torch.empty(2, 15, 16), 3, 5).shape == (2, 15, 16)


def test_it_is_refused_where_pytorch_has_no_such_operator(monkeypatch):
    monkeypatch.setattr(onednn, "_is_there", lambda: False)
    layer, x = tc.DWConv(16, impl="onednn"), torch.randn(2, 15, 16)
    with torch.no_grad(), pytest.raises(ValueError, match="this PyTorch has no oneDNN"):
        layer(x, 3, 5)
    layer.impl = None
    with torch.no_grad():
        assert layer(x, 3, 5).isfinite().all()


# --- halves on CPUs that have none ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_convolved_in_float32_where_there_is_nothing_better(monkeypatch, dtype, grid):
    x, weight, bias, _ = inputs(grid, 16, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    seen = []
    convolve = conv2d.F.conv2d
    monkeypatch.setattr(
        conv2d.F, "conv2d", lambda x, *a, **k: seen.append(x.dtype) or convolve(x, *a, **k)
    )
    monkeypatch.setitem(conv2d._IS_NATIVE, dtype, False)
    out = tc.depthwise_conv(*leaves, grid, residual=True, impl="conv2d")
    assert seen == [torch.float32]
    assert out.dtype == dtype
    exact = wide([x, weight, bias, None])
    told = {"residual": True, "activation": None, "prefix_tokens": "act"}
    expected = formula(*exact, grid, **told)
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)  # rounded once
    ours = torch.autograd.grad(out.float().sum(), leaves)
    theirs = torch.autograd.grad(expected.sum(), exact[:3])
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)
