"""Hybrids whose tokens do not fill their grid: dropped, masked, or of several sizes at once."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices

import tokenconv as tc

SIZE = (48, 80)  # 3 rows, 5 columns
COUNT = 15
ARCHITECTURES = {
    "vit": ("vit_tiny_patch16_224",
            {"img_size": SIZE, "embed_dim": 48, "num_heads": 3, "depth": 3, "reg_tokens": 2,
             "no_embed_class": True}),
    "eva": ("eva02_tiny_patch14_224",
            {"img_size": SIZE, "patch_size": 16, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"embed_dim": 48, "num_heads": 3, "depth": 3}),
}  # fmt: skip


def built(name, disturb_, **kwargs):
    torch.manual_seed(0)
    architecture, more = ARCHITECTURES[name]
    model = timm.create_model(architecture, num_classes=7, **{**more, **kwargs}).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a LayerScale of 1e-5 would hide everything
            parameter.data.uniform_(0.5, 1.0)
    plan = tc.plan(model, "mix_ffn", kernel_size=5, input_size=(3, *SIZE))
    plan = plan + tc.plan(model, "peg", blocks=0, input_size=(3, *SIZE))
    return disturb_(tc.insert_(model, plan), std=0.2)


@pytest.fixture(params=ARCHITECTURES)
def dropping(request, disturb_):
    """A hybrid in training mode that drops two tokens of five."""
    return built(request.param, disturb_, patch_drop_rate=0.4).train()


@pytest.fixture
def naflexvit(disturb_):
    return built("naflexvit", disturb_).eval()


@pytest.fixture
def vit(disturb_):
    return built("vit", disturb_).eval()


def images_of(*size, batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def packed(images, length):
    """Images ``(1, 3, H, W)`` of several sizes as NaFlexViT takes them."""
    patches = torch.zeros(len(images), length, 768, dtype=torch.float64)
    coords = torch.zeros(len(images), length, 2, dtype=torch.int64)
    valid = torch.zeros(len(images), length, dtype=torch.bool)
    for i, image in enumerate(images):
        cut = image[0].unfold(1, 16, 16).unfold(2, 16, 16)  # (3, rows, cols, 16, 16)
        rows, cols = cut.shape[1:3]
        count = rows * cols
        patches[i, :count] = cut.permute(1, 2, 3, 4, 0).reshape(count, -1)
        index = torch.arange(count)
        coords[i, :count] = torch.stack([index // cols, index % cols], dim=-1)
        valid[i, :count] = True
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


class Reference:
    """Convolves on zero-filled maps in a plain model, by hooks of its own."""

    def __init__(self, hybrid, coords):
        self.coords = coords
        self.model = tc.remove_(copy.deepcopy(hybrid))
        for (name, module), (_, ours) in zip(
            self.model.named_modules(), self.paired(hybrid), strict=True
        ):
            if name.endswith("mlp.act"):
                module.register_forward_pre_hook(
                    lambda m, args, conv=ours.before: (self.convolved(args[0], conv),)
                )
            if name == "blocks.0":
                module.register_forward_hook(
                    lambda m, args, out, conv=ours.after.proj: self.convolved(out, conv)
                )

    def paired(self, hybrid):
        return [(n, hybrid.get_submodule(n)) for n, _ in self.model.named_modules()]

    def convolved(self, x, conv):
        prefix = x.shape[1] - self.coords.shape[1]
        images = []
        for tokens, coords in zip(x[:, prefix:], self.coords, strict=True):
            there = (coords >= 0).all(-1)
            rows, cols = coords[there].T
            fmap = tokens.new_zeros(1, tokens.shape[1], 20, 20)
            fmap[0, :, rows, cols] = tokens[there].T
            kernel = {"padding": conv.kernel_size // 2, "groups": conv.dim}
            out = F.conv2d(fmap, conv.weight, conv.bias, **kernel)[0, :, rows, cols].T
            new = tokens.clone()
            new[there] = tokens[there] + out
            images.append(new)
        return torch.cat([x[:, :prefix], torch.stack(images)], dim=1)


def kept_by_timm(seed, batch=2, count=COUNT, rate=0.4):
    """What timm's patch dropout keeps; it draws first in a forward pass."""
    torch.manual_seed(seed)
    return torch.argsort(torch.randn(batch, count), dim=-1)[:, : int(count * (1 - rate))]


