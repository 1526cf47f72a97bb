"""The grid reaches every convolution, whatever the forward pass goes through."""

import copy

import pytest
import torch
from timm.models import create_model
from timm.models._features_fx import create_feature_extractor
from torch import nn

import tokenconv as tc
from tokenconv.surgery.binding import CaptureSequential

SIZES = [(64, 96), (96, 64), (64, 64), (48, 128)]  # the first two have the same token count


def images_of(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def hybrid(dynamic_vit, disturb_):
    tc.insert_(dynamic_vit, "mix_ffn")
    disturb_(dynamic_vit, std=0.5)
    return dynamic_vit


def gradients(model, *sizes):
    """Of several forwards in flight before one backward."""
    model.zero_grad()
    loss = sum(((k + 1) * model(images_of(size))).sin().sum() for k, size in enumerate(sizes))
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("sizes", [SIZES[:2], SIZES[1:3]], ids=["same count", "other count"])
def test_gradient_checkpointing_with_two_forwards_in_flight(hybrid, sizes):
    hybrid.train()
    expected = gradients(hybrid, *sizes)
    hybrid.set_grad_checkpointing(True)
    for ours, theirs in zip(gradients(hybrid, *sizes), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_two_threads_with_different_sizes(hybrid, in_two_threads):
    in_two_threads(hybrid, *(images_of(size) for size in SIZES[:2]), count=60)


def test_interleaved_models_do_not_share_a_grid(hybrid):
    twin = copy.deepcopy(hybrid)
    images = [images_of(size) for size in SIZES[:2]]
    with torch.no_grad():
        expected = [hybrid(x) for x in images]
        tokens = [m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(x))))
                  for m, x in zip((hybrid, twin), images, strict=True)]  # fmt: skip
        got = [m.forward_head(m.norm(m.blocks(t)))
               for m, t in zip((hybrid, twin), tokens, strict=True)]  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_an_aborted_forward_leaves_nothing_behind(hybrid):
    def abort(module, args):
        raise InterruptedError

    handle = hybrid.norm_pre.register_forward_pre_hook(abort)
    with torch.no_grad():
        expected = copy.deepcopy(hybrid)
        with pytest.raises(InterruptedError):
            hybrid(images_of(SIZES[0]))
        handle.remove()
        expected.norm_pre._forward_pre_hooks.clear()
        assert torch.equal(hybrid(images_of(SIZES[1])), expected(images_of(SIZES[1])))
    inside = hybrid.blocks[1].register_forward_hook(lambda m, a, out: abort(m, a))
    with pytest.raises(InterruptedError):
        hybrid(images_of(SIZES[0]))
    inside.remove()
    with pytest.raises(tc.SurgeryError, match="no grid is known here"):
        hybrid.blocks[0](torch.zeros(1, 25, 48))


def test_the_container_stays_what_it_was_to_its_users(hybrid):
    blocks = hybrid.blocks
    assert isinstance(blocks, nn.Sequential)
    assert len(blocks) == 3
    assert blocks[0] is next(iter(blocks.children()))
    assert blocks[-1] is list(blocks)[2]
    assert [n for n, _ in blocks[1:].named_children()] == ["1", "2"]
    assert next(iter(blocks.state_dict())).startswith("0.")


def test_intermediates_and_pruned_models(hybrid):
    images = images_of(SIZES[0])
    with torch.no_grad():
        full = hybrid.forward_intermediates(images, intermediates_only=True)
        early = hybrid.forward_intermediates(
            images, indices=[0, 1], stop_early=True, intermediates_only=True
        )
        assert all(torch.equal(a, b) for a, b in zip(early, full[:2], strict=True))
        pruned = copy.deepcopy(hybrid)
        pruned.prune_intermediate_layers([0, 1])
        assert isinstance(pruned.blocks, CaptureSequential)
        last = pruned.forward_intermediates(images, intermediates_only=True)[-1]
        assert torch.equal(last, full[1])
    tc.remove_(pruned)
    assert type(pruned.blocks) is nn.Sequential


def test_attention_masks_reach_the_blocks(hybrid):
    images = images_of(SIZES[0])
    mask = torch.ones(25, 25, dtype=torch.bool)
    with torch.no_grad():
        masked, plain = hybrid(images, attn_mask=mask), hybrid(images)
        causal = hybrid(images, is_causal=True)
    torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(causal, plain, atol=1e-3)


def test_a_new_input_size(vit, disturb_):
    tc.insert_(vit, "mix_ffn")
    disturb_(vit, std=0.5)
    vit.set_input_size((80, 64))
    grids = []
    vit.blocks[0].mlp.act.before.register_forward_pre_hook(lambda m, a: grids.append(a[1]))
    vit(torch.zeros(1, 3, 80, 64))
    assert grids == [tc.TokenGrid((5, 4), 1)]


def test_padded_images():
    model = create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=1, num_heads=3,
        dynamic_img_size=True, dynamic_img_pad=True,
    )  # fmt: skip
    tc.insert_(model, "mix_ffn")
    grids = []
    model.blocks[0].mlp.act.before.register_forward_pre_hook(lambda m, a: grids.append(a[1]))
    model(torch.zeros(1, 3, 50, 70))
    assert grids == [tc.TokenGrid((4, 5), 1)]


def test_missing_tokens_are_refused(hybrid):
    carrier_images = images_of(SIZES[0])
    hybrid.norm_pre.register_forward_hook(lambda m, a, out: out[:, :-3])
    with pytest.raises(
        tc.GridError, match=r"expected 1 prefix tokens and 4\*6 on the grid, got 22"
    ):
        hybrid(carrier_images)


def test_fx_feature_extractor_on_every_size(hybrid):
    extractor = create_feature_extractor(hybrid, ["head"])
    with torch.no_grad():
        for size in SIZES:
            (out,) = extractor(images_of(size)).values()
            assert torch.equal(out, hybrid(images_of(size)))


@pytest.mark.compile
def test_one_graph_per_size_as_in_the_unmodified_model(hybrid, dynamic_vit):
    from torch._dynamo.testing import CompileCounterWithBackend

    plain = tc.remove_(copy.deepcopy(hybrid))
    counts = []
    with torch.no_grad():
        for model in (plain, hybrid):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            for size in SIZES:
                torch.testing.assert_close(
                    compiled(images_of(size)), model(images_of(size)), rtol=1e-5, atol=1e-5
                )
            counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1] <= counts[0]


@pytest.mark.compile
def test_dynamic_export(hybrid):
    auto = torch.export.Dim.AUTO
    first = torch.cat([images_of(SIZES[0])] * 3)
    shapes = {"x": {0: auto, 2: auto, 3: auto}}
    program = torch.export.export(hybrid, (first,), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for size in SIZES:
            images = torch.cat([images_of(size)] * 2)
            torch.testing.assert_close(program(images), hybrid(images), rtol=1e-5, atol=1e-5)
