import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import tokenconv as tc
from tokenconv.ops.depthwise_conv.conv2d import depthwise_conv_conv2d
from tokenconv.ops.depthwise_conv.naive import depthwise_conv_naive
from tokenconv.ops.depthwise_conv.reference import depthwise_conv_reference

CASES = {
    "wide": ((3, 7), 0, 3, 1),
    "one row": ((1, 9), 0, 3, 1),
    "one column": ((9, 1), 0, 5, 1),
    "class token": ((5, 4), 1, 3, 1),
    "registers, large kernel": ((4, 6), 5, 7, 1),
    "dilated": ((7, 5), 1, 3, 2),
    "kernel larger than the grid": ((2, 3), 0, 9, 1),
    "pointwise": ((3, 5), 0, 1, 1),
    "video": ((3, 4, 5), 0, 3, 1),
    "video with prefix": ((2, 3, 4), 2, 3, 1),
}


def make(size, prefix, kernel_size, *, batch=2, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = tc.TokenGrid(size, prefix)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(batch, grid.num_tokens, dim, **draw)
    weight = torch.randn(dim, 1, kernel_size, kernel_size, **draw)
    bias = torch.randn(dim, **draw)
    return grid, [t.requires_grad_() for t in (x, weight, bias)]


def independent(x, weight, bias, grid, dilation, residual):
    """Written from the formula alone, frame by frame and image by image, in NCHW memory."""
    rows, cols = grid.size[-2:]
    prefix = x[:, : grid.num_prefix_tokens]
    images = []
    for image in x[:, grid.num_prefix_tokens :]:
        frames = []
        for frame in image.split(rows * cols):
            fmap = frame.T.reshape(1, -1, rows, cols).contiguous()
            padding = dilation * (weight.shape[-1] // 2)
            channels = [
                F.conv2d(fmap[:, c : c + 1], weight[c : c + 1], padding=padding, dilation=dilation)
                for c in range(weight.shape[0])
            ]
            out = torch.cat(channels, dim=1)[0].reshape(weight.shape[0], -1).T
            out = out + bias if bias is not None else out
            frames.append(out + frame if residual else out)
        images.append(torch.cat(frames))
    return torch.cat([prefix, torch.stack(images)], dim=1)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    "implementation", [depthwise_conv_reference, depthwise_conv_conv2d, depthwise_conv_naive]
)
def test_matches_the_formula_forward_and_gradients(implementation, case, with_bias, residual):
    size, prefix, kernel_size, dilation = case
    grid, (x, weight, bias) = make(size, prefix, kernel_size)
    bias = bias if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    out = implementation(x, weight, bias, grid, dilation, residual)
    expected = independent(x, weight, bias, grid, dilation, residual)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    dim=st.integers(1, 5),
    prefix=st.integers(0, 3),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    dilation=st.integers(1, 2),
    residual=st.booleans(),
)
def test_conv2d_matches_reference_on_any_shape(
    batch, rows, cols, dim, prefix, kernel_size, dilation, residual
):
    grid, (x, weight, bias) = make((rows, cols), prefix, kernel_size, batch=batch, dim=dim)
    out = depthwise_conv_conv2d(x, weight, bias, grid, dilation, residual)
    expected = depthwise_conv_reference(x, weight, bias, grid, dilation, residual)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    alone = depthwise_conv_conv2d(x[-1:], weight, bias, grid, dilation, residual)
    torch.testing.assert_close(out[-1:], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "conv2d", "naive"])
def test_gradcheck(impl):
    grid, (x, weight, bias) = make((2, 3), 1, 3, dim=2)
    assert gradcheck(
        lambda *args: tc.depthwise_conv(*args, grid, residual=True, impl=impl), (x, weight, bias)
    )


