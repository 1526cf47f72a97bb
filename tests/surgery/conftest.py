"""Small models of every kind that surgery knows, with weights that hide nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model to build, and the images that it takes."""

    architecture: str
    kwargs: dict[str, Any]
    size: tuple[int, int]
    num_prefix_tokens: int

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(self.architecture, num_classes=7, **self.kwargs)
        randomize_(model)
        return model.eval()

    def images(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, *self.size, generator=generator).to(dtype)


def randomize_(module: nn.Module, std: float = 0.15) -> None:
    """Random weights and biases; LayerScale and norms around 1, so that nothing is hidden."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            if "gamma" in name or ("norm" in name and name.endswith("weight")):
                parameter.add_(1)


VIT = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": (48, 80)}
PVT = {"depths": (1, 2, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)}
CASES = {
    "vit": Case("vit_tiny_patch16_224", VIT, (48, 80), 1),
    "no class token": Case(
        "vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, (48, 80), 0
    ),
    "distilled": Case("deit_tiny_distilled_patch16_224", VIT, (48, 80), 2),
    "registers and LayerScale": Case(
        "vit_small_patch14_reg4_dinov2", {**VIT, "img_size": (42, 70)}, (42, 70), 5
    ),
    "dynamic size": Case(
        "vit_tiny_patch16_224", {**VIT, "img_size": 64, "dynamic_img_size": True}, (48, 80), 1
    ),
    "qk-norm": Case(
        "vit_tiny_patch16_224", {**VIT, "qk_norm": True, "init_values": 1.0}, (48, 80), 1
    ),
    "pvt_v2": Case("pvt_v2_b0", PVT, (64, 96), 0),
    "pvt_v2 linear": Case("pvt_v2_b2_li", PVT, (64, 96), 0),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def vit() -> nn.Module:
    return CASES["vit"].build()


@pytest.fixture
def pvt() -> nn.Module:
    return CASES["pvt_v2"].build()


@pytest.fixture
def dynamic_vit() -> nn.Module:
    """Average-pooled, so that every block reaches the logits."""
    case = CASES["dynamic size"]
    pooled = {**case.kwargs, "global_pool": "avg"}
    return Case(case.architecture, pooled, case.size, 1).build()


@pytest.fixture
def inserted_parameters() -> Callable[[nn.Module], dict[str, nn.Parameter]]:
    def find(model: nn.Module) -> dict[str, nn.Parameter]:
        marks = (".act.before.", ".dwconv.added.")
        return {n: p for n, p in model.named_parameters() if any(mark in n for mark in marks)}

    return find
