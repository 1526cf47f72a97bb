import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenconv as tc
from tokenconv.grid import PrefixTokens, behind_prefix, frames_to_tokens, tokens_to_frames


def test_grid_is_row_major_behind_the_prefix():
    # prefix 9, then rows (1 2 3) and (4 5 6)
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5, 6]])
    fmap = tc.tokens_to_map(tokens[..., None], tc.TokenGrid((2, 3), num_prefix_tokens=1))
    assert fmap[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_video_grid_is_frame_major():
    fmap = tc.tokens_to_map(torch.arange(12).reshape(1, 12, 1), 2, 2, 3)
    assert fmap[0, 0].tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@given(
    size=st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple),
    prefix=st.integers(0, 3),
    batch=st.integers(1, 3),
    dim=st.integers(1, 4),
)
def test_unfold_inverts_fold(size, prefix, batch, dim):
    grid = tc.TokenGrid(size, prefix)
    x = torch.arange(batch * grid.num_tokens * dim).reshape(batch, grid.num_tokens, dim)
    back = tc.map_to_tokens(tc.tokens_to_map(x, grid), x[:, :prefix])
    assert torch.equal(back, x)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(3, 5), (1, 7), (2, 3, 4)], ids=str)
def test_fold_and_unfold_are_views(batch, size):
    x = torch.randn(batch, tc.TokenGrid(size).num_tokens, 6)
    fmap = tc.tokens_to_map(x, size)
    back = tc.map_to_tokens(fmap)
    assert fmap.data_ptr() == x.data_ptr()
    assert back.data_ptr() == x.data_ptr()
    assert back.is_contiguous()


@given(
    size=st.lists(st.integers(1, 4), min_size=2, max_size=3).map(tuple),
    prefix=st.integers(0, 2),
    batch=st.integers(1, 3),
)
def test_frames_are_the_maps_of_a_video_one_after_another(size, prefix, batch):
    grid = tc.TokenGrid(size, prefix)
    x = torch.arange(batch * grid.num_tokens * 2).reshape(batch, grid.num_tokens, 2)
    frames = tokens_to_frames(x, grid)
    fmap = tc.tokens_to_map(x, grid)
    assert torch.equal(frames, fmap.transpose(1, 2).flatten(0, 1) if len(size) == 3 else fmap)
    assert torch.equal(behind_prefix(frames_to_tokens(frames, grid), x, prefix), x)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4)], ids=str)
def test_frames_are_views_in_channels_last_memory(batch, size):
    grid = tc.TokenGrid(size)
    x = torch.randn(batch, grid.num_tokens, 6)
    frames = tokens_to_frames(x, grid)
    assert frames.data_ptr() == frames_to_tokens(frames, grid).data_ptr() == x.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert frames.stride(0) == 6 * size[-1] * size[-2]


def test_frames_of_another_size_and_width_are_tokens_of_their_own_image():
    grid = tc.TokenGrid((2, 4, 4), 1)
    small = torch.arange(3 * 2 * 5 * 2 * 2).reshape(6, 5, 2, 2)
    tokens = frames_to_tokens(small, grid)
    assert tokens.shape == (3, 8, 5)
    assert torch.equal(tokens[1, 4:], small[3].flatten(1).T)


def test_prefix_tokens_are_handed_on_or_become_zero_in_the_dtype_of_the_others():
    x, tokens = torch.randn(2, 5, 3), torch.randn(2, 4, 3).bfloat16()
    passed = behind_prefix(tokens, x, 2)
    assert passed.dtype == torch.bfloat16
    assert torch.equal(passed[:, :2], x[:, :2].bfloat16())
    assert torch.equal(passed[:, 2:], tokens)
    assert torch.equal(behind_prefix(tokens, x, 2, PrefixTokens.ACT), passed)
    assert not behind_prefix(tokens, x, 2, PrefixTokens.ZERO)[:, :2].any()
    assert behind_prefix(tokens, x, 0) is tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_folded_tokens_are_channels_last_also_for_one_image(batch):
    # The usual x.transpose(1, 2).view(B, C, H, W) has a batch stride of C for one image, and the
    # convolution behind it copies.
    x = torch.randn(batch, 15, 6)
    fmap = tc.tokens_to_map(x, 3, 5)
    assert fmap.is_contiguous(memory_format=torch.channels_last)
    assert fmap.stride(0) == 15 * 6


def test_fold_behind_a_prefix_is_a_view():
    x = torch.randn(2, 16, 6)
    fmap = tc.tokens_to_map(x, tc.TokenGrid((3, 5), 1))
    assert fmap.data_ptr() == x[:, 1:].data_ptr()


def test_a_grid_can_be_said_in_three_ways():
    grid = tc.TokenGrid((3, 5))
    assert tc.TokenGrid.of(3, 5) == tc.TokenGrid.of((3, 5)) == tc.TokenGrid.of(grid) == grid
    assert tc.TokenGrid.of(2, 3, 5) == tc.TokenGrid((2, 3, 5))
    assert tc.TokenGrid([3, 5]) == grid  # pyright: ignore[reportArgumentType]
    assert tc.TokenGrid((3, 5), 4).num_tokens == 19
    assert tc.TokenGrid((3, 5), 4).num_positions == 15


@pytest.mark.parametrize(
    "size", [(3,), (1, 2, 3, 4), (0, 3), (3, -1), (3.0, 5), (True, 5), 14, "ab"], ids=str
)
def test_bad_grid_sizes_are_refused(size):
    with pytest.raises(tc.GridError, match="expected"):
        tc.TokenGrid(size)


@pytest.mark.parametrize("prefix", [-1, 1.0, "1", True, None], ids=str)
def test_a_prefix_that_is_no_count_is_refused(prefix):
    with pytest.raises(tc.GridError, match=f"num_prefix_tokens >= 0, got {prefix!r}"):
        tc.TokenGrid((3, 5), prefix)


@pytest.mark.parametrize(
    ("tokens", "prefix", "advice"),
    [
        (16, 0, r"num_prefix_tokens=1\)"),
        (15, 1, r"pass TokenGrid\(\(3, 5\)\)"),
        (12, 0, "Pass the grid that these tokens were cut from"),
    ],
)
def test_wrong_token_count_says_what_was_expected_what_came_and_what_to_do(tokens, prefix, advice):
    grid = tc.TokenGrid((3, 5), prefix)
    message = rf"expected {15 + prefix} tokens \({prefix} prefix \+ 3\*5 grid\), got {tokens}"
    with pytest.raises(tc.GridError, match=message):
        grid.check(torch.zeros(2, tokens, 8))
    with pytest.raises(tc.GridError, match=advice):
        tc.tokens_to_map(torch.zeros(2, tokens, 8), grid)


def test_tokens_and_maps_of_other_rank_are_refused():
    with pytest.raises(tc.GridError, match=r"tokens \(B, N, C\)"):
        tc.tokens_to_map(torch.zeros(2, 8, 3, 5), 3, 5)
    with pytest.raises(tc.GridError, match=r"map \(B, C, H, W\)"):
        tc.map_to_tokens(torch.zeros(2, 15, 8))


def test_a_grid_with_holes_is_told_from_no_grid():
    sparse = tc.SparseGrid(torch.tensor([[[0, 0], [1, 1]]]))
    with pytest.raises(tc.GridError, match="expected tokens that fill one grid, got a SparseGrid"):
        tc.TokenGrid.of(sparse)
