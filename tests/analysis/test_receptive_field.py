"""How far a model looks, on models where it is known."""

import math

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.analysis import attention_distance, effective_receptive_field, radius


def ones_conv(side):
    conv = nn.Conv2d(1, 1, side, padding=side // 2, bias=False)
    nn.init.ones_(conv.weight)
    return conv


def test_one_convolution_looks_as_far_as_its_kernel():
    field = effective_receptive_field(ones_conv(3), torch.randn(5, 1, 9, 11))
    expected = torch.zeros(9, 11, dtype=torch.float64)
    expected[3:6, 4:7] = 1 / 9
    torch.testing.assert_close(field, expected)


def test_two_convolutions_look_twice_as_far_with_less_at_the_edge():
    """The kernel of both is (1, 2, 3, 2, 1) in each direction; energy is its square."""
    field = effective_receptive_field(
        nn.Sequential(ones_conv(3), ones_conv(3)), torch.randn(2, 1, 9, 9)
    )
    line = torch.tensor([1, 2, 3, 2, 1], dtype=torch.float64).square()
    expected = torch.zeros(9, 9, dtype=torch.float64)
    expected[2:7, 2:7] = torch.outer(line, line) / line.sum() ** 2
    torch.testing.assert_close(field, expected)


def test_between_pixels_it_is_the_mean_over_those_around_the_middle():
    torch.manual_seed(0)
    field = effective_receptive_field(ones_conv(3), torch.randn(4000, 1, 8, 9))
    expected = torch.zeros(8, 9, dtype=torch.float64)
    expected[2:6, 3:6] = 1
    expected[3:5, 3:6] = 2
    torch.testing.assert_close(field, expected / expected.sum(), rtol=0.1, atol=1e-9)


def test_tokens_are_looked_at_in_their_grid():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ones_conv(3)
            self.block = nn.Identity()

        def forward(self, x):
            prefix = x.new_zeros(len(x), 2, 1)
            return self.block(tc.map_to_tokens(self.conv(x), prefix)).mean(1)

    x = torch.randn(2, 1, 5, 7)
    grid = tc.TokenGrid((5, 7), num_prefix_tokens=2)
    field = effective_receptive_field(Tokens(), x, layer="block", grid=grid)
    torch.testing.assert_close(field, effective_receptive_field(ones_conv(3), x))


def test_maps_with_channels_last():
    class Last(nn.Module):
        def forward(self, x):
            return ones_conv(3)(x).movedim(1, -1)

    x = torch.randn(2, 1, 5, 7)
    field = effective_receptive_field(Last(), x, channels_last=True)
    torch.testing.assert_close(field, effective_receptive_field(ones_conv(3), x))


def test_modes_gradients_and_images_stay_as_they_were():
    model = nn.Sequential(ones_conv(3), nn.BatchNorm2d(1), nn.Dropout(0.5))
    model[1].eval()
    x = torch.randn(2, 1, 5, 5)
    effective_receptive_field(model, x)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad


@pytest.mark.parametrize(("share", "expected"), [(0.1, 0.5), (1 / 9, 0.5), (0.12, 1.5), (1, 1.5)])
def test_radius_of_a_box(share, expected):
    field = torch.zeros(9, 13, dtype=torch.float64)
    field[3:6, 5:8] = 1 / 9
    assert radius(field, share) == expected


def test_radius_between_pixels_and_of_a_share_that_is_none():
    field = torch.full((4, 4), 1 / 16, dtype=torch.float64)
    assert radius(field, 0.25) == 1
    assert radius(field, 0.26) == 2
    with pytest.raises(ValueError, match="expected 0 < share <= 1, got 0"):
        radius(field, 0)


# --- attention ---


def vit():
    return timm.create_model("test_vit", img_size=(48, 80), num_classes=3)


GRID = tc.TokenGrid((3, 5), num_prefix_tokens=1)


def mean_distance(rows, columns):
    places = [(r, c) for r in range(rows) for c in range(columns)]
    return sum(math.dist(a, b) for a in places for b in places) / len(places) ** 2


def test_attention_to_all_alike_is_the_mean_distance():
    model = vit()
    for block in model.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    found = attention_distance(model, torch.randn(2, 3, 48, 80), GRID)
    assert len(found) == len(model.blocks)
    for heads in found:
        expected = torch.full((model.blocks[0].attn.num_heads,), mean_distance(3, 5))
        torch.testing.assert_close(heads, expected.double())


class OneHead(nn.Module):
    """Attention with queries and keys that are given."""

    def __init__(self, query, mask=None, scale=None):
        super().__init__()
        self.query, self.mask, self.scale = query, mask, scale

    def forward(self, x):
        q = self.query
        return nn.functional.scaled_dot_product_attention(q, q, q, self.mask, scale=self.scale)


def test_attention_to_oneself_is_no_distance_and_a_scale_counts():
    query = 50 * torch.eye(16).expand(1, 1, -1, -1)
    (near,) = attention_distance(OneHead(query), torch.zeros(1), GRID)
    assert near.abs().max() < 1e-12
    (far,) = attention_distance(OneHead(query, scale=1e-9), torch.zeros(1), GRID)
    assert far.item() == pytest.approx(mean_distance(3, 5), rel=1e-5)


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_count(boolean):
    mask = torch.eye(16, dtype=torch.bool)
    mask[0] = mask[:, 0] = True
    if not boolean:
        mask = torch.where(mask, 0.0, -torch.inf)
    (found,) = attention_distance(OneHead(torch.randn(1, 1, 16, 4), mask), torch.zeros(1), GRID)
    assert found.abs().max() < 1e-12


def test_attention_among_other_tokens_is_told():
    with pytest.raises(tc.AnalysisError, match=r"among 36 tokens, saw queries x keys: 16x16"):
        attention_distance(vit(), torch.randn(1, 3, 48, 80), (6, 6))
    with pytest.raises(tc.AnalysisError, match="none at all"):
        attention_distance(ones_conv(3), torch.randn(1, 1, 5, 5), (5, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "blocks.9"}, "no layer 'blocks.9'"),
        ({"layer": "head_drop_"}, "no layer 'head_drop_'"),
        ({"layer": "blocks.0"}, r"expected maps \(B, C, H, W\), got \(1, 16, 64\); tokens need"),
        ({"layer": "patch_embed.proj", "grid": (3, 5)}, r"expected tokens .* got \(1, 64, 3, 5\)"),
        ({"layer": "blocks.0", "grid": (4, 4, 4)}, "expected 64 tokens"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(vit(), torch.randn(1, 3, 48, 80), **arguments)


def test_a_layer_that_does_not_run_is_told():
    model = ones_conv(3)
    model.later = ones_conv(3)
    with pytest.raises(tc.AnalysisError, match="later does not run in a forward pass"):
        effective_receptive_field(model, torch.randn(1, 1, 5, 5), layer="later")


def test_features_that_no_pixel_moves():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 1, 3, 3, requires_grad=True)

    with pytest.raises(tc.AnalysisError, match="no gradient reaches the images"):
        effective_receptive_field(Constant(), torch.randn(1, 1, 5, 5))


def test_a_convolution_in_the_mlp_lets_a_vit_look_at_its_neighbours():
    """Attention without weights looks nowhere in particular; the inserted kernel does."""
    torch.manual_seed(0)
    model = vit().eval()
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    x = torch.randn(8, 3, 48, 80)
    before = effective_receptive_field(model, x, grid=GRID)
    tc.insert_(model, "mix_ffn", blocks=0)
    same = effective_receptive_field(model, x, grid=GRID)
    torch.testing.assert_close(same, before)
    nn.init.ones_(model.blocks[0].mlp.act.before.weight)
    after = effective_receptive_field(model, x, grid=GRID)
    touched = after.view(3, 16, 5, 16).sum((1, 3)) > 1e-9
    assert before.view(3, 16, 5, 16).sum((1, 3)).gt(1e-9).sum() == 1
    assert touched.tolist() == [[False, True, True, True, False]] * 3


class Shared(nn.Module):
    """Four query heads, two of keys."""

    def __init__(self, query, key):
        super().__init__()
        self.query, self.key = query, key

    def forward(self, x):
        q, k = self.query, self.key
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def test_query_heads_that_share_keys():
    query, key = torch.randn(1, 4, 15, 8), torch.randn(1, 2, 15, 8)
    (found,) = attention_distance(Shared(query, key), torch.zeros(1), (3, 5))
    for head in range(4):
        pair = Shared(query[:, head : head + 1], key[:, head // 2 : head // 2 + 1])
        (expected,) = attention_distance(pair, torch.zeros(1), (3, 5))
        torch.testing.assert_close(found[head : head + 1], expected)


@pytest.mark.parametrize("by_name", [True, False])
def test_attention_to_the_past(by_name):
    class Causal(nn.Module):
        def forward(self, x):
            q = torch.zeros(1, 1, 3, 2)
            if by_name:
                return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            return nn.functional.scaled_dot_product_attention(q, q, q, None, 0.0, True)

    (found,) = attention_distance(Causal(), torch.zeros(1), (1, 3))
    assert found.item() == pytest.approx((0 + 1 / 2 + (1 + 2) / 3) / 3)


def test_a_bias_of_positions_counts():
    bias = torch.full((1, 1, 6, 6), -1e9)
    bias[0, 0, torch.arange(6), torch.arange(6).flip(0)] = 0  # each to its mirror image
    (found,) = attention_distance(OneHead(torch.randn(1, 1, 6, 4), bias), torch.zeros(1), (2, 3))
    expected = sum(math.dist(divmod(i, 3), divmod(5 - i, 3)) for i in range(6)) / 6
    assert found.item() == pytest.approx(expected)


def test_a_layer_is_seen_before_others_write_into_it():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(1, 3, 9, 9)
    alone = effective_receptive_field(conv, x)
    model = nn.Sequential(conv, nn.ReLU(inplace=True))
    torch.testing.assert_close(effective_receptive_field(model, x, layer="0"), alone)


def test_all_images_count():
    query = 3 * torch.randn(2, 1, 16, 4)
    (both,) = attention_distance(OneHead(query), torch.zeros(1), GRID)
    each = [attention_distance(OneHead(q[None]), torch.zeros(1), GRID)[0] for q in query]
    torch.testing.assert_close(both, sum(each) / 2)


def test_the_last_run_of_a_layer_is_looked_at():
    conv = ones_conv(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(self.conv(x))

    x = torch.randn(2, 1, 9, 9)
    expected = effective_receptive_field(nn.Sequential(conv, conv), x)
    torch.testing.assert_close(effective_receptive_field(Twice(), x, layer="conv"), expected)


@pytest.mark.parametrize("side", [5, 7, 9, 11, 13])
def test_radius_is_not_a_matter_of_rounding(side):
    field = torch.full((side, side), 1 / side**2, dtype=torch.float64)
    for within in range(1, side, 2):
        assert radius(field, within**2 / side**2) == within / 2
