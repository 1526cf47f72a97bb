"""Every family, every site: nothing changes at insertion, and nothing is lost."""

import copy
import json
import pickle
import re
from dataclasses import dataclass

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models._features import FeatureGetterNet
from torch import nn

import tokenconv as tc
from tokenconv.surgery import support
from tokenconv.surgery.edits import carry_out, edit_for, inserted_modules
from tokenconv.surgery.families import of_strides
from tokenconv.surgery.plans import rehearse
from tokenconv.surgery.sites import SITES, survey

BLOCK_FOR = {
    site: name
    for name, info in tc.BLOCKS.items()
    for site in info.sites
    if name != "conv_lora"  # which chooses by chance in training
}
EXACT_SITES = [site for site in SITES if site in BLOCK_FOR and "replace" not in site]


def everywhere(model, size):
    """One plan with a block at every site that the model offers; the names of its blocks."""
    found = survey(model, (3, *size))
    edits = [
        edit_for(found.meta, place, site, BLOCK_FOR[site], {})
        for block in found.blocks
        for site in EXACT_SITES
        for place in block.places.get(site, [])
    ]
    draft = tc.Plan(
        model_class=type(found.meta.get_submodule(found.root)).__name__,
        input_size=found.input_size,
        edits=tuple(edits),
    )
    return rehearse(found, draft), [block.name for block in found.blocks]


@dataclass
class Hybrid:
    """A model with a block at every site, what it was, and its output before."""

    model: nn.Module
    plain: nn.Module
    images: torch.Tensor
    before: torch.Tensor
    blocks: list[str]


@pytest.fixture(scope="module")
def hybrid(family):
    model = family.build()
    images = family.images()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        before = model(images)
    plan, blocks = everywhere(model, family.size)
    carry_out(model, plan.edits, plan)
    return Hybrid(model, plain, images, before, blocks)


def test_output_is_bit_equal_at_every_site(hybrid, disturb_):
    assert hybrid.before.isfinite().all()
    with torch.no_grad():
        assert torch.equal(hybrid.model(hybrid.images), hybrid.before)
        assert not torch.equal(
            disturb_(copy.deepcopy(hybrid.model), std=0.05)(hybrid.images), hybrid.before
        )


def test_removal_restores_the_model(hybrid, disturb_):
    model = tc.remove_(disturb_(copy.deepcopy(hybrid.model), std=0.05))
    assert str(model) == str(hybrid.plain)
    assert list(model.state_dict()) == list(hybrid.plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(hybrid.images), hybrid.before)


def test_keys_of_the_model_stay(hybrid):
    own, now = hybrid.plain.state_dict(), hybrid.model.state_dict()
    assert [key for key in now if key in own] == list(own)
    assert all(torch.equal(now[key], value) for key, value in own.items())
    names = dict(hybrid.model.named_parameters())
    assert all(name in names for name, _ in hybrid.plain.named_parameters())


def test_copies_and_pickles_compute_the_same(hybrid, disturb_):
    model = disturb_(copy.deepcopy(hybrid.model), std=0.05)
    with torch.no_grad():
        expected = model(hybrid.images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(hybrid.images), expected)
            assert str(tc.remove_(twin)) == str(hybrid.plain)
        assert torch.equal(model(hybrid.images), expected)


def test_gradients_reach_every_inserted_block(hybrid, disturb_):
    """From all that the blocks give, since class-token pooling hides the last one's grid."""
    model = disturb_(copy.deepcopy(hybrid.model), std=0.05)
    outputs = []
    for name in hybrid.blocks:
        model.get_submodule(name).register_forward_hook(lambda m, a, out: outputs.append(out))
    model(hybrid.images)
    sum(t.sin().sum() for out in outputs for t in flat([out]) if t.is_floating_point()).backward()
    for name, module in inserted_modules(model).items():
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            assert parameter.grad.abs().max() > 0, f"{name}.{key}"


def test_intermediate_features_are_equal(hybrid):
    if not hasattr(hybrid.plain, "forward_intermediates"):
        pytest.skip(f"{type(hybrid.plain).__name__} has no forward_intermediates")
    wrapped = []
    with torch.no_grad():
        expected = hybrid.plain.forward_intermediates(hybrid.images, intermediates_only=True)
        got = hybrid.model.forward_intermediates(hybrid.images, intermediates_only=True)
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert torch.equal(a, b)
        for model in (hybrid.model, hybrid.plain):
            wrapper = FeatureGetterNet(copy.deepcopy(model), out_indices=[-1])
            wrapped.append(wrapper(hybrid.images))
        for a, b in zip(*wrapped, strict=True):
            assert torch.equal(a, b)


def flat(features):
    return [
        t
        for f in features
        for t in (flat(f) if isinstance(f, (tuple, list)) else [f])
        if isinstance(t, torch.Tensor)
    ]


