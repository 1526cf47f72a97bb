"""Small models of every kind that surgery knows, with weights that hide nothing."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from timm.layers import GatedMlp
from timm.models.gcvit import GlobalContextVit
from timm.models.hiera import Hiera
from timm.models.levit import Levit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.volo import VOLO
from torch import Tensor, nn

from tokenconv.surgery.edits import inserted_modules

NEWER = {
    "csatv2": "1.0.23",
    "gemma4_vit_167m": "1.0.27",
    "deepseek_vit_412m": "1.0.30",
    "qwen3_vit_88m": "1.0.30",
    "swinv2_cr_tiny_224": "1.0.31",  # these two with windows that do not divide the grid
    "swinv2_tiny_window8_256": "1.0.31",
}
"""Architectures that the lowest timm cannot build, and the first timm that can."""


@dataclass(frozen=True)
class Case:
    """A model to build, and the images that it takes."""

    architecture: str | type[nn.Module]
    kwargs: dict[str, Any]
    size: tuple[int, int]
    num_prefix_tokens: int

    def __hash__(self) -> int:
        return hash((self.architecture, self.size))

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if isinstance(self.architecture, str):
            if Version(timm.__version__) < Version(since := NEWER.get(self.architecture, "0")):
                pytest.skip(f"needs timm {since}: {self.architecture}")
            model = timm.create_model(self.architecture, num_classes=7, **self.kwargs)
        else:  # timm has no small one by name
            model = self.architecture(num_classes=7, **self.kwargs)
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

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
MIXER = {"num_blocks": 2, "embed_dim": 48, "patch_size": 16}
STAGES = {"depths": (1, 2, 1, 1)}
WINDOWS = {"embed_dim": 12, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 4), "window_size": 4}
TWINS = {"embed_dims": (16, 32, 48, 64), "num_heads": (2, 4, 3, 4)}
SERIAL = {"embed_dims": (16, 32, 32, 32), "serial_depths": (1, 1, 2, 1), "img_size": (64, 96)}
FAMILIES = {
    "vision_transformer": Case(
        "vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": (42, 70)}, (42, 70), 5
    ),
    "vision_transformer, gated": Case(
        "vit_giant_patch14_reg4_dinov2", {**SMALL, "img_size": (42, 70)}, (42, 70), 5
    ),
    "vision_transformer, post-norm": Case(
        "vit_base_patch16_rpn_224", {**SMALL, "img_size": (48, 80)}, (48, 80), 0
    ),
    "vision_transformer, parallel blocks": Case(
        "vit_small_patch16_18x2_224", {**SMALL, "img_size": (48, 80)}, (48, 80), 1
    ),
    "vision_transformer, one projection for both": Case(
        "vit_tiny_patch16_224",
        {**SMALL, "embed_dim": 96, "img_size": (48, 80), "block_fn": ParallelScalingBlock},
        (48, 80),
        1,
    ),
    "vision_transformer, hybrid embedding": Case(
        "vit_tiny_r_s16_p8_224", {**SMALL, "img_size": (64, 96)}, (64, 96), 1
    ),
    "vision_transformer, vitamin": Case(
        "vitamin_small_224", {"depth": 2, "num_heads": 6, "img_size": (64, 96)}, (64, 96), 0
    ),
    "deit": Case(
        "deit_tiny_distilled_patch16_224", {**SMALL, "img_size": (48, 80)}, (48, 80), 2
    ),
    "eva": Case("eva02_tiny_patch14_224", {**SMALL, "img_size": (42, 70)}, (42, 70), 1),
    "eva, dinov3": Case(
        "vit_small_patch16_dinov3", {**SMALL, "img_size": (48, 80)}, (48, 80), 5
    ),
    "beit": Case("beit_base_patch16_224", {**SMALL, "img_size": (48, 80)}, (48, 80), 1),
    "vision_transformer_relpos": Case(
        "vit_relpos_small_patch16_224", {**SMALL, "img_size": (48, 80)}, (48, 80), 0
    ),
    "vision_transformer_sam": Case(
        "samvit_base_patch16_224",
        {**SMALL, "img_size": (64, 96), "global_attn_indexes": (1,), "window_size": 3},
        (64, 96),
        0,
    ),
    "qwen3_vit": Case("qwen3_vit_88m", SMALL, (64, 96), 0),
    "deepseek_vit": Case("deepseek_vit_412m", {**SMALL, "embed_dim": 96}, (56, 84), 0),
    "gemma4_vit": Case("gemma4_vit_167m", SMALL, (48, 96), 0),
    "naflexvit": Case("naflexvit_base_patch16_gap", SMALL, (48, 80), 4),
    "cait": Case("cait_xxs24_224", {**SMALL, "img_size": (48, 80)}, (48, 80), 0),
    "convit": Case(
        "convit_tiny",
        {"depth": 3, "embed_dim": 12, "num_heads": 3, "local_up_to_layer": 2, "img_size": 64},
        (64, 64),
        1,
    ),
    "xcit": Case("xcit_nano_12_p8_224", SMALL, (48, 80), 0),
    "mlp_mixer": Case(MlpMixer, {**MIXER, "img_size": (64, 96)}, (64, 96), 0),
    "mlp_mixer, gated": Case(
        MlpMixer,
        {**MIXER, "img_size": (48, 80), "mlp_ratio": 6, "block_layer": SpatialGatingBlock,
         "mlp_layer": GatedMlp},
        (48, 80),
        0,
    ),
    "tnt": Case(
        "tnt_s_patch16_224",
        {"depth": 2, "embed_dim": 48, "inner_dim": 12, "num_heads_outer": 4, "img_size": (64, 96)},
        (64, 96),
        1,
    ),
    "crossvit": Case(
        "crossvit_tiny_240", {"embed_dim": (24, 48), "depth": ((1, 1, 0), (1, 2, 0))}, (240, 240), 1
    ),
    "twins": Case("twins_svt_small", {**STAGES, **TWINS}, (64, 96), 0),
    "twins, pcpvt": Case("twins_pcpvt_small", {**STAGES, **TWINS}, (64, 96), 0),
    "coat": Case("coat_tiny", {**SERIAL, "parallel_depth": 1}, (64, 96), 1),
    "coat, lite": Case("coat_lite_tiny", SERIAL, (64, 96), 1),
    "pvt_v2": CASES["pvt_v2"],
    "swin_transformer": Case(
        "swin_tiny_patch4_window7_224", {**WINDOWS, "img_size": (64, 96)}, (64, 96), 0
    ),
    "swin_transformer_v2": Case(
        "swinv2_tiny_window8_256", {**WINDOWS, "img_size": (64, 96)}, (64, 96), 0
    ),
    "swin_transformer_v2_cr": Case(
        "swinv2_cr_tiny_224", {**WINDOWS, "img_size": (64, 96)}, (64, 96), 0
    ),
    "mvitv2": Case(
        MultiScaleVit,
        {"cfg": MultiScaleVitCfg(depths=(1, 2, 2, 1), embed_dim=16), "img_size": (64, 64)},
        (64, 64),
        0,
    ),
    "tiny_vit": Case(
        "tiny_vit_5m_224",
        {**STAGES, "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4),
         "window_sizes": (3, 3, 3, 3)},
        (64, 96),
        0,
    ),
    "davit": Case(
        "davit_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)},
        (64, 96),
        0,
    ),
    "levit": Case(
        Levit,
        {"embed_dim": (32, 48, 64), "key_dim": 16, "num_heads": (2, 3, 4), "depth": (1, 1, 1),
         "img_size": (96, 128)},
        (96, 128),
        0,
    ),
    "metaformer": Case(
        MetaFormer,
        {**STAGES, "dims": (16, 32, 64, 96),
         "token_mixers": [SepConv, SepConv, Attention, Attention],
         "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2},
        (64, 96),
        0,
    ),
    "efficientformer": Case(
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 32, 32, 64)},
        (224, 224),
        0,
    ),
    "pit": Case(
        "pit_ti_224",
        {"base_dims": (16, 16, 16), "depth": (1, 2, 1), "heads": (2, 2, 2), "img_size": (96, 128)},
        (96, 128),
        1,
    ),
    "csatv2": Case(
        "csatv2",
        {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        (256, 384),
        0,
    ),
    "volo": Case(
        VOLO,
        {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)},
        (224, 224),
        0,
    ),
    "gcvit": Case(
        GlobalContextVit,
        {**STAGES, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "img_size": (64, 128)},
        (64, 128),
        0,
    ),
    "hiera": Case(
        Hiera, {"stages": (1, 2, 2, 1), "embed_dim": 16, "img_size": (64, 96)}, (64, 96), 0
    ),
    "hiera, two pools": Case(
        Hiera,
        {"stages": (1, 2, 2, 1), "embed_dim": 16, "img_size": (64, 128), "q_pool": 2},
        (64, 128),
        0,
    ),
    "hieradet_sam2": Case("sam2_hiera_tiny", {}, (128, 128), 0),
    "sequencer": Case("sequencer2d_s", {"layers": (1, 1, 1, 1)}, (64, 96), 0),
    "maxxvit": Case(
        MaxxVit,
        {"cfg": MaxxVitCfg(embed_dim=(32, 32), depths=(1, 1), block_type=("M", "M"), stem_width=16),
         "img_size": (64, 64)},
        (64, 64),
        0,
    ),
    "convnext": Case("test_convnext", {}, (64, 96), 0),
    "edgenext": Case("edgenext_xx_small", STAGES, (64, 96), 0),
}  # fmt: skip
"""A small model of every family, and of the kinds of block in it."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Case:
    return FAMILIES[request.param]


