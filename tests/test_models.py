"""Hybrids as timm architectures: built, loaded, saved and wrapped as their bases are."""

import copy
import inspect
import json
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import load_checkpoint, save_for_hf
from timm.models._features import FeatureGetterNet, FeatureListNet
from torch import nn

import tokenconv as tc
from tokenconv import models
from tokenconv.surgery.edits import inserted_modules

VIT = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": (48, 80)}
PVT = {"depths": (1, 1, 2, 1), "embed_dims": (8, 16, 40, 32), "num_heads": (1, 2, 5, 4)}
SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 4}
SIZES = {"vit": (48, 80), "pvt": (64, 96)}
HYBRIDS = [
    pytest.param(base, f"{base}_{block}", kwargs, SIZES[base[:3]], id=f"{base[:3]} {block}")
    for base, kwargs, block in (
        ("vit_tiny_patch16_224", VIT, "mix_ffn"),
        ("vit_tiny_patch16_224", VIT, "separable_ffn"),
        ("pvt_v2_b0", PVT, "mix_ffn"),
        ("pvt_v2_b0", PVT, "peg"),
        ("vit_tiny_patch16_224", VIT, "leff"),
        ("pvt_v2_b0", PVT, "conv_glu"),
    )
]
each_hybrid = pytest.mark.parametrize(("base", "name", "kwargs", "size"), HYBRIDS)
VIT_MIX = "vit_tiny_patch16_224_mix_ffn"
newest_timm = pytest.mark.needs(
    "timm", "1.0.31", "keeps no arguments of a model, and finds weights and features otherwise"
)


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def images(size=(48, 80), channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def randomize_(model):
    """Give the inserted blocks values, so that what they do is seen."""
    torch.manual_seed(5)
    for module in inserted_modules(model).values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model, x):
    with torch.no_grad():
        return model(x)


def runs_of(model):
    """How often each inserted block has run, from now on; of an added kernel, its convolution."""
    names = [name.removesuffix(".added") for name in inserted_modules(model)]
    counts = dict.fromkeys(names, 0)

    def count(name):
        def hook(module, args, out):
            counts[name] += 1

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(count(name))
    return counts


def same(ours, others):
    assert len(ours) == len(others) > 0
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


# --- names ---


def test_registered_names():
    assert timm.list_models("vit_*_patch16_224_mix_ffn") == [
        f"vit_{size}_patch16_224_mix_ffn" for size in ("base", "small", "tiny")
    ]
    others = timm.list_models("*_mix_ffn", exclude_filters="vit_*_patch16*")
    assert others == [
        *(f"deit3_{size}_patch16_224_mix_ffn" for size in ("base", "medium", "small")),
        *(f"pvt_v2_{b}_mix_ffn" for b in ("b0", "b1", "b2_li", "b2", "b3", "b4", "b5")),
        *(f"vit_{size}_patch14_reg4_dinov2_mix_ffn" for size in ("base", "small")),
    ]
    assert set(timm.list_models(module="models")) == {*models.HYBRIDS, "tokenconv"}
    assert len(models.HYBRIDS) == 75
    for name, (base, request) in models.HYBRIDS.items():
        assert timm.is_model(name)
        assert name == f"{base}_{request['block']}"
    assert timm.models.get_arch_name(f"{VIT_MIX}.augreg_in21k") == VIT_MIX


SMALLEST = ("vit_tiny", "deit3_small", "vit_small_patch14", "pvt_v2_b2_li")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith(SMALLEST) else pytest.mark.slow)
        for name in models.HYBRIDS
    ],
)
def test_every_hybrid_can_be_built_and_is_exact(name):
    stages = {"depths": (1, 2, 1, 1)} if name.startswith("pvt") else {"depth": 2}
    with torch.device("meta"):
        model = timm.create_model(name, **stages)
    plan = tc.surgery.edits.insertion_of(model).plan
    assert plan.exact
    per_stage = name.endswith("_peg")
    blocks = (4 if per_stage else 5) if name.startswith("pvt") else (1 if per_stage else 2)
    assert len(plan.edits) == blocks


def test_entrypoints_are_functions_of_the_module():
    for name in (*models.HYBRIDS, "tokenconv"):
        entrypoint = timm.model_entrypoint(name)
        assert entrypoint is getattr(models, name)
        assert name in models.__all__
        assert (entrypoint.__module__, entrypoint.__qualname__) == ("tokenconv.models", name)
        assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint
        assert inspect.signature(entrypoint).parameters["pretrained"].default is False
        assert inspect.getdoc(entrypoint)


