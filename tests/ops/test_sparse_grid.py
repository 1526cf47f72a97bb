"""Depthwise convolution of tokens that do not fill their grid, against zero-filled maps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import tokenconv as tc
from tokenconv.ops.depthwise_conv import gather

SIZES = {"one size": [(5, 7), (5, 7)], "several sizes": [(3, 9), (6, 4), (1, 5)]}


def make(sizes, count, prefix, side, *, dim=4, empty=0, seed=0):
    """Some tokens of every image at random positions, some slots empty, float64."""
    generator = torch.Generator().manual_seed(seed)
    coords = torch.full((len(sizes), count + empty, 2), -1)
    for image, (rows, cols) in enumerate(sizes):
        chosen = torch.randperm(rows * cols, generator=generator)[:count]
        slots = torch.randperm(count + empty, generator=generator)[: len(chosen)]
        coords[image, slots] = torch.stack([chosen // cols, chosen % cols], dim=-1)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(len(sizes), prefix + count + empty, dim, **draw)
    weight, bias = torch.randn(dim, 1, side, side, **draw), torch.randn(dim, **draw)
    return tc.SparseGrid(coords, prefix), [t.requires_grad_() for t in (x, weight, bias)]


def zero_filled(x, weight, bias, grid, dilation, residual):
    """Every image by itself, on a map of its own, which is zero where there is no token."""
    images = []
    for tokens, coords in zip(x, grid.coords, strict=True):
        behind = tokens[grid.num_prefix_tokens :]
        there = (coords >= 0).all(-1)
        rows, cols = coords[there].T
        fmap = x.new_zeros(1, x.shape[2], rows.max() + 1, cols.max() + 1)
        fmap[0, :, rows, cols] = behind[there].T
        padding = dilation * (weight.shape[-1] // 2)
        out = F.conv2d(fmap, weight, bias, padding=padding, dilation=dilation, groups=x.shape[2])[
            0, :, rows, cols
        ].T
        result = behind.clone()
        result[there] = out + behind[there] if residual else out
        images.append(torch.cat([tokens[: grid.num_prefix_tokens], result]))
    return torch.stack(images)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("count", "empty", "prefix", "side", "dilation"),
    [(35, 0, 0, 3, 1), (11, 0, 1, 3, 1), (4, 3, 5, 5, 1), (20, 2, 1, 3, 2), (3, 0, 0, 1, 1)],
)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_matches_a_zero_filled_map_forward_and_gradients(
    sizes, count, empty, prefix, side, dilation, with_bias, residual
):
    grid, (x, weight, bias) = make(sizes, count, prefix, side, empty=empty)
    bias = bias if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    out = tc.depthwise_conv(x, weight, bias, grid, dilation=dilation, residual=residual)
    expected = zero_filled(x, weight, bias, grid, dilation, residual)
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
    sizes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    count=st.integers(1, 12),
    empty=st.integers(0, 3),
    prefix=st.integers(0, 2),
    side=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)
def test_any_positions_in_any_order(sizes, count, empty, prefix, side, seed):
    grid, (x, weight, bias) = make(sizes, count, prefix, side, empty=empty, seed=seed)
    out = tc.depthwise_conv(x, weight, bias, grid)
    expected = zero_filled(x, weight, bias, grid, 1, False)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_a_filled_grid_is_the_full_one():
    x = torch.randn(2, 1 + 15, 6, dtype=torch.float64)
    weight, bias = torch.randn(6, 1, 3, 3, dtype=x.dtype), torch.randn(6, dtype=x.dtype)
    index = torch.arange(15)
    coords = torch.stack([index // 5, index % 5], dim=-1).expand(2, -1, -1)
    sparse = tc.depthwise_conv(x, weight, bias, tc.SparseGrid(coords, 1))
    full = tc.depthwise_conv(x, weight, bias, tc.TokenGrid((3, 5), 1))
    torch.testing.assert_close(sparse, full, rtol=1e-12, atol=1e-12)


def test_frames_of_a_video_do_not_mix():
    index = torch.randperm(2 * 3 * 4, generator=torch.Generator().manual_seed(0))[:17]
    coords = torch.stack([index // 12, index // 4 % 3, index % 4], dim=-1)[None]
    x, weight = torch.randn(1, 17, 6, dtype=torch.float64), torch.randn(6, 1, 5, 5).double()
    out = tc.depthwise_conv(x, weight, None, tc.SparseGrid(coords))
    whole = x.new_zeros(1, 24, 6).index_copy(1, index, x)
    expected = tc.depthwise_conv(whole, weight, None, (2, 3, 4))[:, index]
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_nothing_but_prefix_tokens():
    grid = tc.SparseGrid(torch.zeros(2, 0, 2, dtype=torch.int64), 1)
    x = torch.randn(2, 1, 4)
    assert torch.equal(tc.DWConv(4)(x, grid), x)


def test_second_derivatives():
    grid, inputs = make([(2, 3), (3, 2)], 4, 1, 3, dim=2, empty=1)
    assert gradgradcheck(lambda *args: tc.depthwise_conv(*args, grid, residual=True), inputs)


def test_gradcheck():
    grid, (x, weight, bias) = make([(2, 3), (3, 2)], 4, 1, 3, dim=2, empty=1)
    assert gradcheck(lambda *args: tc.depthwise_conv(*args, grid, residual=True), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_residual_convolution_is_the_identity_bit_for_bit(dtype):
    grid, (x, weight, bias) = make([(4, 4)] * 2, 9, 1, 3, empty=2)
    x, weight, bias = (t.detach().to(dtype) for t in (x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tc.depthwise_conv(x, 0 * weight, 0 * bias, grid, residual=True)
    assert out.dtype == dtype
    assert torch.equal(out, x)


@pytest.mark.parametrize("block", ["mix_ffn", "peg", "separable_ffn"])
def test_blocks_take_sparse_grids(block):
    model = tc.create_block(block, 8).double()
    index = torch.arange(15)
    sizes = [torch.stack([index // w, index % w], dim=-1) for w in (5, 3)]
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    packed = model(x, tc.SparseGrid(torch.stack(sizes), 1))
    for image, size in enumerate([(3, 5), (5, 3)]):
        alone = model(x[image : image + 1], tc.TokenGrid(size, 1))[0]
        torch.testing.assert_close(packed[image], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.needs("torch", "2.14", "compiles wrong gradients where tokens are missing")
@pytest.mark.parametrize("how", ["compile", "export"])
def test_shapes_do_not_depend_on_data(how):
    class Conv(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = tc.DWConv(4)

        def forward(self, x, coords):
            return self.conv(x, tc.SparseGrid(coords, 1))

    conv = Conv()
    inputs = []
    for seed, count in enumerate([9, 12, 7]):
        grid, (x, _, _) = make([(4, 5)] * 3, count, 1, 3, seed=seed, empty=1)
        inputs.append((x.detach().float(), grid.coords))
    if how == "compile":
        torch._dynamo.reset()
        program = torch.compile(conv, fullgraph=True, dynamic=True, backend="aot_eager")
    else:
        tokens = torch.export.Dim("tokens", min=3, max=64)
        program = torch.export.export(
            conv, inputs[0], dynamic_shapes=({1: tokens + 1}, {1: tokens})
        ).module()
    for args in inputs:
        torch.testing.assert_close(program(*args), conv(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, g: tc.SparseGrid(g.coords.float()), tc.GridError, "integer coords"),
        (lambda x, w, g: tc.SparseGrid(g.coords[0]), tc.GridError, r"\(B, L, 2\).*\(9, 2\)"),
        (lambda x, w, g: tc.SparseGrid([[[0, 0]]]), tc.GridError, r"got \[\[\[0, 0\]\]\]"),
        (lambda x, w, g: tc.SparseGrid(g.coords > 0), tc.GridError, "got torch.bool"),
        (lambda x, w, g: tc.SparseGrid(g.coords[..., :1]), tc.GridError, r"\(2, 9, 1\)"),
        (lambda x, w, g: tc.SparseGrid(g.coords, -1), tc.GridError, "num_prefix_tokens >= 0"),
        (lambda x, w, g: tc.depthwise_conv(x[:1], w, None, g), tc.GridError,
         r"2 images of 10 tokens \(1 prefix \+ 9\), got .*\(1, 10, 4\)"),
        (lambda x, w, g: tc.depthwise_conv(x[:, 1:], w, None, g), tc.GridError, r"\(2, 9, 4\)"),
        (lambda x, w, g: tc.depthwise_conv(x[..., None], w, None, g), tc.GridError,
         r"got .*\(2, 10, 4, 1\)"),
        (lambda x, w, g: tc.depthwise_conv(x, w, None, g, impl="conv2d"), ValueError,
         "'conv2d' is refused: it takes no SparseGrid; take 'gather'; or leave impl out"),
        (lambda x, w, g: tc.depthwise_conv(x, w, None, (2, 5), impl="gather"), ValueError,
         "'gather' is refused: it takes no TokenGrid; take 'conv2d' or 'naive' or 'reference'"),
        (lambda x, w, g: tc.tokens_to_map(x, g), tc.GridError, "fill one grid, got a SparseGrid"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    grid, (x, weight, _) = make([(4, 4)] * 2, 9, 1, 3)
    with pytest.raises(error, match=message):
        call(x, weight, grid)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_torch_that_compiles_it_wrongly_is_refused(monkeypatch):
    """Torch 2.11 gives other gradients, and says nothing."""
    monkeypatch.setattr(gather, "_COMPILES", False)
    layer, x = tc.DWConv(3), torch.randn(1, 2, 3)
    sparse = tc.SparseGrid(torch.tensor([[[0, 0], [1, 2]]]))

    def call(x):
        return layer(x, sparse)

    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="GridError"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    broken = torch.compile(call, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(one(x).sum(), layer.weight)[0] for one in (broken, call))
    torch.testing.assert_close(ours, theirs)