@pytest.mark.parametrize("impl", ["reference", "conv2d", "naive"])
def test_shifted_kernel_shifts_rows_and_columns_the_right_way(impl):
    # A kernel with its one at (row 0, column 1) fetches the token above; H != W, by hand.
    x = torch.arange(1.0, 7.0).reshape(1, 6, 1)  # rows (1 2 3) and (4 5 6)
    above = torch.zeros(1, 1, 3, 3)
    above[0, 0, 0, 1] = 1
    out = tc.depthwise_conv(x, above, None, (2, 3), impl=impl)
    assert out.flatten().tolist() == [0, 0, 0, 1, 2, 3]
    out = tc.depthwise_conv(x, above.transpose(2, 3), None, (2, 3), impl=impl)
    assert out.flatten().tolist() == [0, 1, 2, 0, 4, 5]


@pytest.mark.parametrize("impl", ["reference", "conv2d", "naive"])
def test_channels_and_batch_elements_do_not_mix(impl):
    grid, (x, weight, bias) = make((3, 4), 1, 3)
    out = tc.depthwise_conv(x, weight, bias, grid, impl=impl)
    changed = x.detach().clone()
    changed[1, :, 2] += 1
    difference = (tc.depthwise_conv(changed, weight, bias, grid, impl=impl) - out) != 0
    assert difference[1, :, 2].any()
    difference[1, :, 2] = False
    assert not difference.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_zero_residual_convolution_is_the_identity_bit_for_bit(dtype, prefix, batch):
    grid = tc.TokenGrid((3, 5), prefix)
    x = torch.randn(batch, grid.num_tokens, 8).to(dtype)
    zero = torch.zeros(8, 1, 5, 5, dtype=dtype)
    out = tc.depthwise_conv(x, zero, torch.zeros(8, dtype=dtype), grid, residual=True)
    assert torch.equal(out, x)
    assert out.is_contiguous()


def test_tokens_that_are_a_slice_of_something_wider():
    grid, (x, weight, bias) = make((3, 5), 1, 3, dim=12)
    half = x[..., :6]
    out = tc.depthwise_conv(half, weight[:6], bias[:6], grid)
    torch.testing.assert_close(
        out, tc.depthwise_conv(half.clone(), weight[:6], bias[:6], grid), rtol=1e-12, atol=1e-12
    )


def test_autocast_keeps_dtypes_together():
    x, weight = torch.randn(2, 16, 8), torch.randn(8, 1, 3, 3)
    grid = tc.TokenGrid((3, 5), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = tc.depthwise_conv(x, weight, None, grid)
        residual = tc.depthwise_conv(x, torch.zeros_like(weight), None, grid, residual=True)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(residual, x)  # not rounded to bfloat16 on the way


def test_forced_implementation_is_the_one_that_runs(monkeypatch):
    grid, (x, weight, bias) = make((3, 5), 0, 3)
    calls = []
    monkeypatch.setattr(F, "conv2d", lambda *a, _f=F.conv2d, **k: calls.append(1) or _f(*a, **k))
    tc.depthwise_conv(x, weight, bias, grid, impl="reference")
    assert not calls
    tc.depthwise_conv(x, weight, bias, grid, impl="conv2d")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 1, 4, 4)}, "odd kernel side, got 4"),
        ({"weight": torch.zeros(6, 1, 3, 5)}, r"\(6, 1, K, K\) for 6 channels"),
        ({"weight": torch.zeros(6, 6, 3, 3)}, r"got \(6, 6, 3, 3\)"),
        ({"weight": torch.zeros(6, 1, 3)}, r"got \(6, 1, 3\)"),
        ({"weight": torch.zeros(6, 1, 3, 3, 1)}, r"got \(6, 1, 3, 3, 1\)"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, r"got \(4, 1, 3, 3\)"),
        ({"bias": torch.zeros(5)}, r"bias \(6,\), got \(5,\)"),
        ({"dilation": 0}, "dilation >= 1, got 0"),
        ({"impl": "conv3d"}, "unknown impl 'conv3d': did you mean conv2d"),
        ({"grid": (4, 4)}, "expected 16 tokens"),
    ],
    ids=str,
)
def test_error_names_what_was_expected_and_what_came(change, message):
    call = {"weight": torch.zeros(6, 1, 3, 3), "bias": None, "grid": (3, 5), **change}
    with pytest.raises(ValueError, match=message):
        tc.depthwise_conv(torch.zeros(2, 15, 6), **call)