def coords_of(kept, cols=5):
    return torch.stack([kept // cols, kept % cols], dim=-1)


def assert_same(ours, theirs, parameters):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    for a, b in zip(
        torch.autograd.grad(ours, parameters, cotangent, allow_unused=True),
        torch.autograd.grad(theirs, parameters, cotangent, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


# --- patch dropout ---


def test_patch_dropout_is_a_convolution_on_a_zero_filled_map(dropping):
    images = images_of(*SIZE)
    torch.manual_seed(5)
    ours = dropping(images)
    reference = Reference(dropping, coords_of(kept_by_timm(5)))
    torch.manual_seed(5)
    theirs = reference.model(images)
    convs = [p for n, p in dropping.named_parameters() if ".before." in n or ".after." in n]
    assert len(convs) == 8
    assert_same(ours, theirs, convs)


def test_patch_dropout_changes_nothing_at_insertion(dropping):
    for module in dropping.modules():
        if hasattr(module, "init_neutral_"):
            module.init_neutral_()
    plain = tc.remove_(copy.deepcopy(dropping))
    outputs = []
    for model in (dropping, plain):
        torch.manual_seed(5)
        outputs.append(model(images_of(*SIZE)))
    assert torch.equal(*outputs)


def test_every_token_comes_back_in_evaluation(dropping):
    model = dropping.eval()
    index = torch.arange(COUNT).expand(2, -1)
    with torch.no_grad():
        theirs = Reference(model, coords_of(index)).model(images_of(*SIZE))
        torch.testing.assert_close(model(images_of(*SIZE)), theirs, rtol=1e-9, atol=1e-9)


def test_checkpointed_gradients_with_two_forwards_in_flight(dropping):
    gradients = []
    for checkpointing in (False, True):
        dropping.set_grad_checkpointing(checkpointing)
        dropping.zero_grad()
        torch.manual_seed(5)
        loss = dropping(images_of(*SIZE)).sin().sum() + dropping(images_of(*SIZE)).cos().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in dropping.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_removal_and_copies(dropping):
    kinds = (PatchDropout, PatchDropoutWithIndices)
    outputs = []
    for model in (dropping, copy.deepcopy(dropping), pickle.loads(pickle.dumps(dropping))):
        torch.manual_seed(5)
        outputs.append(model(images_of(*SIZE)))
        tc.remove_(model)
        assert type(model.patch_drop) in kinds
        assert not model.patch_drop._forward_hooks
        assert "_binding" not in vars(model.patch_drop)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_compiled_patch_dropout(dropping, checkpointing):
    dropping.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    compiled = torch.compile(dropping, fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (compiled, dropping):
        dropping.zero_grad()
        torch.manual_seed(5)
        model(images_of(*SIZE)).sin().sum().backward()
        gradients.append([p.grad.clone() for p in dropping.parameters() if p.grad is not None])
    torch._dynamo.reset()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_dropout_that_may_drop_a_prefix_token_is_refused():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=SIZE, depth=2, patch_drop_rate=0.4
    )
    with pytest.raises(tc.SurgeryError, match=r"spares 1 prefix tokens and its blocks see 2"):
        tc.insert_(model, "mix_ffn")
    assert "_tokenconv" not in vars(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_frozen_grid_refuses_dropped_tokens(disturb_):
    model = tc.freeze_grid_(
        tc.insert_(timm.create_model(*ARCHITECTURES["vit"][:1], patch_drop_rate=0.4,
                                     **ARCHITECTURES["vit"][1]), "mix_ffn"), SIZE
    )  # fmt: skip
    assert type(model.patch_drop) is PatchDropout
    images = images_of(*SIZE).float()
    assert torch.jit.script(model.eval())(images).shape == (2, 1000)
    with pytest.raises(tc.GridError, match="frozen"):
        model.train()(images)


# --- several sizes in one batch ---


def test_packed_images_are_what_they_are_alone(naflexvit):
    images = [images_of(*size, batch=1, seed=i) for i, size in enumerate([(48, 80), (64, 32)])]
    with torch.no_grad():
        together = naflexvit(packed(images, length=17))
        alone = torch.cat([naflexvit(image) for image in images])
        neutral = tc.remove_(copy.deepcopy(naflexvit))(packed(images, length=17))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)  # float32 inside
    assert (together - neutral).abs().max() > 1e-2


def test_patch_dropout_of_packed_images(disturb_):
    model = built("naflexvit", disturb_, patch_drop_rate=0.4).train()
    images = [images_of(*size, batch=1, seed=i) for i, size in enumerate([(48, 80), (64, 32)])]
    batch = packed(images, length=17)
    kept = kept_by_timm(5, count=17)
    coords = batch["patch_coord"].masked_fill(~batch["patch_valid"][..., None], -1)
    coords = coords.gather(1, kept[..., None].expand(-1, -1, 2))
    assert (coords < 0).any()  # an empty slot was kept
    torch.manual_seed(5)
    ours = model(batch)
    reference = Reference(model, coords)
    torch.manual_seed(5)
    theirs = reference.model(batch)
    assert_same(ours, theirs, [p for n, p in model.named_parameters() if ".before." in n])


@pytest.mark.parametrize("how", ["compile", "export"])
def test_packed_images_in_one_graph(disturb_, how):
    naflexvit = built("naflexvit", disturb_, pos_embed_use_grid_sample=True).eval()  # or timm loops
    batches = [
        packed([images_of(*s, batch=1, seed=i) for i, s in enumerate(sizes)], length=20)
        for sizes in ([(48, 80), (64, 32)], [(16, 160), (80, 64)])
    ]
    if how == "compile":
        torch._dynamo.reset()
        program = torch.compile(naflexvit, fullgraph=True, backend="aot_eager")
    else:
        program = torch.export.export(naflexvit, (batches[0],)).module()
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(program(batch), naflexvit(batch), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


# --- code that drops or masks tokens by itself ---


def blocks_on(model, images, kept=None, mask=None):
    """The blocks of a ViT on some of its tokens, as masked image models run them."""
    x = model.patch_embed(images)
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        tc.keep_tokens(model, kept)
    if mask is not None:
        tc.keep_tokens(model, mask)
    prefix = torch.cat([model.cls_token, model.reg_token], dim=1).expand(len(x), -1, -1)
    return model.blocks(torch.cat([prefix, x], dim=1))


def plain_blocks_on(reference, images, kept=None):
    x = reference.patch_embed(images)
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    prefix = torch.cat([reference.cls_token, reference.reg_token], dim=1).expand(len(x), -1, -1)
    return reference.blocks(torch.cat([prefix, x], dim=1))


def test_tokens_that_are_kept_by_the_caller(vit):
    images = images_of(*SIZE)
    first, second = kept_by_timm(0), kept_by_timm(1, rate=0.7)
    whole = blocks_on(vit, images)
    for kept in (first, second):
        reference = Reference(vit, coords_of(kept)).model
        convs = [p for n, p in vit.named_parameters() if ".before." in n]
        assert_same(blocks_on(vit, images, kept), plain_blocks_on(reference, images, kept), convs)
    assert torch.equal(blocks_on(vit, images), whole)  # nothing stays


def test_masked_tokens_stay_and_count_as_zero(vit):
    images = images_of(*SIZE)
    mask = torch.rand(2, COUNT, generator=torch.Generator().manual_seed(0)) > 0.4
    coords = coords_of(torch.arange(COUNT)).masked_fill(~mask[..., None], -1)
    reference = Reference(vit, coords).model
    convs = [p for n, p in vit.named_parameters() if ".before." in n]
    assert_same(blocks_on(vit, images, mask=mask), plain_blocks_on(reference, images), convs)


def test_keeping_everything_is_keeping_the_grid(vit):
    images = images_of(*SIZE)
    everything = torch.ones(2, COUNT, dtype=torch.bool)
    with torch.no_grad():
        ours = blocks_on(vit, images, mask=everything)
        torch.testing.assert_close(ours, blocks_on(vit, images), rtol=1e-9, atol=1e-9)


def test_two_threads_that_keep_other_tokens(vit, in_two_threads):
    class Masked(torch.nn.Module):
        def forward(self, images):
            kept = kept_from(images)
            return blocks_on(vit, images, kept)

    def kept_from(images):  # by their values, so that each thread keeps other ones
        return images[:, 0, ::16, ::16].flatten(1).argsort(1)[:, :6]

    first, second = images_of(*SIZE, seed=1), images_of(*SIZE, seed=2)
    assert not torch.equal(kept_from(first), kept_from(second))
    in_two_threads(Masked(), first, second, count=30)


def test_tokens_that_nobody_was_told_of_are_refused(vit):
    x = vit.patch_embed(images_of(*SIZE))[:, :6]
    with pytest.raises(tc.GridError, match=r"3\*5 on the grid, got 6.*call tokenconv.keep_tokens"):
        vit.blocks(x)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.zeros(2, 6), r"integers \(B, L\) or booleans \(B, 15\), got torch.float32"),
        ([[0, 1]], "got list"),
        (torch.arange(6), r"got a torch.int64 tensor of shape \(6,\)"),
        (torch.ones(2, 20, dtype=torch.bool), r"booleans \(B, 15\), got .* \(2, 20\)"),
        (torch.arange(10, 16)[None], "different indices below 15"),
        (torch.tensor([[3, 4, 3]]), "different indices below 15"),
        (torch.ones(2, 15, dtype=torch.int64), "a mask is boolean"),
        (torch.tensor([[0, 5, 5], [1, 2, 3]]), "got some above or twice"),
    ],
)
def test_bad_input(vit, kept, message):
    vit.patch_embed(images_of(*SIZE))
    with pytest.raises(tc.GridError, match=message):
        tc.keep_tokens(vit, kept)


def test_calls_at_the_wrong_time_or_for_another_model(vit, pvt):
    kept = torch.arange(6)[None]
    with pytest.raises(tc.SurgeryError, match="between the patch embedding and the first block"):
        tc.keep_tokens(vit, kept)
    with pytest.raises(tc.SurgeryError, match="not all see tokens of one grid"):
        tc.keep_tokens(tc.insert_(pvt, "mix_ffn"), kept)
    with pytest.raises(tc.SurgeryError, match="freeze_grid_ has fixed it"):
        tc.keep_tokens(tc.freeze_grid_(tc.remove_(vit) and tc.insert_(vit, "mix_ffn"), SIZE), kept)
    with pytest.raises(tc.SurgeryError, match="nothing is inserted"):
        tc.keep_tokens(tc.remove_(vit), kept)


def test_a_mask_is_refused_where_some_blocks_see_maps(families):
    case = families["vision_transformer_sam"]
    size = {"input_size": (3, *case.size)}
    model = case.build()
    tc.insert_(model, tc.plan(model, "mix_ffn", **size) + tc.plan(model, "peg", **size))
    model.patch_embed(case.images())
    with pytest.raises(tc.SurgeryError, match="not all see tokens of one grid"):
        tc.keep_tokens(model, torch.ones(2, 15, dtype=torch.bool))


def test_a_second_call_is_about_the_tokens_that_are_left(vit):
    first, second = kept_by_timm(0), torch.tensor([[2, 0, 5], [1, 4, 7]])
    kept = first.gather(1, second)
    images = images_of(*SIZE)
    expected = blocks_on(vit, images, kept)
    x = vit.patch_embed(images)
    x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    tc.keep_tokens(vit, first)
    tc.keep_tokens(vit, second)
    prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1).expand(2, -1, -1)
    assert torch.equal(vit.blocks(torch.cat([prefix, x], dim=1)), expected)


def test_arguments_of_packed_images_by_position(naflexvit):
    batch = packed([images_of(48, 80, batch=1), images_of(64, 32, batch=1)], length=17)
    x, _ = naflexvit.embeds(batch["patches"], batch["patch_coord"].double(), batch["patch_valid"])
    by_hand = x
    for block in naflexvit.blocks:
        by_hand = block(by_hand)
    named = {key: batch[key] for key in ("patch_coord", "patch_valid")}
    x, _ = naflexvit.embeds(batch["patches"], **named)
    for block in naflexvit.blocks:
        x = block(x)
    assert torch.equal(x, by_hand)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
def test_traced_patch_dropout(dropping):
    images = images_of(*SIZE).float()
    model = dropping.float()
    torch.manual_seed(5)
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.manual_seed(5)
    ours = traced(images)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, model(images), rtol=1e-4, atol=1e-5)
