"""Stems of the blocks of mobile networks.

Shape letters: I channels that come in, H rows, C channels that come out, K kernel side.
"""

from collections.abc import Callable

from torch import nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.folding import merged_conv
from tokenconv.blocks.map_layers import Parallel, conv
from tokenconv.blocks.separable import InvertedResidual
from tokenconv.blocks.stems.base import Stem, conv_row


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
            **conv_row((in_chans, first), 3, [2], nn.SiLU),
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
        branches: list[nn.Module] = [
            nn.Sequential(
                conv(dim, out_dim, k, stride=stride, groups=groups), nn.BatchNorm2d(out_dim)
            )
            for k in sorted({side, 1}, reverse=True)
        ]
        if stride == 1 and dim == out_dim:
            branches.append(nn.BatchNorm2d(dim))
        super().__init__(*branches, add=True)

    def merged(self) -> nn.Conv2d:
        """The one convolution that the branches are in evaluation mode."""
        first = self.get_submodule("branches.0.0")
        assert isinstance(first, nn.Conv2d)
        return merged_conv(self, first)