@pytest.fixture
def families() -> dict[str, Case]:
    return FAMILIES


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
        marks = (".before.", ".after.", ".beside.", ".instead.", ".added.")
        return {n: p for n, p in model.named_parameters() if any(mark in n for mark in marks)}

    return find


@pytest.fixture(scope="session")
def disturb_() -> Callable[..., nn.Module]:
    """Gives inserted parameters values that show, always the same ones."""

    def disturb(model: nn.Module, std: float = 0.3) -> nn.Module:
        generator = torch.Generator().manual_seed(4)
        for block in inserted_modules(model).values():
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=std, generator=generator)
        return model

    return disturb


@pytest.fixture
def in_two_threads() -> Callable[..., None]:
    """Runs a model in two threads at once, and compares with running it alone."""

    def run(model: nn.Module, first: torch.Tensor, second: torch.Tensor, count: int) -> None:
        with torch.no_grad():
            expected = [model(first), model(second)]
        wrong, barrier = [], threading.Barrier(2)

        def work(images: torch.Tensor, alone: torch.Tensor) -> None:
            barrier.wait()
            with torch.no_grad():
                for _ in range(count):
                    if not torch.allclose(model(images), alone, rtol=1e-4, atol=1e-4):
                        wrong.append(tuple(images.shape))

        pairs = zip((first, second), expected, strict=True)
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    return run
