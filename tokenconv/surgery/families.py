"""What each timm family looks like: where its MLPs are and how its blocks learn the grid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from timm.layers import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.pvt_v2 import MlpWithDepthwiseConv, PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenconv.errors import SurgeryError


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place inside a model's MLP where a fragment can go."""

    name: str
    """The module that would be replaced: the activation, or the MLP's own convolution."""
    dim: int
    """Hidden width of the MLP."""
    conv: nn.Conv2d | None = None
    """The convolution that the MLP already has, if it has one."""


@dataclass(frozen=True, kw_only=True)
class GridSource:
    """Where the grid is made, and the container that hands it to the blocks."""

    module: str
    container: str
    num_prefix_tokens: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of timm models."""

    name: str
    model_class: type[nn.Module]
    sites: Callable[[nn.Module], Iterator[Site]]
    """Lists the sites, first block first; raises ``SurgeryError`` on a variant it cannot serve."""
    grid_source: Callable[[nn.Module], GridSource | None]
    """None where every site sees a map and needs no grid."""


def family_of(model: nn.Module) -> Family:
    """The family a live model belongs to.

    Raises:
        SurgeryError: If it is none that tokenconv knows.
    """
    for family in FAMILIES:
        if isinstance(model, family.model_class):
            return family
    known = " and ".join(family.name for family in FAMILIES)
    raise SurgeryError(
        f"{type(model).__name__} is not a model that tokenconv can change: expected a timm model "
        f"of the families {known}, itself and not a wrapper around it"
    )


def _vit_sites(model: nn.Module) -> Iterator[Site]:
    assert isinstance(model, VisionTransformer)
    for i, block in enumerate(model.blocks._modules.values()):
        mlp = getattr(block, "mlp", None)
        if type(mlp) is not Mlp:
            raise SurgeryError(
                f"blocks.{i} ({type(block).__name__}) has no plain timm Mlp but "
                f"{type(mlp).__name__}; tokenconv cannot put a convolution inside it"
            )
        if type(mlp.fc1) is not nn.Linear:
            raise SurgeryError(
                f"blocks.{i}.mlp.fc1 is a {type(mlp.fc1).__name__}; expected a plain nn.Linear, "
                f"so insert before wrapping it"
            )
        if next(mlp.act.parameters(), None) is not None:
            raise SurgeryError(
                f"blocks.{i}.mlp.act ({type(mlp.act).__name__}) has parameters, whose checkpoint "
                f"keys would change; build the model with an activation that has none"
            )
        yield Site(name=f"blocks.{i}.mlp.act", dim=mlp.fc1.out_features)


def _vit_grid_source(model: nn.Module) -> GridSource:
    assert isinstance(model, VisionTransformer)
    if not isinstance(model.patch_embed, PatchEmbed):
        raise SurgeryError(
            f"patch_embed is a {type(model.patch_embed).__name__}; expected a timm PatchEmbed, "
            f"which tells the size of its grid"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise SurgeryError(
            "patch dropout removes tokens, so that no grid is left to convolve; build the model "
            "with patch_drop_rate=0"
        )
    return GridSource(
        module="patch_embed", container="blocks", num_prefix_tokens=model.num_prefix_tokens
    )


def _pvt_v2_sites(model: nn.Module) -> Iterator[Site]:
    assert isinstance(model, PyramidVisionTransformerV2)
    mlps = [(name, m) for name, m in model.named_modules() if isinstance(m, MlpWithDepthwiseConv)]
    for name, mlp in mlps:
        if type(mlp.dwconv) is not nn.Conv2d:
            raise SurgeryError(
                f"{name}.dwconv is a {type(mlp.dwconv).__name__}; expected the nn.Conv2d that timm "
                f"puts there"
            )
        yield Site(name=f"{name}.dwconv", dim=mlp.dwconv.out_channels, conv=mlp.dwconv)


FAMILIES = (
    Family(
        name="VisionTransformer",
        model_class=VisionTransformer,
        sites=_vit_sites,
        grid_source=_vit_grid_source,
    ),
    Family(
        name="PyramidVisionTransformerV2",
        model_class=PyramidVisionTransformerV2,
        sites=_pvt_v2_sites,
        grid_source=lambda model: None,
    ),
)
