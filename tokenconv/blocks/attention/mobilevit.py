"""MobileViT's blocks: convolutions around a small Transformer between patches.

Shape letters: B batch, C channels, D channels of the Transformer, L layers, K kernel side, p patch
side: pixels at the same place of all patches attend to each other.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenconv.blocks.attention.base import attend, heads_of
from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import conv, depthwise
from tokenconv.blocks.maps import Mixer
from tokenconv.blocks.starts import init_linears_


class _Patched(Mixer):
    """What both have in common: no residual."""

    init = staticmethod(init_linears_)

    def shortcut(self, dim: int, out_dim: int, stride: int) -> None:
        """None."""
        raise ValueError("expected residual=False: the block has none")


class MobileViT(_Patched):
    """Block of MobileViT, in place of a convolution: local, then between patches, then both.

    ``y = conv1x1(SiLU(BN(conv(x))))``; Transformer layers with LN in front of attention and MLP
    (SiLU) between the pixels at the same place of all ``p x p`` patches, and LN; ``y =
    SiLU(BN(conv1x1(y)))``; ``SiLU(BN(conv([x, y])))``. No residual. A grid that patches do not
    divide is resized before the layers and back behind them, bilinearly with
    ``align_corners=False``. The paper has no prefix tokens, and there is no patch for them.
    Parameters: ``K*K*C*C + 2*C + C*D + L*((4 + 2*r)*D*D + (9 + r)*D) + 2*D + D*C + 2*C
    + K*K*2*C*C + 2*C`` with ``r = mlp_ratio``.

    Args besides those of ``Mixer``:
        transformer_dim: Width D; None takes ``dim``.
        transformer_depth: Layers L.
        mlp_ratio: Hidden width of the layers over D.
        num_heads: Heads of the layers.
        patch_size: Side p.

    References:
        https://arxiv.org/abs/2110.02178
    """

    def mix(
        self,
        dim: int,
        side: int,
        transformer_dim: int | None = None,
        transformer_depth: int = 2,
        mlp_ratio: float = 2.0,
        num_heads: int = 4,
        patch_size: int = 2,
    ) -> Steps:
        """See the class."""
        width = transformer_dim or dim
        layers = [_Layer(width, num_heads, mlp_ratio) for _ in range(transformer_depth)]
        return {
            "conv_kxk": _convolved(conv(dim, dim, side), dim),
            "conv_1x1": conv(dim, width),
            "transformer": _BetweenPatches(patch_size, *layers, nn.LayerNorm(width)),
            "conv_proj": _convolved(conv(width, dim), dim),
        }

    def behind(self, out_dim: int) -> nn.Module:
        """What sees both."""
        assert isinstance(self.kernel_size, int)
        return _convolved(conv(2 * out_dim, out_dim, self.kernel_size), out_dim)

    def run(self, fmap: Tensor) -> Tensor:
        """See the class."""
        assert self.after is not None
        return self.after(torch.cat([fmap, self.body(fmap)], dim=1))

    def init_neutral_(self) -> None:
        """Make what comes out zero, by the last norm; the others start anew."""
        assert isinstance(self.after, nn.Sequential)
        type(self).reset_parameters(self)  # surgery hides it
        for parameter in self.after[1].parameters():
            nn.init.zeros_(parameter)


class MobileViTV2(_Patched):
    """Block of MobileViTv2: attention with one score per pixel, and no fusion.

    ``y = conv1x1(SiLU(BN(DWConv(x))))``; Transformer layers with GroupNorm in front of attention
    and MLP (SiLU) on the pixels at the same place of all ``p x p`` patches, and GroupNorm;
    ``BN(conv1x1(y))``. Attention: ``s, k, v = conv1x1(y)`` with one channel of s;
    ``conv1x1(ReLU(v) * sum(softmax(s) * k))``. No residual. A grid that patches do not divide is
    resized first, bilinearly with ``align_corners=True``; the paper's code leaves it so, here it is
    resized back. The paper has no prefix tokens, and there is no patch for them. Parameters:
    ``K*K*C + 2*C + C*D + L*((3 + 2*r)*D*D + (9 + r)*D + 1) + 2*D + D*C + 2*C`` with
    ``r = mlp_ratio``.

    Args besides those of ``Mixer``:
        transformer_dim: Width D; None takes ``dim``.
        transformer_depth: Layers L.
        mlp_ratio: Hidden width of the layers over D.
        patch_size: Side p.

    References:
        https://arxiv.org/abs/2206.02680
    """

    def mix(
        self,
        dim: int,
        side: int,
        transformer_dim: int | None = None,
        transformer_depth: int = 2,
        mlp_ratio: float = 2.0,
        patch_size: int = 2,
    ) -> Steps:
        """See the class."""
        self.patch_size = patch_size
        width = transformer_dim or dim
        layers = [_LinearLayer(width, mlp_ratio) for _ in range(transformer_depth)]
        return {
            "conv_kxk": _convolved(depthwise(dim, side), dim),
            "conv_1x1": conv(dim, width),
            "transformer": _BetweenPatches(patch_size, *layers, nn.GroupNorm(1, width), maps=True),
            "conv_proj": conv(width, dim),
            "norm": nn.BatchNorm2d(dim),
        }

    def run(self, fmap: Tensor) -> Tensor:
        """See the class."""
        return _resized_to(self.body(_divisible(fmap, self.patch_size, True)), fmap, True)


def _convolved(layer: nn.Conv2d, dim: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(dim), nn.SiLU())


class _BetweenPatches(nn.Sequential):
    """Layers on the pixels at the same place of all patches.

    They are given tokens ``(B*p*p, patches, D)``, or with ``maps`` ``(B, D, p*p, patches)``.
    """

    def __init__(self, patch_size: int, *layers: nn.Module, maps: bool = False):
        super().__init__(*layers)
        if patch_size < 1:
            raise ValueError(f"expected patch_size >= 1, got {patch_size}")
        self.patch_size, self.maps = patch_size, maps

    def forward(self, input: Tensor) -> Tensor:
        """Cut into patches, run, and put together again."""
        out = super().forward(_patches(input, self.patch_size, self.maps))
        return _from_patches(out, input, self.patch_size, self.maps)


def _layout(maps: bool) -> str:
    return "b c (h w) (i j)" if maps else "(b h w) (i j) c"


@torch.fx.wrap
def _patches(fmap: Tensor, patch_size: int, maps: bool) -> Tensor:
    fmap = _divisible(fmap, patch_size, False)
    pattern = f"b c (i h) (j w) -> {_layout(maps)}"
    return rearrange(fmap, pattern, h=patch_size, w=patch_size)


@torch.fx.wrap
def _from_patches(x: Tensor, like: Tensor, patch_size: int, maps: bool) -> Tensor:
    rows, cols = (-(-side // patch_size) for side in like.shape[2:])
    pattern = f"{_layout(maps)} -> b c (i h) (j w)"
    fmap = rearrange(x, pattern, h=patch_size, w=patch_size, i=rows, j=cols)
    return _resized_to(fmap, like, False)


@torch.fx.wrap
def _divisible(fmap: Tensor, patch_size: int, align_corners: bool) -> Tensor:
    """A map that patches divide, which may be a little larger."""
    size = [-(-side // patch_size) * patch_size for side in fmap.shape[2:]]
    return _resized(fmap, size, align_corners)


@torch.fx.wrap
def _resized_to(fmap: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    return _resized(fmap, list(like.shape[2:]), align_corners)


def _resized(fmap: Tensor, size: list[int], align_corners: bool) -> Tensor:
    if list(fmap.shape[2:]) == size:
        return fmap
    return F.interpolate(fmap, size, mode="bilinear", align_corners=align_corners)


class _Layer(nn.Module):
    """``x + attention(LN(x))``, then ``x + MLP(LN(x))``."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = heads_of(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Run on tokens."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(attend(q, k, v, self.num_heads))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class _LinearLayer(nn.Module):
    """The same with one score per pixel, on maps ``(B, D, p*p, patches)``."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.widths = [1, dim, dim]
        self.norm1 = nn.GroupNorm(1, dim)
        self.qkv = conv(dim, 1 + 2 * dim, bias=True)
        self.proj = conv(dim, dim, bias=True)
        self.norm2 = nn.GroupNorm(1, dim)
        self.fc1 = conv(dim, int(dim * mlp_ratio), bias=True)
        self.act = nn.SiLU()
        self.fc2 = conv(int(dim * mlp_ratio), dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run on maps."""
        score, k, v = self.qkv(self.norm1(x)).split(self.widths, dim=1)
        context = (k * score.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        x = x + self.proj(v.relu() * context)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))
