"""A hybrid of one image size, as TorchScript."""

import copy
import io
import pickle

import pytest
import torch

import tokenconv as tc
from tokenconv.surgery.binding import _Capture
from tokenconv.surgery.edits import inserted_modules
from tokenconv.surgery.folding import fold_
from tokenconv.surgery.scripting import freeze_grid_

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

SITES = [
    ("vit", "mix_ffn", "before_act"),
    ("distilled", "mix_ffn", "after_act"),
    ("dynamic size", "separable_ffn", "beside_mlp"),
    ("pvt_v2", "mix_ffn", "merge_conv"),
    ("pvt_v2", "separable_ffn", "beside_attn"),
    ("pvt_v2 linear", "separable_ffn", "beside_mlp"),
    ("pvt_v2", "none", "remove_conv"),
]


def sites(*wanted):
    return pytest.mark.parametrize(("case", "block", "site"), wanted, indirect=["case"])


on_vit = pytest.mark.parametrize("case", ["vit"], indirect=True)
two_sites = sites(SITES[0], SITES[3])


@pytest.fixture
def hybrid(case, disturb_):
    """Makes a hybrid whose inserted kernels are far from zero."""

    def build(block="mix_ffn", site=None, **kwargs):
        kwargs.setdefault("input_size", (3, *case.size))
        model = tc.insert_(case.build(), block, site=site, allow_change=True, **kwargs)
        disturb_(model)
        return model, case.images()

    return build


@on_vit
@torch.no_grad()
def test_what_stands_between_the_parts_is_scripted(hybrid, case):
    model, images = hybrid("separable_ffn", "beside_mlp")
    for inserted in inserted_modules(model).values():
        inserted.act = torch.nn.ReLU()
    before = model(images)
    scripted = torch.jit.script(freeze_grid_(model, case.size))
    assert torch.equal(scripted(images), before)


@sites(*SITES)
@torch.no_grad()
def test_scripted_equals_eager_and_goes_back(hybrid, case, block, site):
    original = case.build()
    model, images = hybrid(block, site)
    before, keys = model(images), list(model.state_dict())
    assert freeze_grid_(model, case.size) is model
    assert torch.equal(model(images), before)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    torch.testing.assert_close(scripted(images), before)
    assert list(model.state_dict()) == list(scripted.state_dict()) == keys
    tc.remove_(model)
    state = original.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(images), original(images))
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "tokenconv_size" not in vars(model.patch_embed)


@pytest.mark.parametrize(
    "family",
    ["swin_transformer", "levit", "volo", "vision_transformer, gated"],
    indirect=True,
)
@torch.no_grad()
def test_other_families(family, disturb_):
    model = tc.insert_(family.build(), "mix_ffn", input_size=(3, *family.size))
    disturb_(model)
    before = model(family.images())
    scripted = torch.jit.script(freeze_grid_(model, family.size))
    torch.testing.assert_close(scripted(family.images()), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["dynamic size", "pvt_v2"], indirect=True)
@torch.no_grad()
def test_the_frozen_size_is_another_than_the_planned_one(hybrid):
    model, _ = hybrid(input_size=(3, 64, 64))
    images = torch.randn(1, 3, 96, 160)
    before = model(images)
    scripted = torch.jit.script(freeze_grid_(model, (96, 160)))
    torch.testing.assert_close(scripted(images), before)


@sites(("dynamic size", "mix_ffn", "before_act"), ("pvt_v2", "mix_ffn", "merge_conv"))
@torch.no_grad()
def test_other_sizes_are_refused(hybrid, case, block, site):
    """Also those with as many tokens, which no block could tell."""
    model, images = hybrid(block, site)
    freeze_grid_(model, case.size)
    scripted = torch.jit.script(model)
    message = r"the size is frozen to {}x{}, got".format(*case.size)
    for wrong in (images.transpose(2, 3), images[..., :64]):
        with pytest.raises(tc.GridError, match=message):
            model(wrong)
        with pytest.raises(torch.jit.Error, match=message):
            scripted(wrong)


