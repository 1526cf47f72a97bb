"""Stems: what makes tokens of an image, or fewer tokens of many, by convolution.

Shape letters: B batch, I channels that come in, H rows, W columns, N tokens that come out, C
channels, K kernel side, w width inside.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tokenconv.blocks.chain import (
    Steps,
    init_by_group_,
    init_kaiming_,
    init_torch_,
    init_truncated_,
)
from tokenconv.blocks.map_layers import LayerNorm2d
from tokenconv.blocks.maps import (
    Parallel,
    checked,
    conv,
    fold_convs_,
    grid_behind,
    lay_out,
    line_up,
)
from tokenconv.blocks.separable import InvertedResidual
from tokenconv.grid import Grid, MultiGrid, TokenGrid, map_to_tokens
from tokenconv.layers import GridModule


class Stem(GridModule):
    """Steps that make a smaller map of an image or a map; common to the stems.

    ``stem(images)`` takes ``(B, I, H, W)`` and gives ``(tokens, TokenGrid)``, the tokens ``(B, N,
    C)``; ``stem.run(images)`` gives them as a map ``(B, C, rows, columns)``. Between the stages of
    a pyramid, ``stem(x, *grid)`` takes tokens of I channels, without prefix tokens unless C is I.

    Args:
        dim: Channels C that come out.
        in_chans: Channels I that come in.
        **own: Arguments that only one stem has.

    Raises:
        ValueError: If a width is not positive, or an argument does not fit the stem.
        GridError: If what comes has another width, or does not fill its grid.
        TypeError: If the stem has no such argument.
    """

    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_torch_)
    """How the paper's code starts the weights."""

    def __init__(self, dim: int, *, in_chans: int = 3, **own: Any):
        super().__init__()
        if min(dim, in_chans) < 1:
            raise ValueError(f"expected positive dim and in_chans, got {dim=}, {in_chans=}")
        self.dim, self.in_chans = dim, in_chans
        steps = self.steps(dim, in_chans, **own)
        self.body = nn.Sequential(OrderedDict((k, v) for k, v in steps.items() if v is not None))
        self.reset_parameters()

    def steps(self, dim: int, in_chans: int) -> Steps:
        """The paper's steps on maps, in their order."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)

    def run(self, images: Tensor) -> Tensor:
        """The tokens of images, as a map."""
        return self.body(checked(images, self.in_chans))

    def forward(self, x: Tensor, *grid: Grid) -> Any:
        """Tokens and their grid; see the class."""
        if not grid:
            return tokens_and_grid(self.run(x))
        fmap = self.run(lay_out(x, grid, self.in_chans))
        return line_up(fmap, x, grid, "pass"), grid_behind(fmap, grid)

    def fold_(self) -> bool:
        """Fold every ``BatchNorm`` behind a convolution into it, in place, for inference.

        Branches that merge become one convolution first. Equal in real arithmetic; the keys of
        what is folded go with it.

        Returns:
            Whether anything changed.

        Raises:
            ValueError: In training mode, or if values are stored in fewer than 32 bits.
        """
        return fold_convs_(self)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.dim}, in_chans={self.in_chans}"


def tokens_and_grid(fmap: Tensor) -> tuple[Tensor, TokenGrid]:
    """A map as tokens."""
    return map_to_tokens(fmap), TokenGrid(fmap.shape[2:])


for _checks in ("checked", "lay_out", "line_up", "grid_behind", "tokens_and_grid"):
    torch.fx.wrap(_checks)  # they cannot be traced symbolically


# --- parts ---


def _patches(dim: int, out_dim: int, side: int, *, bias: bool = True) -> nn.Conv2d:
    """A convolution whose windows touch, and do not overlap."""
    return nn.Conv2d(dim, out_dim, side, side, bias=bias)


def _row(
    widths: Sequence[int],
    side: int,
    strides: Sequence[int],
    act: Callable[[], nn.Module],
    *,
    bias: bool = False,
    act_first: bool = False,
) -> dict[str, nn.Module]:
    """Convolutions from width to width, each with a BatchNorm and an activation behind it."""
    if min(widths, default=0) < 1:
        raise ValueError(f"expected positive widths, got {tuple(widths[1:])}")
    steps: dict[str, nn.Module] = {}
    for i, ((dim, out_dim), stride) in enumerate(zip(pairwise(widths), strides, strict=True), 1):
        steps[f"conv{i}"] = conv(dim, out_dim, side, stride=stride, bias=bias)
        behind = {f"norm{i}": nn.BatchNorm2d(out_dim), f"act{i}": act()}
        steps |= dict(reversed(behind.items())) if act_first else behind
    return steps


# --- one convolution ---


class PatchEmbed(Stem):
    """Patches that overlap: PVTv2's, SegFormer's and TransNeXt's embedding of every stage.

    ``conv (stride) -> LN``, zero-padded by ``K // 2``, which makes ``ceil(H / stride)`` rows. The
    first stage has the defaults, later ones ``kernel_size=3, stride=2``. Parameters:
    ``K*K*I*C + 3*C``. Weights start from a normal of std ``sqrt(2 / (K*K*C))``.

    Args besides those of ``Stem``:
        kernel_size: Kernel side K; None takes the paper's.
        stride: Step over the image; None takes the paper's.
        padding: Zeros around it; None takes the paper's.
        norm: Whether a LayerNorm follows.
        pre_norm: Put the norm, over the I channels, in front of the convolution.

    References:
        PVTv2, https://arxiv.org/abs/2106.13797; SegFormer, https://arxiv.org/abs/2105.15203;
        TransNeXt, https://arxiv.org/abs/2311.17132
    """

    init = staticmethod(init_by_group_)
    kernel_size: int = 7
    """Of the class: the paper's."""
    stride: int = 4
    """Of the class: the paper's."""
    eps: ClassVar[float] = 1e-5
    norm_bias: ClassVar[bool] = True

    def steps(
        self,
        dim: int,
        in_chans: int,
        kernel_size: int | None = None,
        stride: int | None = None,
        padding: int | None = None,
        norm: bool = True,
        pre_norm: bool = False,
    ) -> Steps:
        """See the class."""
        self.kernel_size = side = self.kernel_size if kernel_size is None else kernel_size
        self.stride = stride = self.stride if stride is None else stride
        padding = self.padding_of(side, stride) if padding is None else padding
        if min(side, stride) < 1 or padding < 0:
            raise ValueError(
                f"expected positive kernel_size and stride, and padding, got {kernel_size=}, "
                f"{stride=}, {padding=}"
            )
        if pre_norm and not norm:
            raise ValueError("expected norm=True for pre_norm=True, got norm=False")
        width = in_chans if pre_norm else dim
        made = LayerNorm2d(width, self.eps, bias=self.norm_bias) if norm else None
        return {
            "pre_norm": made if pre_norm else None,
            "proj": nn.Conv2d(in_chans, dim, side, stride, padding),
            "norm": None if pre_norm else made,
        }

    @staticmethod
    def padding_of(side: int, stride: int) -> int:
        """The paper's padding."""
        return side // 2


