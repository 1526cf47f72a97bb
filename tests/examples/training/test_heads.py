"""Heads on tokens, and windows over pictures."""

import pytest
import timm
import torch
from torch.nn import functional
from training.errors import TrainingError
from training.heads import LinearHead, PyramidHead, Segmenter, slide


@pytest.mark.parametrize("head", [LinearHead, PyramidHead])
@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", (64, 48), {"img_size": (64, 48), "depth": 4}),
        ("vit_tiny_patch16_224", (40, 56), {"img_size": (40, 56), "patch_size": 8, "depth": 5}),
        ("vit_small_patch14_reg4_dinov2", (42, 70), {"img_size": (42, 70), "depth": 4}),
    ],
)
def test_heads_give_logits_of_every_pixel_at_any_stride(head, name, size, kwargs):
    model = Segmenter(timm.create_model(name, num_classes=0, **kwargs), head, 7)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 7, *size)
    logits.sum().backward()
    missing = [n for n, p in model.head.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_a_linear_head_is_a_linear_layer_on_the_last_tokens():
    vit = timm.create_model("test_vit", num_classes=0).eval()
    model = Segmenter(vit, LinearHead, 5).eval()
    images = torch.randn(2, 3, 160, 160)
    norm, layer = model.head.classifiers[0]
    torch.nn.init.normal_(norm.weight)
    tokens = vit.forward_features(images)[:, 1:]
    tokens = functional.layer_norm(tokens, (64,), norm.weight, norm.bias, norm.eps)
    tokens = tokens @ layer.weight[:, :, 0, 0].T + layer.bias
    maps = tokens.unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    expected = functional.interpolate(maps, (160, 160), mode="bilinear")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_a_linear_head_adds_up_the_stages_of_a_pyramid():
    model = Segmenter(timm.create_model("pvt_v2_b0", num_classes=0), LinearHead, 3)
    assert [layer[1].in_channels for layer in model.head.classifiers] == [32, 64, 160, 256]
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)


def test_what_a_head_does_not_take_is_told():
    with pytest.raises(TrainingError, match="PyramidVisionTransformerV2 is a pyramid: use the lin"):
        Segmenter(timm.create_model("pvt_v2_b0", num_classes=0), PyramidHead, 3)
    with pytest.raises(TrainingError, match="PyramidHead needs 4 blocks, the model has 2"):
        Segmenter(timm.create_model("vit_tiny_patch16_224", depth=2), PyramidHead, 3)
    with pytest.raises(TrainingError, match="Linear gives no maps of its layers"):
        Segmenter(torch.nn.Linear(2, 2), LinearHead, 3)


@pytest.mark.parametrize(
    ("size", "window"), [((37, 50), (16, 20)), ((16, 20), (16, 20)), ((9, 33), (16, 12))]
)
def test_windows_of_a_pointwise_model_give_what_it_gives_of_the_whole(size, window):
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64)
    sizes = []

    def model(x):
        sizes.append(x.shape[2:])
        return functional.conv2d(x, weight)

    torch.testing.assert_close(slide(model, images, window), functional.conv2d(images, weight))
    assert {*sizes} == {window}


def test_windows_are_averaged_where_they_overlap():
    answers = iter(torch.full((1, 1, 2, 4), float(i)) for i in (1, 2, 4))
    found = slide(lambda x: next(answers), torch.zeros(1, 3, 2, 9), (2, 4), stride=(2, 3))
    assert found[0, 0, 0].tolist() == [1, 1, 1, 1.5, 2, 3, 3, 4, 4]
