import pytest
import torch
from torch import nn

import tokenconv as tc


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "cols", "dilation"), [(5, 7, 1), (1, 9, 2), (8, 3, 1)])
def test_equals_two_convolutions_of_torch(rows, cols, dilation, bias):
    ours = tc.SeparableConv(6, 3, out_dim=10, dilation=dilation, bias=bias).double()
    depthwise = nn.Conv2d(6, 6, 3, padding=dilation, dilation=dilation, groups=6, bias=bias)
    pointwise = nn.Conv2d(6, 10, 1, bias=bias)
    theirs = nn.Sequential(depthwise, pointwise).double()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        a.data.copy_(b.data.reshape(a.shape))
    fmap = torch.randn(2, 6, rows, cols, dtype=torch.float64)
    out = ours(fmap.flatten(2).transpose(1, 2), rows, cols)
    expected = theirs(fmap)
    torch.testing.assert_close(out, expected.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-11)
    grads = [torch.autograd.grad(y.sin().sum(), list(m.parameters()))
             for y, m in ((out, ours), (expected, theirs))]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-11)


def test_prefix_tokens_take_the_pointwise_part_only():
    conv = tc.SeparableConv(6)
    x = torch.randn(2, 3 + 8, 6)
    out = conv(x, tc.TokenGrid((2, 4), num_prefix_tokens=3))
    torch.testing.assert_close(out[:, :3], conv.pointwise(x[:, :3]))


def test_neutral_is_zero_and_can_be_trained_away():
    conv = tc.SeparableConv(6)
    conv.init_neutral_()
    out = conv(torch.randn(2, 8, 6), 2, 4)
    assert not out.any()
    (out * torch.randn(2, 8, 6)).sum().backward()
    assert conv.pointwise.weight.grad.any()
    assert conv.depthwise.weight.any()


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match="expected out_dim >= 1, got 0"):
        tc.SeparableConv(6, out_dim=0)
    with pytest.raises(ValueError, match="odd kernel_size, got 2"):
        tc.SeparableConv(6, 2)
