"""Small models to export."""

import pytest
import timm
import torch
from torch import nn

import tokenconv as tc
from tokenconv.surgery.edits import inserted_modules


def shaken(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Values in what was inserted that show in the output, always the same ones."""
    generator = torch.Generator().manual_seed(4)
    for block in inserted_modules(model).values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def hybrid() -> nn.Module:
    """A ViT of any image size, with a block of every kind."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", dynamic_img_size=True, global_pool="avg", num_classes=7)
    plan = tc.plan(model, "mix_ffn") + tc.plan(model, "separable_ffn")
    plan = plan + tc.plan(model, "peg", blocks=0)
    return shaken(tc.insert_(model, plan))


@pytest.fixture
def small() -> nn.Module:
    """A model that timm has not made, which is exported in no time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
