import pytest
import torch
from timm.models.twins import PosConv

import tokenconv as tc


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (1, 9), (8, 3)])
def test_peg_matches_timm(rows, cols):
    theirs = PosConv(12, 12).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = tc.create_block("peg", dim=12).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)  # has the official proj.0
    x = torch.randn(2, rows * cols, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for module, out in ((ours, ours(x, rows, cols)), (theirs, theirs(x, (rows, cols)))):
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_prefix_tokens_pass_a_peg_unchanged():
    block = tc.create_block("peg", dim=8, kernel_size=5)
    x = torch.randn(2, 2 + 12, 8)
    out = block(x, tc.TokenGrid((3, 4), num_prefix_tokens=2))
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[:, 2:], block(x[:, 2:], 3, 4))
    assert (out[:, 2:] - x[:, 2:]).abs().max() > 0.1


def test_a_peg_has_the_parameters_it_says():
    block = tc.create_block("peg", dim=8, kernel_size=5)
    assert sum(p.numel() for p in block.parameters()) == 8 * (5 * 5 + 1)
