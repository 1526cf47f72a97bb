"""Hiera, whose tokens lie in the order of its mask units and not in that of the image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.hiera import Hiera

import tokenconv as tc
from tokenconv.surgery.layouts import MaskUnits


@pytest.fixture(params=["hiera", "hiera, two pools"])
def case(request, families):
    return families[request.param]


class Seen(torch.nn.Module):
    """Keeps the map that it is called with, and returns the tokens unchanged."""

    def forward(self, x, rows, cols):
        self.map = x.unflatten(1, (rows, cols)).permute(0, 3, 1, 2)
        return x


def test_pooling_in_the_order_of_mask_units_is_pooling_of_maps(case):
    model = case.build()
    pools = [i for i, block in enumerate(model.blocks) if block.attn.q_stride > 1]
    assert pools
    for index in pools:
        rows, cols = model.reroll.schedule[index - 1][1]
        x = torch.randn(2, rows * cols, 8)
        before, after = Seen(), Seen()
        given = MaskUnits(model.reroll, index - 1).call(before, x)
        assert torch.equal(given, x)
        pooled = x.view(2, model.blocks[index].attn.q_stride, -1, 8).amax(dim=1)  # as timm does
        assert torch.equal(MaskUnits(model.reroll, index).call(after, pooled), pooled)
        assert torch.equal(after.map, F.max_pool2d(before.map, 2))


def test_the_first_block_sees_the_embedding_as_a_map(case, disturb_):
    model = case.build()
    tc.insert_(model, "peg", blocks=0, site="before_block", input_size=(3, *case.size))
    disturb_(model)
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    proj = model.blocks[0].before.proj
    images = case.images()
    with torch.no_grad():
        model(images)
        fmap = model._pos_embed(model.patch_embed(images))
        rows, cols = model.tokens_spatial_shape
        fmap = fmap.transpose(1, 2).unflatten(2, (rows, cols))
        out = fmap + F.conv2d(fmap, proj.weight, proj.bias, padding=1, groups=proj.dim)
        expected = model.unroll(out.flatten(2).transpose(1, 2))
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_a_plan_survives_json_and_a_checkpoint(case, disturb_, tmp_path):
    base = case.build()
    plan = tc.plan(base, "mix_ffn", input_size=(3, *case.size))
    assert tc.Plan.from_json(plan.to_json()) == plan
    model = disturb_(tc.insert_(copy.deepcopy(base), plan))
    tc.save(model, tmp_path)
    with torch.no_grad():
        loaded = tc.load_(base, tmp_path)(case.images())
        assert torch.equal(loaded, model(case.images()))


def test_the_size_is_that_of_the_model(case):
    assert tc.plan(case.build(), "mix_ffn").input_size == (3, *case.size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_drop_rate": 0.4}, "build the model with patch_drop_rate=0"),
        ({"img_size": (4, 64, 64), "patch_kernel": (3, 7, 7), "patch_stride": (2, 4, 4),
          "patch_padding": (1, 3, 3), "q_stride": (1, 2, 2), "mask_unit_size": (1, 8, 8)},
         r"inputs of size \(4, 64, 64\); expected images"),
    ],
    ids=["dropout", "video"],
)  # fmt: skip
def test_other_kinds_of_hiera_are_refused_at_once(change, message):
    model = Hiera(**{"stages": (1, 2, 2, 1), "embed_dim": 16, "img_size": (64, 96), **change})
    with pytest.raises(tc.SurgeryError, match=message):
        tc.insert_(model, "mix_ffn")


@pytest.mark.parametrize("site", ["before_block", "before_attn", "after_block"])
def test_every_block_has_its_order_also_where_it_pools(case, site):
    model = case.build()
    plan = tc.plan(model, "peg", site=site, input_size=(3, *case.size))
    assert len(plan.edits) == len(model.blocks)
    assert not plan.skipped


def test_what_hiera_cannot_have_is_refused(case):
    model = tc.insert_(case.build(), "mix_ffn", input_size=(3, *case.size))
    mask = torch.zeros(2, model.mask_spatial_shape[0] * model.mask_spatial_shape[1])
    mask[:, ::2] = 1
    with pytest.raises(tc.GridError, match="or masked, where a convolution cannot run in Hiera"):
        model.forward_features(case.images(), mask=mask.bool())
    with pytest.raises(tc.SurgeryError, match="in the order of mask units"):
        tc.freeze_grid_(model, case.size)
    with pytest.raises(tc.SurgeryError, match="not all see tokens of one grid"):
        tc.keep_tokens(model, mask.bool())