class ConvEmbed(PatchEmbed):
    """CvT's convolutional token embedding: padded by 2 where PVTv2's is padded by 3.

    As ``PatchEmbed``, but for ``(K - stride + 1) // 2`` zeros around, and weights that start as in
    torch. Later stages have ``kernel_size=3, stride=2``.

    References:
        https://arxiv.org/abs/2103.15808
    """

    init = staticmethod(init_torch_)

    @staticmethod
    def padding_of(side: int, stride: int) -> int:
        """The paper's padding."""
        return (side - stride + 1) // 2


class MetaFormerStem(ConvEmbed):
    """ConvFormer's and CAFormer's stem, and between stages its downsampling.

    As ``ConvEmbed``, but for a LayerNorm without bias, of eps 1e-6. Between stages
    ``kernel_size=3, stride=2, pre_norm=True``. Weights start from a truncated normal of std 0.02.
    Parameters: ``K*K*I*C + 2*C``.

    References:
        https://arxiv.org/abs/2210.13452
    """

    init = staticmethod(init_truncated_)
    eps = 1e-6
    norm_bias = False


class ConvNeXtStem(ConvEmbed):
    """ConvNeXt's patches of 4, and between stages its downsampling.

    ``conv (K = stride) -> LN``; between stages ``kernel_size=2, stride=2, pre_norm=True``, and
    ``norm=False, kernel_size=16, stride=16`` is the patch embedding of ViT. Weights start from a
    truncated normal of std 0.02. Parameters: ``K*K*I*C + 3*C``.

    References:
        https://arxiv.org/abs/2201.03545
    """

    init = staticmethod(init_truncated_)
    kernel_size = 4
    eps = 1e-6