def test_configs_are_those_of_the_base():
    default = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    ours = timm.get_pretrained_cfg(VIT_MIX)
    assert ours.architecture == VIT_MIX
    assert ours.to_dict() == {**default.to_dict(), "architecture": VIT_MIX}
    assert ours.hf_hub_id == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    for name, (base, _) in models.HYBRIDS.items():
        assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(base).tag
    model = create(VIT_MIX, depth=2)
    assert model.pretrained_cfg == ours.to_dict()
    assert model.default_cfg is model.pretrained_cfg
    tagged = create(f"{VIT_MIX}.augreg_in21k", depth=2)
    assert tagged.pretrained_cfg["tag"] == "augreg_in21k"
    assert tagged.num_classes == 21843


def test_import_is_what_registers():
    code = (
        "import sys, tokenconv; assert 'timm' not in sys.modules; import tokenconv.models, timm; "
        f"assert timm.is_model('{VIT_MIX}')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- built and called ---


@each_hybrid
def test_the_output_is_that_of_the_base(base, name, kwargs, size):
    plain, hybrid = create(base, **kwargs), create(name, **kwargs)
    state = plain.state_dict()
    ours = hybrid.state_dict()
    assert len(ours) > len(state)
    assert all(torch.equal(ours[key], value) for key, value in state.items())
    counts = runs_of(hybrid)
    assert torch.equal(logits(hybrid, images(size)), logits(plain, images(size)))
    assert set(counts.values()) == {1}
    assert type(hybrid) is type(plain)
    moved = logits(randomize_(hybrid), images(size))
    assert not torch.allclose(moved, logits(plain, images(size)), atol=1e-3)


@newest_timm
@pytest.mark.parametrize(
    "asked",
    [
        {"num_classes": 7},
        {"num_classes": 0},
        {"in_chans": 4},
        {"dynamic_img_size": True},
        {"global_pool": "avg"},
        {"qk_norm": True, "init_values": 1e-5},
    ],
    ids=str,
)
def test_arguments_of_the_base_pass(asked):
    kwargs = {**VIT, **asked}
    plain, hybrid = create("vit_tiny_patch16_224", **kwargs), create(VIT_MIX, **kwargs)
    x = images((80, 48) if "dynamic_img_size" in asked else (48, 80), asked.get("in_chans", 3))
    assert torch.equal(logits(hybrid, x), logits(plain, x))
    for key, value in asked.items():
        assert getattr(hybrid, key, value) == value
    assert hybrid._model_args == plain._model_args


def test_drop_path_is_that_of_the_base():
    plain = create("vit_tiny_patch16_224", **VIT, drop_path_rate=0.5).train()
    hybrid = create(VIT_MIX, **VIT, drop_path_rate=0.5).train()
    outputs = []
    for model in (plain, hybrid):
        torch.manual_seed(3)
        outputs.append(logits(model, images()))
    assert torch.equal(*outputs)
    assert not torch.equal(logits(hybrid, images()), logits(hybrid, images()))


def test_arguments_of_the_block():
    model = create(VIT_MIX, **VIT, tokenconv={"blocks": [1], "kernel_size": 5})
    assert list(inserted_modules(model)) == ["blocks.1.mlp.act.before"]
    assert model.blocks[1].mlp.act.before.kernel_size == 5


def test_any_architecture_takes_blocks():
    plain = create("vit_tiny_patch16_224", **VIT)
    request = {"block": "mix_ffn", "blocks": [0, 2]}
    hybrid = create("tokenconv", base="vit_tiny_patch16_224", tokenconv=request, **VIT)
    assert [n.split(".")[1] for n in inserted_modules(hybrid)] == ["0", "2"]
    plan = tc.plan(plain, "peg", blocks=0) + tc.plan(plain, "mix_ffn", blocks=[1, 2])
    by_plan = create("tokenconv", base="vit_tiny_patch16_224", tokenconv=plan.to_json(), **VIT)
    assert list(inserted_modules(by_plan)) == [edit.inserted for edit in plan.edits]
    for model in (hybrid, by_plan):
        assert torch.equal(logits(model, images()), logits(plain, images()))
        assert model.pretrained_cfg["architecture"] == "tokenconv"
    tagged = create("tokenconv", base="vit_tiny_patch16_224.augreg_in21k", tokenconv=request, **VIT)
    assert tagged.num_classes == 21843


def test_mistakes_are_named():
    request = {"block": "mix_ffn"}
    for wrong in ("vit_tiny_patch16_244", VIT_MIX):
        with pytest.raises(tc.UnknownNameError, match=f"base '{wrong}'.*vit_tiny_patch16_224 or"):
            timm.create_model("tokenconv", base=wrong, tokenconv=request)
    with pytest.raises(tc.UnknownNameError, match="block 'mixffn': did you mean mix_ffn"):
        timm.create_model(
            "tokenconv", base="vit_tiny_patch16_224", tokenconv={"block": "mixffn"}, **VIT
        )
    for wrong in ({"blocks": [1]}, ["mix_ffn"], 3):
        with pytest.raises(tc.SurgeryError, match=r"expected tokenconv=.*got"):
            timm.create_model("tokenconv", base="vit_tiny_patch16_224", tokenconv=wrong)
    with pytest.raises(tc.SurgeryError, match="no plan of tokenconv"):
        timm.create_model("tokenconv", base="vit_tiny_patch16_224", tokenconv="mix_ffn")
    for wrong in ({"block": "peg"}, "{}"):
        with pytest.raises(
            tc.SurgeryError, match=r'takes arguments of mix_ffn.*create "tokenconv"'
        ):
            timm.create_model(VIT_MIX, tokenconv=wrong)
    with pytest.raises(tc.SurgeryError, match="not a model that tokenconv can change"):
        timm.create_model("tokenconv", base="resnet18", tokenconv=request)
    with pytest.raises(TypeError, match="'base'"):
        timm.create_model("tokenconv", tokenconv=request)


# --- weights ---


@pytest.fixture
def checkpoint(tmp_path):
    """Save a model's weights with values of their own; returns the overlay that loads them."""

    def save(model, name="weights.pth"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        torch.save(model.state_dict(), tmp_path / name)
        size = (3, *model.patch_embed.img_size) if hasattr(model.patch_embed, "img_size") else None
        return {
            "file": str(tmp_path / name),
            "input_size": size or (3, 224, 224),
            "num_classes": model.num_classes,
        }

    return save


@newest_timm
@each_hybrid
def test_pretrained_loads_the_base_then_inserts(base, name, kwargs, size, checkpoint):
    plain = create(base, seed=1, **kwargs, num_classes=9)
    overlay = checkpoint(plain)
    hybrid = create(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs, num_classes=9)
    assert torch.equal(logits(hybrid, images(size)), logits(plain, images(size)))
    assert hybrid.pretrained_cfg["architecture"] == name
    assert hybrid.pretrained_cfg["file"] == overlay["file"]
    by_path = create(name, checkpoint_path=overlay["file"], **kwargs, num_classes=9)
    assert torch.equal(logits(by_path, images(size)), logits(plain, images(size)))


def test_pretrained_weights_are_converted_as_those_of_the_base(checkpoint, tmp_path):
    """Facebook's names for LayerScale, which only DeiT's own filter knows."""
    base = "deit3_small_patch16_224"
    plain = create(base, seed=1, **VIT)
    overlay = checkpoint(plain)
    renamed = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
        for k, v in plain.state_dict().items()
    }
    torch.save(renamed, overlay["file"])
    hybrid = create(f"{base}_mix_ffn", pretrained=True, pretrained_cfg_overlay=overlay, **VIT)
    assert torch.equal(logits(hybrid, images()), logits(plain, images()))


@newest_timm
def test_pretrained_weights_from_an_address(checkpoint):
    """Not read beforehand, as the weights of a tag are not."""
    plain = create("vit_tiny_patch16_224", seed=1, **VIT)
    overlay = checkpoint(plain)
    overlay |= {"url": f"file://{overlay.pop('file')}", "hf_hub_id": None}
    hybrid = create(VIT_MIX, pretrained=True, pretrained_cfg_overlay=overlay, **VIT)
    assert torch.equal(logits(hybrid, images()), logits(plain, images()))


@newest_timm
@each_hybrid
def test_weights_of_a_hybrid_load(base, name, kwargs, size, checkpoint):
    trained = randomize_(create(name, seed=1, **kwargs, num_classes=9))
    overlay = checkpoint(trained)
    loads = {"pretrained": True, "pretrained_cfg_overlay": overlay, **kwargs}
    expected = logits(trained, images(size))
    for model in (
        create(name, **loads, num_classes=9),
        create(name, checkpoint_path=overlay["file"], **kwargs, num_classes=9),
    ):
        assert torch.equal(logits(model, images(size)), expected)
    other = create(name, **loads, num_classes=5)
    assert logits(other, images(size)).shape == (2, 5)
    with torch.no_grad():
        features = other.forward_features(images(size))
        assert torch.equal(features, trained.forward_features(images(size)))


@newest_timm
def test_weights_of_a_hybrid_fit_other_input(checkpoint):
    trained = randomize_(create(VIT_MIX, seed=1, **{**VIT, "img_size": 64}))
    overlay = checkpoint(trained)
    loads = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    resized = create(VIT_MIX, **loads, **{**VIT, "img_size": (96, 64)})
    assert logits(resized, images((96, 64))).shape == (2, 1000)
    gray = create(VIT_MIX, **loads, **{**VIT, "img_size": 64}, in_chans=1)
    summed = trained.patch_embed.proj.weight.sum(1, keepdim=True)
    assert torch.allclose(gray.patch_embed.proj.weight, summed)
    for model in (resized, gray):
        ours, theirs = (inserted_modules(m) for m in (model, trained))
        assert all(torch.equal(ours[n].weight, theirs[n].weight) for n in theirs)


@newest_timm
def test_incomplete_weights_are_refused_where_strict(checkpoint, tmp_path):
    trained = create(VIT_MIX, seed=1, **VIT)
    overlay = checkpoint(trained)
    state = {k: v for k, v in trained.state_dict().items() if "blocks.1.mlp.act" not in k}
    torch.save(state, overlay["file"])
    loads = {"pretrained": True, "pretrained_cfg_overlay": overlay, **VIT}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.mlp\.act\.before"):
        create(VIT_MIX, **loads)
    loose = create(VIT_MIX, **loads, pretrained_strict=False)
    assert torch.equal(loose.norm.weight, trained.norm.weight)


def test_checkpoints_load_through_the_filter(checkpoint):
    plain = create("vit_tiny_patch16_224", seed=1, **{**VIT, "img_size": 64})
    path = checkpoint(plain)["file"]
    hybrid = create(VIT_MIX, **{**VIT, "img_size": 96})
    load_checkpoint(hybrid, path, filter_fn=models.checkpoint_filter_fn)
    resized = create("vit_tiny_patch16_224", **{**VIT, "img_size": 96})
    load_checkpoint(resized, path, filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    x = images((96, 96))
    assert torch.equal(logits(hybrid, x), logits(resized, x))
    hybrid.load_state_dict(resized.state_dict(), strict=True)
    unknown = {"weight": torch.zeros(1)}
    assert models.checkpoint_filter_fn(unknown, nn.Linear(1, 1)) is unknown


# --- features ---


@each_hybrid
def test_features_are_those_of_the_base(base, name, kwargs, size):
    asked = {**kwargs, "features_only": True, "out_indices": (0, 1)}
    plain, hybrid = create(base, **asked), create(name, **asked)
    counts = runs_of(hybrid)
    assert same(logits(hybrid, images(size)), logits(plain, images(size)))
    assert set(counts.values()) == {1}
    assert isinstance(hybrid, type(plain))
    assert isinstance(hybrid, FeatureListNet if base.startswith("pvt") else FeatureGetterNet)
    assert hybrid.feature_info.channels() == plain.feature_info.channels()
    assert hybrid.feature_info.reduction() == plain.feature_info.reduction()
    assert hybrid.pretrained_cfg == {**plain.pretrained_cfg, "architecture": name}


@each_hybrid
def test_features_see_the_inserted_blocks(base, name, kwargs, size):
    """Equal to what the whole hybrid makes of the image, on a grid that is not square."""
    whole = randomize_(create(name, **kwargs))
    features = randomize_(create(name, **kwargs, features_only=True, out_indices=(0, 1, 2)))
    with torch.no_grad():
        expected = whole.forward_intermediates(
            images(size), indices=[0, 1, 2], intermediates_only=True
        )
    assert same(logits(features, images(size)), expected)


@newest_timm
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_of_every_class(feature_cls):
    asked = {**PVT, "features_only": True, "feature_cls": feature_cls, "out_indices": (0, 1, 3)}
    plain, hybrid = create("pvt_v2_b0", **asked), create("pvt_v2_b0_separable_ffn", **asked)
    ours, theirs = (logits(model, images((64, 96))) for model in (hybrid, plain))
    assert isinstance(hybrid, type(plain))
    assert type(ours) is type(theirs)
    as_list = list if feature_cls != "dict" else lambda d: list(d.values())
    assert same(as_list(ours), as_list(theirs))


def test_features_of_a_model_with_maps_outside_its_blocks():
    base, size = "swin_tiny_patch4_window7_224", (64, 96)
    asked = {**SWIN, "img_size": size, "features_only": True}
    request = {"block": "mix_ffn"}
    plain = create(base, **asked)
    hybrid = create("tokenconv", base=base, tokenconv=request, **asked)
    assert hybrid.output_fmt == plain.output_fmt == "NHWC"
    assert same(logits(hybrid, images(size)), logits(plain, images(size)))


def test_features_with_checkpointing_of_two_sizes_at_once():
    kwargs = {**PVT, "features_only": True}
    model = randomize_(create("pvt_v2_b0_separable_ffn", **kwargs)).train()
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        outputs = [model(images(size)) for size in ((64, 96), (96, 64))]
        sum(feature.square().mean() for out in outputs for feature in out).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_features_take_weights_of_base_and_hybrid(checkpoint):
    kwargs = {**PVT, "num_classes": 9}
    asked = {**PVT, "features_only": True, "pretrained": True}
    name, x = "pvt_v2_b0_peg", images((64, 96))
    plain = create("pvt_v2_b0", seed=1, **kwargs)
    trained = randomize_(create(name, seed=2, **kwargs))
    for source in (plain, trained):
        model = create(name, pretrained_cfg_overlay=checkpoint(source), **asked)
        with torch.no_grad():
            expected = source.forward_intermediates(x, intermediates_only=True)
        assert same(logits(model, x), expected)


# --- copies and saved models ---


@each_hybrid
@pytest.mark.parametrize("features_only", [False, True])
def test_copies_and_pickles(base, name, kwargs, size, features_only):
    asked = {**kwargs, "features_only": True} if features_only else kwargs
    model = randomize_(create(name, **asked))
    expected = logits(model, images(size))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        out = logits(twin, images(size))
        assert same(out, expected) if features_only else torch.equal(out, expected)
        for module in inserted_modules(twin).values():
            module.init_neutral_()
        after = logits(model, images(size))
        assert same(after, expected) if features_only else torch.equal(after, expected)


SAVED = [
    *HYBRIDS,
    pytest.param(
        "vit_tiny_patch16_224",
        "tokenconv",
        {
            **VIT,
            "base": "vit_tiny_patch16_224",
            "tokenconv": {"block": "mix_ffn", "blocks": [1], "kernel_size": 5},
        },
        (48, 80),
        id="tokenconv",
    ),
]


@newest_timm
@pytest.mark.parametrize(("base", "name", "kwargs", "size"), SAVED)
def test_saved_by_timm_and_built_again(base, name, kwargs, size, tmp_path):
    model = randomize_(create(name, **kwargs, num_classes=9))
    save_for_hf(model, tmp_path, safe_serialization="both")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name
    source = f"local-dir:{tmp_path}"
    twin = create(source, pretrained=True)
    assert torch.equal(logits(twin, images(size)), logits(model, images(size)))
    (tmp_path / "model.safetensors").unlink()
    other = create(source, pretrained=True, num_classes=4)
    assert logits(other, images(size)).shape == (2, 4)
    with torch.no_grad():
        features = other.forward_features(images(size))
        assert torch.equal(features, model.forward_features(images(size)))
    save_for_hf(twin, tmp_path / "again", safe_serialization=True)
    again = create(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert torch.equal(logits(again, images(size)), logits(model, images(size)))


# --- segmentation_models_pytorch ---


@pytest.fixture
def smp():
    return pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
    )


@pytest.mark.parametrize("block", ["mix_ffn", "peg"])
@pytest.mark.parametrize("kind", ["Unet", "DPT"])
def test_encoders_of_segmentation_models(smp, kind, block):
    torch.manual_seed(0)
    size = (64, 96)
    if kind == "Unet":
        name = f"tu-pvt_v2_b0_{block}"
        model = smp.Unet(name, encoder_weights=None, classes=2, **PVT)
    else:
        kwargs = {"embed_dim": 48, "num_heads": 3, "img_size": size}
        small = {"decoder_intermediate_channels": (8,) * 4, "decoder_fusion_channels": 8}
        name = f"tu-vit_tiny_patch16_224_{block}"
        model = smp.DPT(name, encoder_weights=None, classes=2, **small, **kwargs)
    counts = runs_of(model)
    out = model(images(size))
    assert out.shape == (2, 2, *size)
    assert counts
    assert set(counts.values()) == {1}
    out.square().mean().backward()
    for name, module in inserted_modules(model).items():
        assert any(p.grad is not None and p.grad.any() for p in module.parameters()), name
