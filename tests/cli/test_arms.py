"""What a hybrid is compared with: learned positions, naive copies, other models, compiled arms."""

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.cli.arms import build_arms
from tokenconv.cli.inputs import build_model
from tokenconv.errors import MeasurementError, UnknownNameError


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def test_positions_stand_in_front_of_every_stage_of_a_pyramid():
    model = build_model("pvt_v2_b0", (64, 96)).eval()
    arms = build_arms(model, ["mix_ffn"], beside=["position"], image_size=(64, 96)).models
    assert list(arms) == ["attention_only", "original", "mix_ffn", "attention_only_position"]
    with_positions = arms["attention_only_position"].eval()
    found = {
        name: module.size
        for name, module in with_positions.named_modules()
        if isinstance(module, tc.BLOCKS["abs_pos_embed"].factory)
    }
    assert found == {
        f"stages.{i}.blocks.0.before": (64 // 2**k, 96 // 2**k) for i, k in enumerate((2, 3, 4, 5))
    }
    with torch.no_grad():
        expected = arms["attention_only"].eval()(images(64, 96))
        assert torch.equal(with_positions(images(64, 96)), expected)
        assert not torch.equal(arms["original"].eval()(images(64, 96)), expected)
    assert not any(".dwconv." in key for key in with_positions.state_dict())


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("test_vit", (160, 160), (10, 10)),
        ("swin_tiny_patch4_window7_224", (224, 224), (56, 56)),
        ("deit3_small_patch16_224", (224, 224), (14, 14)),
    ],
)
def test_positions_have_the_grid_of_the_tokens(name: str, size: tuple[int, int], grid: tuple):
    model = timm.create_model(name).eval()
    arms = build_arms(model, [], beside=["position"], image_size=size).models
    found = [
        module.size
        for module in arms["baseline_position"].modules()
        if isinstance(module, tc.BLOCKS["abs_pos_embed"].factory)
    ]
    assert found[0] == grid
    with torch.no_grad():
        assert torch.equal(arms["baseline_position"].eval()(images(*size)), model(images(*size)))


@pytest.mark.parametrize("name", ["test_vit", "pvt_v2_b0"])
def test_naive_copies_compute_the_same(name: str):
    model = build_model(name, (160, 160)).eval()
    arms = build_arms(model, ["mix_ffn"], beside=["naive"], image_size=(160, 160)).models
    torch.manual_seed(1)
    hybrid = arms["mix_ffn"].eval()
    for module in hybrid.modules():
        if isinstance(module, tc.DWConv):
            nn.init.normal_(module.weight, std=0.1)
    naive = arms["mix_ffn_naive"].eval()
    naive.load_state_dict(hybrid.state_dict())
    with torch.no_grad():
        expected = hybrid(images(160, 160))
        torch.testing.assert_close(naive(images(160, 160)), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, model(images(160, 160)), rtol=1e-4, atol=1e-5)
    traffic = [tc.cost(arm, (3, 160, 160)).bytes for arm in (hybrid, naive)]
    assert traffic[0] < traffic[1], "the copies"


def test_other_models_stand_beside_at_the_same_size():
    model = build_model("pvt_v2_b0", (64, 64))
    arms = build_arms(model, ["mix_ffn"], beside=["pvt_v2_b1"], image_size=(64, 64)).models
    assert list(arms)[-1] == "pvt_v2_b1"
    plain = timm.create_model("pvt_v2_b1")
    assert arms["pvt_v2_b1"].state_dict().keys() == plain.state_dict().keys()


def test_other_models_have_as_many_classes():
    """timm's TinyViT has those of ImageNet-22k."""
    model = build_model("test_vit")
    beside = build_arms(model, [], beside=["tiny_vit_5m_224"], image_size=(160, 160))
    assert beside.models["tiny_vit_5m_224"].num_classes == model.num_classes == 1000


def test_what_cannot_stand_beside():
    vit = build_model("test_vit")
    options = {"image_size": (160, 160)}
    with pytest.raises(UnknownNameError, match="unknown model 'naiv': "):
        build_arms(vit, ["mix_ffn"], beside=["naiv"], **options)
    with pytest.raises(MeasurementError, match="no arm has a depthwise convolution to copy tokens"):
        build_arms(vit, [], beside=["naive"], **options)
    coat = build_model("coat_lite_tiny", (64, 64))  # its blocks have other names
    with pytest.raises(MeasurementError, match=r"no blocks\.0 in the model"):
        build_arms(coat, [], beside=["position"], image_size=(64, 64))


def test_every_arm_is_described():
    model = build_model("pvt_v2_b0", (64, 64))
    beside = ["position", "naive", "pvt_v2_b1"]
    built = build_arms(model, ["mix_ffn"], beside=beside, image_size=(64, 64))
    assert built.reference == "original"
    assert built.descriptions == {
        "attention_only": "pvt_v2_b0 without the convolutions in its MLPs",
        "original": "pvt_v2_b0 as timm has it, with convolutions in its MLPs",
        "mix_ffn": "original with 8 mix_ffn (fc2(act(DWConv(fc1(x)))); PVT v2) at merge_conv",
        "attention_only_position": (
            "attention_only with a learned position embedding in front of every stage"
        ),
        "mix_ffn_naive": "mix_ffn, whose depthwise convolutions copy tokens to maps and back",
        "pvt_v2_b1": "pvt_v2_b1 as timm has it, of other size and weights",
    }
    assert built.models.keys() == built.descriptions.keys()
    built = build_arms(build_model("test_vit"), ["peg"], image_size=(160, 160))
    assert built.descriptions["baseline"] == "test_vit as timm has it"
    assert built.reference == "baseline"
