"""Every block of the registry at every site that its row names."""

import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import nn

import tokenconv as tc
from tokenconv.surgery.edits import inserted_modules

ROWS = [
    (name, site)
    for name, info in tc.BLOCKS.items()
    for site in info.sites
    if site != "replace_patch_embed"  # not every model takes every stem: see test_replacing.py
]
EXACT = [row for row in ROWS if row[1] != "replace_attn"]


@pytest.fixture
def case(site, families):
    return families["pvt_v2" if site == "merge_conv" else "vision_transformer, gated"]


@pytest.fixture
def plain(case):
    model = case.build().eval()
    for module in model.modules():
        if hasattr(module, "global_pool"):
            module.global_pool = "avg"  # so that every block reaches the logits
    return model


@pytest.mark.parametrize(("block", "site"), EXACT)
def test_insertion_is_exact_and_undone(case, plain, block, site, disturb_):
    images = case.images()
    with torch.no_grad():
        before = plain(images)
        model = copy.deepcopy(plain)
        made = tc.plan(model, block, site=site, input_size=(3, *case.size))
        assert made.exact
        assert torch.equal(tc.insert_(model, made)(images), before)
        assert not torch.equal(disturb_(model)(images), before)
        assert torch.equal(tc.remove_(model)(images), before)


@pytest.mark.parametrize(("block", "site"), ROWS)
def test_traced_by_fx(case, plain, block, site, disturb_):
    model = tc.insert_(plain, block, site=site, input_size=(3, *case.size), allow_change=True)
    disturb_(model).eval()
    images = case.images()
    with torch.no_grad():
        expected = model.forward_features(images)
        if site == "merge_conv":
            expected = expected.mean((2, 3))
        node = "norm" if site != "merge_conv" else "mean"
        extracted = create_feature_extractor(model, [node])(images)[node]
        torch.testing.assert_close(extracted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize(
    "block", ["mbconv", "conv_lora", "condconv", "focal_modulation", "sam", "unireplknet_block"]
)
@torch.no_grad()
def test_exported_for_any_batch_and_size(block, disturb_):
    vit = timm.create_model("test_vit", dynamic_img_size=True).eval()
    model = disturb_(tc.insert_(vit, block)).eval()
    auto = torch.export.Dim.AUTO
    shapes = {"x": {0: auto, 2: auto, 3: auto}}
    images = (torch.randn(3, 3, 96, 64),)
    program = torch.export.export(model, images, dynamic_shapes=shapes).module()
    for size in ((2, 3, 64, 128), (5, 3, 80, 112)):
        images = torch.randn(size)
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("block", "kwargs", "message"),
    [
        ("mbconv", {"residual": True}, "residual cannot be chosen where a block is inserted"),
        ("bsconv_u", {"stride": 2}, "stride cannot"),
        ("conv_lora", {"out_dim": 8}, "out_dim cannot"),
        ("localvit_ffn", {"residual": True}, "residual cannot"),
    ],
)
def test_what_surgery_fixes_cannot_be_chosen(vit, block, kwargs, message):
    with pytest.raises((tc.SurgeryError, ValueError), match=message):
        tc.plan(vit, block, **kwargs)


@pytest.mark.parametrize(("block", "site"), EXACT)
def test_every_inserted_parameter_learns(case, plain, block, site):
    """In the first step what is zero does, in the second one all the rest."""
    images = case.images()
    model = tc.insert_(plain, block, site=site, input_size=(3, *case.size)).train()
    parameters = [
        (f"{name}.{key}", p)
        for name, module in inserted_modules(model).items()
        for key, p in module.named_parameters()
    ]
    optimizer = torch.optim.SGD([p for _, p in parameters], lr=1e-2)
    moved = {name: torch.zeros((), dtype=torch.bool) for name, _ in parameters}
    for _ in range(3):
        optimizer.zero_grad()
        model(images).sin().sum().backward()
        for name, parameter in parameters:
            if parameter.grad is not None:
                moved[name] = moved[name] | parameter.grad.abs().sum().bool()
        optimizer.step()
    still = [name for name, flag in moved.items() if not flag]
    assert not [name for name in still if not (before_a_norm(model, name) or not_chosen(name))]


def before_a_norm(model, name):
    """Whether a parameter is a bias whose effect the BatchNorm behind it takes away."""
    return name.endswith(".bias") and any(isinstance(m, nn.BatchNorm1d) for m in model.modules())


def not_chosen(name):
    """Whether a parameter is that of an expert, of which two images take two at most."""
    return ".mixture.experts." in name


@pytest.mark.parametrize(("block", "site"), ROWS)
def test_saved_and_loaded(case, plain, block, site, disturb_, tmp_path):
    model = copy.deepcopy(plain)
    tc.insert_(model, block, site=site, input_size=(3, *case.size), allow_change=True)
    tc.save(disturb_(model), tmp_path)
    with torch.no_grad():
        expected = model(case.images())
        assert torch.equal(tc.load_(plain, tmp_path)(case.images()), expected)
        assert expected.isfinite().all()


def test_a_temperature_is_saved_with_its_hybrid(vit, tmp_path):
    base = copy.deepcopy(vit)
    model = tc.insert_(vit, "dynamic_conv", blocks=0)
    (block,) = inserted_modules(model).values()
    assert block.temperature == 30.0
    block.temperature = 1.5
    tc.save(model, tmp_path)
    (loaded,) = inserted_modules(tc.load_(base, tmp_path)).values()
    assert loaded.temperature == 1.5


@pytest.mark.parametrize("block", [name for name, info in tc.BLOCKS.items() if not info.sites])
def test_whole_blocks_go_nowhere(vit, block):
    with pytest.raises(
        tc.SurgeryError, match="goes into no live model; build it with create_block"
    ):
        tc.plan(vit, block)
    with pytest.raises(tc.SurgeryError, match="it goes nowhere"):
        tc.plan(vit, block, site="beside_mlp")
