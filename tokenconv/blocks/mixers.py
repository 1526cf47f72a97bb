"""Token mixers that are convolutions in a row or side by side.

Shape letters: C channels, h hidden width, K kernel side.
"""

from collections.abc import Callable

from torch import nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import Split, conv, depthwise
from tokenconv.blocks.maps import Mixer
from tokenconv.blocks.starts import init_truncated_
from tokenconv.layers import StarReLU


class SepConv(Mixer):
    """MetaFormer's separable convolution, ConvFormer's mixer: wide inside, no norm.

    ``1x1 -> StarReLU -> DWConv -> 1x1``, no residual. Starts from a truncated normal of std 0.02.
    Parameters, ``h = int(C * expansion_ratio)``: ``2*C*h + K*K*h``, with biases ``2*h + C``, and 2
    of StarReLU.

    Args besides those of ``Mixer``:
        expansion_ratio: Hidden width h over C.
        act1_layer: Makes the activation in front of the convolution.
        act2_layer: Makes the one behind it.
        bias: Learn offsets, in all three.

    References:
        https://arxiv.org/abs/2210.13452
    """

    kernel_size = 7
    init = staticmethod(init_truncated_)

    def mix(
        self,
        dim: int,
        side: int,
        expansion_ratio: float = 2.0,
        act1_layer: Callable[[], nn.Module] = StarReLU,
        act2_layer: Callable[[], nn.Module] = nn.Identity,
        bias: bool = False,
    ) -> Steps:
        """See the class."""
        hidden = int(dim * expansion_ratio)
        return {
            "pwconv1": conv(dim, hidden, bias=bias),
            "act1": act1_layer(),
            "dwconv": depthwise(hidden, side, bias=bias),
            "act2": act2_layer(),
            "pwconv2": conv(hidden, dim, bias=bias),
        }


def inception(dim: int, side: int, band: int, ratio: float) -> Split:
    """The convolutions of ``InceptionDWConv``, each on channels of its own."""
    part = int(dim * ratio)
    if part < 1 or 3 * part > dim or band < 1 or band % 2 == 0:
        raise ValueError(
            f"expected three branches of at least one of {dim} channels, and an odd "
            f"band_kernel_size, got branch_ratio={ratio}, band_kernel_size={band}"
        )
    sides = side, (1, band), (band, 1)
    convs = [depthwise(part, k, bias=True) for k in sides]
    return Split([dim - 3 * part, part, part, part], nn.Identity(), *convs)


class InceptionDWConv(Mixer):
    """InceptionNeXt's depthwise convolution: a square, a row and a column, each on few channels.

    The channels are cut in four: the first, most of them, pass; ``g = int(C * branch_ratio)`` go
    through K x K, g through 1 x band, g through band x 1. No residual. Starts from a truncated
    normal of std 0.02. Parameters: ``(K*K + 2*band + 3)*g``.

    Args besides those of ``Mixer``, of which ``kernel_size`` is the square kernel's:
        band_kernel_size: Length of the kernels of one row and one column.
        branch_ratio: Channels of each convolution over C.

    Raises:
        ValueError: If the branches have no channel, or too many, or the band is even.

    References:
        https://arxiv.org/abs/2303.16900
    """

    init = staticmethod(init_truncated_)

    def mix(
        self, dim: int, side: int, band_kernel_size: int = 11, branch_ratio: float = 0.125
    ) -> Steps:
        """See the class."""
        return {"dwconv": inception(dim, side, band_kernel_size, branch_ratio)}


class UniFormerMixer(Mixer):
    """UniFormer's local mixer, with its norm and residual: attention within a small window.

    ``x + conv2(DWConv(conv1(BN(x))))``, ``conv1`` and ``conv2`` 1x1, all with biases, nothing
    between. Starts as ``nn.Conv2d``. In front of it UniFormer has ``dpe``, behind it an MLP.
    Parameters: ``2*(C*C + C) + (K*K + 1)*C + 2*C``.

    References:
        https://arxiv.org/abs/2201.04676
    """

    kernel_size = 5
    adds_input = True

    def mix(self, dim: int, side: int) -> Steps:
        """See the class."""
        return {
            "norm": nn.BatchNorm2d(dim),
            "conv1": conv(dim, dim, bias=True),
            "attn": depthwise(dim, side, bias=True),
            "conv2": conv(dim, dim, bias=True),
        }
