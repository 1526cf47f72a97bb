"""What takes the place of a model's own attention, or of its patch embedding."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn

import tokenconv as tc
from tokenconv.surgery.edits import inserted_modules
from tokenconv.surgery.fragments import ReplacedPatchEmbed
from tokenconv.surgery.sites import survey

MIXERS = [name for name, info in tc.BLOCKS.items() if "replace_attn" in info.sites]
STEMS = [name for name, info in tc.BLOCKS.items() if "replace_patch_embed" in info.sites]
SIZES = {"vit": (48, 80), "dynamic_vit": (48, 80), "deit3": (48, 80), "pvt": (64, 96)}


def images_of(size, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator)


@pytest.fixture
def deit3():
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": (48, 80), "init_values": 0.5}
    return timm.create_model("deit3_small_patch16_224", num_classes=7, **sizes).eval()


@pytest.fixture
def build(request, families):
    """A model by the name of its fixture or of its family, and its images."""

    def make(name):
        if name in SIZES:
            return request.getfixturevalue(name), images_of(SIZES[name])
        return families[name].build(), families[name].images()

    return make


def check_replacement(model, images, block, site, tmp_path, **kwargs):
    """Another output of the same shape, trained, saved, loaded, and gone without a trace."""
    plain, size = copy.deepcopy(model), tuple(images.shape[1:])
    with torch.no_grad():
        before = model(images)
    plan = tc.plan(model, block, site=site, input_size=size, **kwargs)
    assert not plan.exact
    assert "CHANGES THE OUTPUT" in str(plan)
    with pytest.raises(tc.SurgeryError, match="pass allow_change=True"):
        tc.insert_(model, plan)
    params = sum(p.numel() for p in model.parameters())
    tc.insert_(model, plan, allow_change=True)
    assert sum(p.numel() for p in model.parameters()) - params == plan.added_params
    model.load_state_dict(plain.state_dict(), strict=True)
    model.train()(images).sin().sum().backward()
    inserted = inserted_modules(model)
    assert len(inserted) == len(plan.edits)
    missing = {n for m in inserted.values() for n, p in m.named_parameters() if p.grad is None}
    assert not missing
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        after = model.eval()(images)
        assert after.shape == before.shape
        assert after.isfinite().all()
        assert not torch.allclose(after, before)
        tc.save(model, tmp_path)
        assert torch.equal(tc.load_(copy.deepcopy(plain), tmp_path)(images), after)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), after)
        assert torch.equal(tc.remove_(model)(images), before)
    assert list(model.state_dict()) == list(plain.state_dict())


# --- attention ---


@pytest.mark.parametrize("name", ["vit", "deit3", "pvt"])
@pytest.mark.parametrize("block", MIXERS)
def test_a_mixer_in_place_of_attention(build, name, block, tmp_path):
    model, images = build(name)
    for module in model.modules():
        if hasattr(module, "global_pool") and isinstance(module.global_pool, str):
            module.global_pool = "avg"  # so that every block reaches the logits
    check_replacement(model, images, block, "replace_attn", tmp_path, blocks=1)


@pytest.mark.parametrize("block", MIXERS)
@torch.no_grad()
def test_a_mixer_is_told_the_grid_and_no_mask(dynamic_vit, block):
    model = tc.insert_(dynamic_vit, block, site="replace_attn", allow_change=True).eval()
    images = images_of((64, 32))
    tokens = 1 + 4 * 2
    mask = torch.eye(tokens, dtype=torch.bool)
    assert torch.equal(model(images, attn_mask=mask), model(images))
    mixer = model.blocks[0].attn.instead
    x = torch.randn(2, tokens, 48)
    given = []
    mixer.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    model(images)
    assert given == [tc.TokenGrid((4, 2), 1)]
    assert mixer(x, tc.TokenGrid((4, 2), 1)).shape == x.shape


# --- patch embeddings ---


def stem_fits(model, images, block):
    """Whether a stem makes as many tokens as the model's own embedding."""
    (embed,) = survey(model, tuple(images.shape[1:])).sizes.values()
    return tc.create_block(block, 16)(images)[1].size == embed


EMBEDS = ["vit", "dynamic_vit", "pvt", "eva, dinov3", "xcit", "swin_transformer", "metaformer"]
"""Tokens, a map (B, H, W, C), tokens and their size, a map (B, C, H, W)."""


IN_PLACE = [(block, name) for block in STEMS for name in ("vit", "pvt")] + [
    ("early_conv", "dynamic_vit"),
    ("xcit_stem", "eva, dinov3"),
    ("convnext_stem", "swin_transformer"),
    ("patch_embed", "metaformer"),
]


@pytest.mark.parametrize(("block", "name"), IN_PLACE)
def test_a_stem_in_place_of_the_patch_embedding(build, name, block, tmp_path):
    model, images = build(name)
    if stem_fits(model, images, block):
        check_replacement(model, images, block, "replace_patch_embed", tmp_path)
    else:
        message = rf"{block} in place of \w+: expected \d+\*\d+ tokens of .*, got .*other strides"
        with pytest.raises(tc.SurgeryError, match=message):
            tc.plan(model, block, input_size=tuple(images.shape[1:]))


@pytest.mark.parametrize("block", STEMS)
def test_every_stem_fits_somewhere(build, block):
    assert any(stem_fits(*build(name), block) for name in ("vit", "pvt"))