# --- several ---


class EarlyConv(Stem):
    """Early convolutions: they take the place of a ViT's patches of 16, and of one of its blocks.

    ``conv (stride 2) -> BN -> ReLU`` for each of the widths, then a 1x1 convolution to C. All
    without bias but the last. Four widths make ``ceil(H / 16)`` rows. The last weights start from
    a normal of std ``sqrt(2 / C)``, the others as in torch.

    Args besides those of ``Stem``:
        widths: Channels behind each 3x3 convolution; the paper's of 1 GF are 24, 48, 96, 192.
        kernel_size: Odd kernel side K.
        act_layer: Makes the activations.

    References:
        https://arxiv.org/abs/2106.14881
    """

    def steps(
        self,
        dim: int,
        in_chans: int,
        widths: Sequence[int] = (48, 96, 192, 384),
        kernel_size: int = 3,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ) -> Steps:
        """See the class."""
        row = _row((in_chans, *widths), kernel_size, [2] * len(widths), act_layer)
        return {**row, "proj": conv(widths[-1], dim, bias=True)}

    def reset_parameters(self) -> None:
        """Initialise as torchvision does."""
        super().reset_parameters()
        init_kaiming_(self.body.get_submodule("proj"))


class CCTTokenizer(Stem):
    """Tokenizer of the Compact Convolutional Transformer.

    ``conv (K, stride max(1, K // 2 - 1)) -> ReLU -> max of 3x3 (stride 2)``, once or several times;
    no bias, no norm. Weights start from a Kaiming normal over the inputs. Twice 7x7 makes
    ``ceil(H / 16)`` rows. Parameters, twice: ``K*K*w*(I + C)``.

    Args besides those of ``Stem``:
        kernel_size: Kernel side K.
        num_layers: How often.
        width: Channels w in between.

    References:
        https://arxiv.org/abs/2104.05704
    """

    def steps(
        self, dim: int, in_chans: int, kernel_size: int = 7, num_layers: int = 2, width: int = 64
    ) -> Steps:
        """See the class."""
        if min(kernel_size, num_layers, width) < 1:
            raise ValueError(
                f"expected positive numbers, got {kernel_size=}, {num_layers=}, {width=}"
            )
        side, stride, around = kernel_size, max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
        steps: dict[str, nn.Module] = {}
        for i, (a, b) in enumerate(pairwise((in_chans, *[width] * (num_layers - 1), dim)), 1):
            steps[f"conv{i}"] = nn.Conv2d(a, b, side, stride, around, bias=False)
            steps[f"act{i}"] = nn.ReLU()
            steps[f"pool{i}"] = nn.MaxPool2d(3, 2, 1)
        return steps

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        for part in self.body:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)


