"""Stems of several convolutions in a row.

Shape letters: I channels that come in, H rows, C channels that come out, K kernel side, w width
inside.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import LayerNorm2d, conv
from tokenconv.blocks.starts import init_by_group_, init_kaiming_, init_truncated_
from tokenconv.blocks.stems.base import Stem, conv_row, patches


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
        row = conv_row((in_chans, *widths), kernel_size, [2] * len(widths), act_layer)
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
            "proj": patches(width, dim, patch_size),
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
        steps = conv_row((in_chans, *widths), 3, [2] * count, act_layer)
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
            **conv_row(widths, 3, (2, 1, 1), nn.GELU, bias=True, act_first=True),
            "proj": patches(width, dim, 2),
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
            **conv_row((in_chans, width, width), 3, (2, 1), nn.GELU, act_first=True),
            "proj": patches(width, dim, 2, bias=False),
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
        first = conv_row((in_chans, dim), kernel_size, [2], nn.ReLU)
        more = conv_row([dim] * (depth + 1), 3, [1] * depth, nn.ReLU)
        return {
            **{f"{name[:-1]}0": step for name, step in first.items()},
            **more,
            "proj": patches(dim, dim, 2),
            "norm": LayerNorm2d(dim),
        }