@pytest.mark.parametrize("family", ["volo"], indirect=True)
def test_blocks_on_maps_refuse_other_sizes(family):
    """There is no module that makes the grid, so the blocks look."""
    model = tc.insert_(family.build(), "mix_ffn", input_size=(3, *family.size))
    freeze_grid_(model, family.size)
    block = next(iter(inserted_modules(model).values()))
    assert block(torch.randn(1, block.rows, block.cols, block.dim)).ndim == 4
    with pytest.raises(tc.GridError, match=r"the grid is frozen to"):
        block(torch.randn(1, 4, 16, block.dim))


@two_sites
@torch.no_grad()
def test_hooks_of_the_user_stay_and_ours_go(hybrid, case, block, site):
    model, images = hybrid(block, site)
    seen = []
    model.patch_embed.register_forward_hook(lambda *args: seen.append("embedding"))
    model.register_forward_pre_hook(lambda *args: seen.append("model"))
    freeze_grid_(model, case.size)
    assert not any(isinstance(m, _Capture) for m in model.modules())
    model(images)
    assert seen == ["model", "embedding"]


@two_sites
@torch.no_grad()
def test_copies_and_checkpoints(hybrid, case, block, site):
    model, images = hybrid(block, site)
    unfrozen = copy.deepcopy(model)
    freeze_grid_(model, case.size)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
    for parameter in unfrozen.parameters():
        parameter.mul_(1.1)
    model.load_state_dict(unfrozen.state_dict())
    assert torch.equal(model(images), unfrozen(images))


@pytest.mark.parametrize(
    ("case", "fold_first"), [("vit", False), ("pvt_v2", True)], indirect=["case"]
)
@torch.no_grad()
def test_folded_models(hybrid, case, fold_first):
    model, images = hybrid()
    before = model(images)
    if fold_first:
        fold_(model)
    freeze_grid_(model, case.size)
    assert bool(fold_(model).folded) is not fold_first
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), before, rtol=1e-4, atol=1e-5)


@sites(
    ("vit", "peg", "after_block"),
    ("vit", "peg", "before_attn"),
    ("vit", "separable_ffn", "beside_attn"),
    ("vit", "separable_ffn", "replace_attn"),
    ("pvt_v2", "peg", "after_block"),
)
@torch.no_grad()
def test_sites_that_torchscript_cannot_have_are_named(hybrid, case, block, site):
    model, images = hybrid(block, site)
    before = model(images)
    with pytest.raises(tc.SurgeryError, match=rf"\bblocks\.0\.\S+ \({site}\) cannot be scripted"):
        freeze_grid_(model, case.size)
    assert torch.equal(model(images), before)


@on_vit
def test_other_refusals_leave_the_model_as_it_was(hybrid, case):
    model, images = hybrid(impl="reference")
    expected = model(images)
    with pytest.raises(tc.SurgeryError, match="only conv2d is scriptable"):
        freeze_grid_(model, case.size)
    with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
        freeze_grid_(case.build(), case.size)
    for block in inserted_modules(model).values():
        block.impl = None
    with pytest.raises(tc.SurgeryError, match="refuses an image of 3x64x64"):
        freeze_grid_(model, (64, 64))
    torch.testing.assert_close(model(images), expected)
    freeze_grid_(model, case.size)
    with pytest.raises(tc.SurgeryError, match="frozen already"):
        freeze_grid_(model, case.size)


@pytest.mark.parametrize("family", ["tnt"], indirect=True)
def test_a_source_that_takes_more_than_an_image(family):
    model = tc.insert_(family.build(), "mix_ffn", input_size=(3, *family.size))
    with pytest.raises(tc.SurgeryError, match="pixel_embed takes more than an image"):
        freeze_grid_(model, family.size)


@on_vit
def test_an_unknown_block(hybrid, case):
    class Other(tc.DWConv):
        pass

    model, _ = hybrid()
    model.blocks[1].mlp.act.before.__class__ = Other
    with pytest.raises(tc.SurgeryError, match=r"blocks\.1\.\S+ cannot be scripted: no Other can"):
        freeze_grid_(model, case.size)
