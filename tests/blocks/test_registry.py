import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenconv as tc

ROOT = Path(__file__).parents[2]
TOKEN_BLOCKS = [name for name, info in tc.BLOCKS.items() if info.kind == "tokens"]


@pytest.mark.parametrize("name", TOKEN_BLOCKS)
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    prefix=st.integers(0, 3),
    dim=st.sampled_from([4, 8, 12]),
)
def test_token_blocks_keep_the_shape_and_the_batch_apart(name, batch, rows, cols, prefix, dim):
    torch.manual_seed(0)
    block = tc.create_block(name, dim=dim).double().eval()
    grid = tc.TokenGrid((rows, cols), prefix)
    x = torch.randn(batch, grid.num_tokens, dim, dtype=torch.float64)
    out = block(x, grid)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert torch.equal(out, block(x, grid))
    torch.testing.assert_close(out[-1:], block(x[-1:], grid), rtol=1e-10, atol=1e-12)


def test_unknown_block_lists_the_nearest():
    with pytest.raises(tc.UnknownNameError, match="unknown block 'mixffn': did you mean mix_ffn"):
        tc.create_block("mixffn", dim=8)


def test_list_blocks_takes_a_pattern():
    assert "mix_ffn" in tc.list_blocks()
    assert tc.list_blocks("*ffn*") == [n for n in sorted(tc.BLOCKS) if "ffn" in n]
    assert tc.list_blocks("no such") == []


def test_rows_cannot_be_changed():
    with pytest.raises(TypeError):
        tc.BLOCKS["mine"] = tc.BLOCKS["mix_ffn"]  # pyright: ignore[reportIndexIssue]


def test_every_parity_test_is_collected():
    nodes = sorted({info.parity_test for info in tc.BLOCKS.values()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *nodes]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    for node in nodes:
        assert node in found.stdout