def test_tokens_are_in_the_order_of_the_image(family):
    """A changed corner of the image moves the tokens of that corner most, on every grid.

    LeViT's later stages and CSATv2's last one are left out: attention without a skip connection,
    and random global response norms, lead from one grid to the next there.
    """
    model = family.build()
    with torch.no_grad():  # attention spreads everything everywhere
        for name, parameter in model.named_parameters():
            if re.search(r"attn\.(proj|out)|token_mixer\.proj", name):
                parameter.zero_()
    plan = tc.plan(model, "mix_ffn", input_size=(3, *family.size))
    first = {}
    for edit in plan.edits:
        place = edit.place
        first.setdefault((place.source, place.halvings) if place.source is not None else place.dim,
                         edit)  # fmt: skip
    tc.insert_(model, plan)
    seen = {}
    for key, edit in first.items():
        if edit.site == "merge_conv":
            continue
        module = model.get_submodule(edit.inserted)
        module.register_forward_pre_hook(lambda m, a, key=key: seen.update({key: a}))
    images = family.images(1)
    changed = images.clone()
    rows, cols = (side // 4 for side in family.size)
    changed[..., -rows:, :cols] += 1  # bottom left
    with torch.no_grad():
        model(images)
        before = dict(seen)
        model(changed)
    for key, (x, *grid) in seen.items():
        grid = tc.TokenGrid.of(*grid)
        moved = (x - before[key][0]).abs().sum(-1)[0, grid.num_prefix_tokens :]
        heat = moved.reshape(grid.size)
        height, width = grid.size
        jumps = type(model).__name__ in ("CSATv2", "Levit") and key[1] in (1, 3)
        if jumps or min(height, width) < 4:
            continue
        corners = {
            (i, j): heat[i * (height // 2) : (i + 1) * (height // 2) or None,
                         j * (width // 2) : (j + 1) * (width // 2) or None].mean().item()
            for i in (0, 1) for j in (0, 1)
        }  # fmt: skip
        assert max(corners, key=corners.get) == (1, 0), (key, corners)


def test_a_mixer_in_place_of_attention(family):
    model = family.build()
    images = family.images()
    found = survey(model, (3, *family.size))
    if not any("replace_attn" in block.places for block in found.blocks):
        reasons = {block.refusals["replace_attn"] for block in found.blocks}
        assert all(
            re.search("no attention|windows|of the shape|maps|calls|times", why) for why in reasons
        )
        return
    plan = tc.plan(model, "separable_ffn", site="replace_attn", input_size=(3, *family.size))
    assert not plan.exact
    with pytest.raises(tc.SurgeryError, match="allow_change=True"):
        tc.insert_(model, plan)
    with torch.no_grad():
        before = model(images)
        tc.insert_(model, plan, allow_change=True)
        assert model(images).shape == before.shape
        tc.remove_(model)
        assert torch.equal(model(images), before)


def test_checkpointed_gradients_are_equal(hybrid, disturb_):
    model = disturb_(copy.deepcopy(hybrid.model), std=0.05).train()
    results = []
    for enable in (False, True):
        try:
            model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError):
            pytest.skip(f"{type(model).__name__} has no gradient checkpointing")
        state = copy.deepcopy(model.state_dict())  # BatchNorm statistics
        model.zero_grad()
        torch.manual_seed(0)  # drop path
        model(hybrid.images).sin().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append(grads)
        model.load_state_dict(state)
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-4, atol=1e-5)


# --- the sweep over all families ---


class Unknown(nn.Module):
    """Like one of timm, of a family that surgery does not know."""

    def __init__(self, lay_out):
        super().__init__()
        self.mlp, self.lay_out = Mlp(3, 6), lay_out
        self.pretrained_cfg = {"input_size": (3, 4, 6)}

    def forward(self, x):
        return self.mlp(self.lay_out(x))


def refuse(images):
    raise ValueError("too large")


@pytest.mark.parametrize(
    ("lay_out", "listed"),
    [
        (lambda x: x.flatten(2).mT, True),
        (lambda x: x.movedim(1, -1), True),
        (lambda x: x.mean((2, 3)), False),
        (refuse, True),  # not known to be none
    ],
    ids=["tokens", "maps", "vectors", "refuses"],
)
def test_what_sees_tokens_is_listed_though_no_family_is_known(monkeypatch, lay_out, listed):
    monkeypatch.setattr(timm, "create_model", lambda name: Unknown(lay_out))
    rows = support.sweep(["one", "another"])
    assert [(row.model_class, row.architectures, row.planned) for row in rows] == (
        [("Unknown", 2, 0)] if listed else []
    )
    assert all("Unknown is not a model that tokenconv can change" in r.reasons[""] for r in rows)


def test_a_sweep_says_what_cannot_be_planned_and_is_kept(tmp_path):
    rows = support.sweep(["test_convnext", "convnext_atto", "nest_tiny"])
    convnext, nest = rows
    assert (convnext.model_class, convnext.architectures, convnext.planned) == ("ConvNeXt", 2, 1)
    assert convnext.reasons["mix_ffn"].endswith("mlp.act sees maps (B, C, H, W), and no tokens")
    assert (nest.model_class, nest.architectures, nest.sites) == ("Nest", 1, {})
    assert "separate square blocks" in nest.reasons[""]
    support.write(tmp_path / "kept.json", rows)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["timm"] == timm.__version__
    assert [support.Row(**row) for row in kept["rows"]] == rows


def test_patches_are_counted_as_convolutions_count_them():
    embed = nn.Module()
    embed.proj = nn.Sequential(
        nn.Conv2d(3, 4, (7, 5), stride=(4, 3), padding=(3, 1)), nn.ReLU(),
        nn.Conv2d(4, 4, (3, 2), stride=2, padding=(1, 1)),
    )  # fmt: skip
    for size in ((57, 64), (90, 35)):
        images = torch.zeros(1, 3, *size)
        assert of_strides(embed, (images,), None) == embed.proj(images).shape[2:]