class CeiTStem(Stem):
    """Image-to-tokens of CeiT: patches of a small map of features, and not of the image.

    ``conv (7x7, stride 2) -> BN -> max of 3x3 (stride 2) -> conv (4x4, stride 4)``; no activation,
    and a bias in the last one only. ``ceil(H / 4)`` rows of the small map, of which every four make
    one. Parameters: ``49*I*w + 2*w + 16*w*C + C``.

    Args besides those of ``Stem``:
        width: Channels w of the small map.
        patch_size: Side of its patches.

    References:
        https://arxiv.org/abs/2103.11816
    """

    def steps(self, dim: int, in_chans: int, width: int = 64, patch_size: int = 4) -> Steps:
        """See the class."""
        return {
            "conv": conv(in_chans, width, 7, stride=2),
            "norm": nn.BatchNorm2d(width),
            "pool": nn.MaxPool2d(3, 2, 1),
            "proj": _patches(width, dim, patch_size),
        }


class XCiTStem(Stem):
    """Convolutional patch embedding of XCiT.

    ``conv (3x3, stride 2) -> BN`` four times for patches of 16, three times for those of 8, with
    GELU in between; the width doubles up to C. No biases; ``ceil(H / 16)`` rows. The paper's norms
    see the images of all devices, for which there is ``nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args besides those of ``Stem``:
        patch_size: A power of 2 above 1.
        act_layer: Makes the activations.

    Raises:
        ValueError: If the patch size is none, or C cannot be halved that often.

    References:
        https://arxiv.org/abs/2106.09681
    """

    def steps(
        self,
        dim: int,
        in_chans: int,
        patch_size: int = 16,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> Steps:
        """See the class."""
        count = patch_size.bit_length() - 1
        if count < 1 or patch_size != 2**count:
            raise ValueError(f"expected a power of 2 as patch_size, got {patch_size}")
        widths = [dim // 2**i for i in reversed(range(count))]
        steps = _row((in_chans, *widths), 3, [2] * count, act_layer)
        steps.pop(f"act{count}")
        return steps


class CMTStem(Stem):
    """Stem of CMT, with the embedding of its first stage.

    ``conv (3x3) -> GELU -> BN`` three times, the first with stride 2, then ``conv (2x2, stride 2)
    -> LN``; all with biases. Later stages are ``patch_embed(kernel_size=2, stride=2, padding=0)``.
    Weights start from a Kaiming normal over the outputs.

    Args besides those of ``Stem``:
        width: Channels w of the stem: 16 in the paper's Ti and XS, 32 in S, 38 in B.

    References:
        https://arxiv.org/abs/2107.06263
    """

    init = staticmethod(init_kaiming_)

    def steps(self, dim: int, in_chans: int, width: int = 32) -> Steps:
        """See the class."""
        widths = (in_chans, width, width, width)
        return {
            **_row(widths, 3, (2, 1, 1), nn.GELU, bias=True, act_first=True),
            "proj": _patches(width, dim, 2),
            "norm": LayerNorm2d(dim),
        }


class Conv2FormerStem(Stem):
    """Stem of Conv2Former.

    ``conv (3x3, stride 2) -> GELU -> BN -> conv (3x3) -> GELU -> BN -> conv (2x2, stride 2)``, of
    width ``w = C // 2``, without biases. Between stages there is ``convnext_stem(kernel_size=2,
    stride=2, pre_norm=True)``. Weights start from a truncated normal of std 0.02. Parameters:
    ``9*I*w + 9*w*w + 4*w + 4*w*C``.

    References:
        https://arxiv.org/abs/2211.11943
    """

    init = staticmethod(init_truncated_)

    def steps(self, dim: int, in_chans: int) -> Steps:
        """See the class."""
        width = dim // 2
        return {
            **_row((in_chans, width, width), 3, (2, 1), nn.GELU, act_first=True),
            "proj": _patches(width, dim, 2, bias=False),
        }


class ShuntedStem(Stem):
    """Head of the Shunted Transformer, and with ``kernel_size=3`` that of SMT.

    ``conv (KxK, stride 2) -> BN -> ReLU``, some times ``conv (3x3) -> BN -> ReLU``, then ``conv
    (2x2, stride 2) -> LN``; of width C throughout, with a bias in the last one only. Weights start
    from a normal of std ``sqrt(2 / (K*K*C))``. Parameters: ``K*K*I*C + 2*C + 4*C*C + 3*C``, and
    ``9*C*C + 2*C`` each time.

    Args besides those of ``Stem``:
        kernel_size: Odd side K of the first kernel.
        depth: How often a 3x3 convolution follows: 0, 1 and 2 in the paper's T, S and B.

    References:
        Shunted Transformer, https://arxiv.org/abs/2111.15193; SMT, https://arxiv.org/abs/2307.08579
    """

    init = staticmethod(init_by_group_)

    def steps(self, dim: int, in_chans: int, kernel_size: int = 7, depth: int = 0) -> Steps:
        """See the class."""
        if depth < 0 or kernel_size % 2 == 0:
            raise ValueError(f"expected depth >= 0 and an odd side, got {depth=}, {kernel_size=}")
        first = _row((in_chans, dim), kernel_size, [2], nn.ReLU)
        more = _row([dim] * (depth + 1), 3, [1] * depth, nn.ReLU)
        return {
            **{f"{name[:-1]}0": step for name, step in first.items()},
            **more,
            "proj": _patches(dim, dim, 2),
            "norm": LayerNorm2d(dim),
        }


class MobileViTStem(Stem):
    """Stem of MobileViT: a convolution, then inverted residuals of MobileNetV2 with SiLU.

    ``conv (3x3, stride 2) -> BN -> SiLU``, then inverted residuals from one width to the other,
    to C with stride 2, and ``depth`` more. Makes ``ceil(H / 4)`` rows.

    Args besides those of ``Stem``:
        widths: Channels behind the first convolution and the first block; 16 and 16 in the paper's
            XXS.
        depth: How many blocks follow the second stride.
        expand_ratio: Hidden width of the blocks over theirs; 2 in the paper's XXS.

    References:
        https://arxiv.org/abs/2110.02178
    """

    def steps(
        self,
        dim: int,
        in_chans: int,
        widths: tuple[int, int] = (16, 32),
        depth: int = 2,
        expand_ratio: float = 4.0,
    ) -> Steps:
        """See the class."""
        first, second = widths
        rows = [(first, second, 1), (second, dim, 2), *[(dim, dim, 1)] * depth]
        blocks = [
            InvertedResidual(
                a, out_dim=b, stride=stride, expand_ratio=expand_ratio, act_layer=nn.SiLU
            )
            for a, b, stride in rows
        ]
        return {
            **_row((in_chans, first), 3, [2], nn.SiLU),
            **{f"block{i}": block for i, block in enumerate(blocks, 1)},
        }


class FastViTStem(Stem):
    """Stem of FastViT: three blocks of MobileOne, dense 3x3, depthwise 3x3 and 1x1.

    Each is a sum of branches with a BatchNorm, then GELU; the first two halve the map. ``fold_``
    makes one convolution of every block. Parameters: ``10*I*C + C*C + 22*C``.

    Args besides those of ``Stem``:
        act_layer: Makes the activations.

    References:
        FastViT, https://arxiv.org/abs/2303.14189; MobileOne, https://arxiv.org/abs/2206.04040
    """

    def steps(self, dim: int, in_chans: int, act_layer: Callable[[], nn.Module] = nn.GELU) -> Steps:
        """See the class."""
        return {
            "one1": MobileOne(in_chans, dim, 3, stride=2),
            "act1": act_layer(),
            "one2": MobileOne(dim, dim, 3, stride=2, groups=dim),
            "act2": act_layer(),
            "one3": MobileOne(dim, dim, 1),
            "act3": act_layer(),
        }


class MobileOne(Parallel):
    """MobileOne's sum of a KxK convolution, a 1x1 one and the input, each with a BatchNorm.

    The 1x1 convolution is there if K is above 1, the input if width and size stay.

    Args:
        dim: Channels that come in.
        out_dim: Channels that come out.
        side: Odd kernel side K.
        stride: Step over the map.
        groups: Groups of the convolutions.
    """

    def __init__(self, dim: int, out_dim: int, side: int, *, stride: int = 1, groups: int = 1):
        def branch(side: int) -> nn.Module:
            kernel = conv(dim, out_dim, side, stride=stride, groups=groups)
            return nn.Sequential(kernel, nn.BatchNorm2d(out_dim))

        branches = [branch(k) for k in sorted({side, 1}, reverse=True)]
        if stride == 1 and dim == out_dim:
            branches.append(nn.BatchNorm2d(dim))
        super().__init__(*branches, add=True)

    def merged(self) -> nn.Conv2d:
        """The one convolution that the branches are in evaluation mode."""
        first: Any = self.branches[0]
        like: nn.Conv2d = first[0]
        with torch.inference_mode(False), torch.no_grad():
            made, *others = [_with_norm(branch, like) for branch in self.branches]
            for other in others:
                margin = (like.kernel_size[0] - other.kernel_size[0]) // 2
                made.weight += nn.functional.pad(other.weight, [margin] * 4)
                made.bias += other.bias  # pyright: ignore[reportOperatorIssue]
        return made


def _with_norm(branch: Any, like: nn.Conv2d) -> nn.Conv2d:
    """A branch as one convolution; the input is one by the identity."""
    if isinstance(branch, nn.Sequential):
        own: Any = branch
        return fuse_conv_bn_eval(own[0], own[1])
    same = conv(like.in_channels, like.out_channels, groups=like.groups).to(like.weight)
    nn.init.dirac_(same.weight, groups=like.groups)
    return fuse_conv_bn_eval(same.eval(), branch)


class SpatialPrior(nn.Module):
    """Spatial prior module of ViT-Adapter: tokens of three scales beside those of a ViT.

    ``conv (3x3, stride 2) -> BN -> ReLU``, twice the same without a stride, the maximum of 3x3 with
    stride 2; three times ``conv (3x3, stride 2) -> BN -> ReLU`` of widths 2w, 4w and 4w; and from
    each of the four maps a 1x1 convolution to C. No biases but in the last. ``prior(images)`` gives
    ``(tokens, MultiGrid)``: those of strides 8, 16 and 32, one behind the other, each plus a vector
    of its scale. ``prior.maps(images)`` gives the maps of strides 4, 8, 16 and 32, without that.

    Args:
        dim: Channels C that come out.
        in_chans: Channels I that come in.
        width: Channels w of the first map.

    Raises:
        ValueError: If a width is not positive.

    References:
        https://arxiv.org/abs/2205.08534
    """

    def __init__(self, dim: int, *, in_chans: int = 3, width: int = 64):
        super().__init__()
        if min(dim, in_chans, width) < 1:
            raise ValueError(f"expected positive widths, got {dim=}, {in_chans=}, {width=}")
        self.dim, self.in_chans = dim, in_chans
        widths = (width, 2 * width, 4 * width, 4 * width)
        stem = _row((in_chans, width, width, width), 3, (2, 1, 1), nn.ReLU)
        rows = [_row(pair, 3, [2], nn.ReLU) for pair in pairwise(widths)]
        first = OrderedDict(**stem, pool=nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList(nn.Sequential(OrderedDict(row)) for row in [first, *rows])
        self.proj = nn.ModuleList(conv(w, dim, bias=True) for w in widths)
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        init_by_group_(self)
        nn.init.normal_(self.level_embed)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of four scales."""
        fmap, found = checked(images, self.in_chans), list[Tensor]()
        for stage, proj in zip(self.stages, self.proj, strict=True):
            fmap = stage(fmap)
            found.append(proj(fmap))
        return found

    def forward(self, x: Tensor) -> Any:
        """Tokens of three scales and their grid; see the class."""
        maps = self.maps(x)[1:]
        tokens = [
            map_to_tokens(fmap) + level for fmap, level in zip(maps, self.level_embed, strict=True)
        ]
        return torch.cat(tokens, dim=1), MultiGrid(tuple(tuple(m.shape[2:]) for m in maps))

    def fold_(self) -> bool:
        """Fold every ``BatchNorm`` into the convolution in front of it; see ``Stem.fold_``."""
        return fold_convs_(self)
