"""Several maps in one token sequence."""

import pytest
import torch

import tokenconv as tc

GRID = tc.MultiGrid(((3, 5), (2, 2), (1, 7)), num_prefix_tokens=2)


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("impl", [None, "reference", "conv2d", "naive"])
def test_no_convolution_crosses_maps(impl, residual):
    x, weight, bias = draw(2, 2 + 15 + 4 + 7, 6), draw(6, 1, 5, 5), draw(6)
    out = tc.depthwise_conv(x, weight, bias, GRID, residual=residual, impl=impl)
    first = 2
    parts = [x[:, :2]]
    for rows, cols in GRID.sizes:
        part = x[:, first : first + rows * cols]
        parts.append(tc.depthwise_conv(part, weight, bias, (rows, cols), residual=residual))
        first += rows * cols
    expected = torch.cat(parts, dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), [x, weight, bias]),
        torch.autograd.grad(expected.sin().sum(), [x, weight, bias]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_change_on_one_map_stays_there():
    x, conv = draw(1, 28, 6).detach(), tc.DWConv(6).double()
    changed = x.clone()
    changed[:, 2:17] += 1
    moved = (conv(changed, GRID) - conv(x, GRID)).abs().sum(-1)[0] > 0
    assert moved[2:17].all()
    assert not moved[:2].any()
    assert not moved[17:].any()


def test_blocks_take_several_maps():
    block = tc.create_block("mix_ffn", dim=6).double()
    x = draw(1, 28, 6)
    alone = block(x[:, 17:21], 2, 2)
    torch.testing.assert_close(block(x, GRID)[:, 17:21], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tc.MultiGrid(()), "sizes .* of several maps"),
        (lambda: tc.MultiGrid(3), "sizes .* of several maps, got 3"),
        (lambda: tc.MultiGrid("ab"), "sizes .* of several maps, got 'ab'"),
        (lambda: tc.MultiGrid(((3, 0),)), "positive integers"),
        (lambda: tc.MultiGrid(((3, 5),), -1), "num_prefix_tokens >= 0"),
        (lambda: tc.DWConv(6)(torch.zeros(1, 27, 6), GRID),
         r"expected \(B, 28, C\), 2 prefix tokens and 3\*5 \+ 2\*2 \+ 1\*7, got .*\(1, 27, 6\)"),
        (lambda: tc.DWConv(6)(torch.zeros(1, 28, 6, 1), GRID), r"got .*\(1, 28, 6, 1\)"),
        (lambda: tc.DWConv(6)(torch.zeros(1, 28, 6), GRID, 3), "positive integers as grid size"),
        (lambda: tc.tokens_to_map(torch.zeros(1, 28, 6), GRID), "one grid, got a MultiGrid"),
        (lambda: tc.DWConv(6, impl="gather")(torch.zeros(1, 28, 6), GRID), "takes no TokenGrid"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises((tc.GridError, ValueError), match=message):
        call()
