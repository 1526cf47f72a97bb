"""Stems of one convolution, for images and between the stages of a pyramid.

Shape letters: I channels that come in, C channels that come out, K kernel side.
"""

from typing import ClassVar

from torch import nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import LayerNorm2d
from tokenconv.blocks.starts import init_by_group_, init_torch_, init_truncated_
from tokenconv.blocks.stems.base import Stem


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