@pytest.mark.parametrize("name", EMBEDS)
@torch.no_grad()
def test_a_stem_computes_what_the_embedding_did(build, name):
    """With the weights of the embedding, where that is one convolution and a norm or none."""
    model, images = build(name)
    (edit,) = survey(model, tuple(images.shape[1:])).embeds
    own = model.get_submodule(edit.name)
    conv = next((m for m in own.modules() if isinstance(m, nn.Conv2d)), None)
    if name == "xcit":
        block, kwargs = "xcit_stem", {"patch_size": 8}
        values = own.proj.state_dict()
    else:
        norm = getattr(own, "norm", None)
        block = "metaformer_stem" if name == "metaformer" else "patch_embed"
        (side, _), (stride, _), (around, _) = conv.kernel_size, conv.stride, conv.padding
        kwargs = {"kernel_size": side, "stride": stride, "padding": around}
        if not getattr(norm, "normalized_shape", None):
            kwargs["norm"] = False
        values = own.state_dict()
    before = model(images)
    intermediates = model.forward_intermediates(images, intermediates_only=True)
    tc.insert_(model, block, input_size=tuple(images.shape[1:]), allow_change=True, **kwargs)
    (stem,) = inserted_modules(model).values()
    loaded = dict(zip(stem.body.state_dict(), values.values(), strict=True))
    stem.body.load_state_dict(loaded)
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        model.forward_intermediates(images, intermediates_only=True), intermediates, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_sizes_are_taken_as_before(dynamic_vit):
    model = tc.insert_(dynamic_vit, "xcit_stem", allow_change=True)
    assert isinstance(model.patch_embed, ReplacedPatchEmbed)
    for size in ((64, 128), (80, 48)):
        fmap = model.forward_intermediates(images_of(size), intermediates_only=True)[-1]
        assert fmap.shape[2:] == (size[0] // 16, size[1] // 16)
    with pytest.raises(tc.GridError, match=r"expected 3\*4 tokens of an image of 50x64, got 4\*4"):
        model(images_of((50, 64)))


def test_a_stem_and_blocks_go_into_one_model(dynamic_vit, disturb_, tmp_path):
    plain, images = copy.deepcopy(dynamic_vit), images_of((64, 32))
    plan = tc.plan(dynamic_vit, "early_conv", widths=(4, 8, 12, 16))
    plan = plan + tc.plan(dynamic_vit, "mix_ffn", site="before_act")
    plan = plan + tc.plan(dynamic_vit, "peg", blocks=0)
    model = disturb_(tc.insert_(dynamic_vit, tc.Plan.from_json(plan.to_json()), allow_change=True))
    with torch.no_grad():
        after = model(images)
        tc.save(model, tmp_path)
        assert torch.equal(tc.load_(copy.deepcopy(plain), tmp_path)(images), after)
        tc.fold_(model)
        torch.testing.assert_close(model(images), after, rtol=1e-4, atol=1e-4)
        assert torch.equal(tc.remove_(model)(images), plain(images))


@torch.no_grad()
def test_a_stem_is_traced_by_fx(dynamic_vit):
    model = tc.insert_(dynamic_vit, "early_conv", allow_change=True)
    images = images_of((48, 80))
    extracted = create_feature_extractor(model, ["norm"])(images)["norm"]
    torch.testing.assert_close(extracted, model.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@torch.no_grad()
def test_a_stem_compiles_without_graph_break(dynamic_vit):
    model = tc.insert_(dynamic_vit, "early_conv", allow_change=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((48, 80), (64, 32)):
        images = images_of(size)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


def test_the_channels_of_the_images_are_those_of_the_model():
    model = timm.create_model("test_vit", in_chans=5).eval()
    tc.insert_(model, "early_conv", allow_change=True)
    assert model.patch_embed.instead.in_chans == 5
    assert model(torch.randn(2, 5, 160, 160)).shape == (2, 1000)


def test_an_unfilled_copy_has_no_attributes_of_the_embedding():
    """Such as one that a debugger or another copier than Python's looks at."""
    assert not hasattr(ReplacedPatchEmbed.__new__(ReplacedPatchEmbed), "img_size")


@pytest.mark.parametrize(
    ("name", "block", "kwargs", "message"),
    [
        ("pvt", "early_conv", {}, r"expected 16\*24 tokens of an image of 64x96, got 4\*6"),
        ("vit", "early_conv", {"in_chans": 4}, r"does not run: expected a map \(B, 4, H, W\)"),
        ("vit", "early_conv", {"width": 4}, "does not take these arguments"),
        ("vit", "early_conv", {"blocks": 1}, r"the model has blocks 0 to 0, asked for \[1\]"),
        ("vit", "early_conv", {"site": "before_block"}, "it goes replace_patch_embed"),
        ("vit", "spatial_prior", {}, "goes into no live model"),
        ("vit", "mix_ffn", {"site": "replace_patch_embed"}, "has no form for replace_patch_embed"),
        ("naflexvit", "early_conv", {}, "embeds is not given images alone"),
        ("convnext", "convnext_stem", {}, "no patch embedding is known of this ConvNeXt"),
        ("crossvit", "early_conv", {"blocks": 1}, r"patch_embed\.1 is not given the image"),
        ("tnt", "early_conv", {}, "pixel_embed does not return the .* tokens of its grid alone"),
    ],
)
def test_what_does_not_fit_is_refused(build, name, block, kwargs, message):
    model, images = build(name)
    before = model.state_dict()
    with pytest.raises((tc.SurgeryError, ValueError), match=message):
        tc.plan(model, block, input_size=tuple(images.shape[1:]), **kwargs)
    assert list(model.state_dict()) == list(before)


def test_a_plan_for_another_embedding_is_refused(vit, dynamic_vit):
    plan = tc.plan(vit, "early_conv", allow_change=True)
    with pytest.raises(tc.SurgeryError, match="or its grid is made in another way"):
        tc.insert_(dynamic_vit, plan)
