"""Whole blocks of convolutional networks that look like Transformer blocks.

Shape letters: C channels, O channels that come out, h hidden width, K kernel side.
"""

from collections.abc import Callable

from torch import nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import (
    LayerNorm2d,
    LayerScale2d,
    Modulated,
    ResponseNorm2d,
    conv,
    conv_norm,
    depthwise,
    depthwise_norm,
    divisible,
)
from tokenconv.blocks.maps import MapBlock, Mixer
from tokenconv.blocks.mixers import inception
from tokenconv.blocks.starts import init_by_group_, init_truncated_


def _mlp(dim: int, hidden: int, act: nn.Module, *, grn: bool = False) -> Steps:
    return {
        "fc1": conv(dim, hidden, bias=True),
        "act": act,
        "grn": ResponseNorm2d(hidden) if grn else None,
        "fc2": conv(hidden, dim, bias=True),
    }


class ConvNeXtBlock(Mixer):
    """ConvNeXt's block, with its residual: a depthwise convolution and an MLP behind one norm.

    ``DWConv -> LayerNorm (eps 1e-6) -> fc1 -> GELU -> [GRN] -> fc2 -> [gamma]``, plus the input.
    ConvNeXt V2 has GRN and no gamma. Starts from a truncated normal of std 0.02, gamma from a small
    value. Parameters, ``h = int(C * mlp_ratio)``: ``(K*K + 1)*C + 2*C + 2*C*h + h + C``, with gamma
    ``C`` and with GRN ``2*h`` more.

    Args besides those of ``Mixer``:
        mlp_ratio: Hidden width h over C.
        use_grn: Have global response normalisation, as ConvNeXt V2.
        ls_init_value: What gamma starts from; None leaves it out, as ConvNeXt V2.
        act_layer: Makes the activation.

    References:
        ConvNeXt, https://arxiv.org/abs/2201.03545; ConvNeXt V2, https://arxiv.org/abs/2301.00808
    """

    kernel_size = 7
    adds_input = True
    init = staticmethod(init_truncated_)

    def mix(
        self,
        dim: int,
        side: int,
        mlp_ratio: float = 4.0,
        use_grn: bool = False,
        ls_init_value: float | None = 1e-6,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> Steps:
        """See the class."""
        return {
            "dwconv": depthwise(dim, side, bias=True),
            "norm": LayerNorm2d(dim, eps=1e-6),
            **_mlp(dim, int(mlp_ratio * dim), act_layer(), grn=use_grn),
            "layer_scale": None if ls_init_value is None else LayerScale2d(dim, ls_init_value),
        }


class InceptionNeXtBlock(Mixer):
    """InceptionNeXt's block, with its residual: as ConvNeXt, with Inception's kernels and BN.

    ``InceptionDWConv -> BN -> fc1 -> GELU -> fc2 -> gamma``, plus the input. Starts from a
    truncated normal of std 0.02, gamma from a small value. Parameters, ``h = int(C * mlp_ratio)``:
    those of ``InceptionDWConv``, and ``2*C*h + h + 4*C``.

    Args besides those of ``Mixer``, of which ``kernel_size`` is the square kernel's:
        band_kernel_size: Length of the kernels of one row and one column.
        branch_ratio: Channels of each convolution over C.
        mlp_ratio: Hidden width h over C.
        ls_init_value: What gamma starts from; None leaves it out.

    Raises:
        ValueError: As ``InceptionDWConv``.

    References:
        https://arxiv.org/abs/2303.16900
    """

    adds_input = True
    init = staticmethod(init_truncated_)

    def mix(
        self,
        dim: int,
        side: int,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
    ) -> Steps:
        """See the class."""
        return {
            "token_mixer": inception(dim, side, band_kernel_size, branch_ratio),
            "norm": nn.BatchNorm2d(dim),
            **_mlp(dim, int(mlp_ratio * dim), nn.GELU()),
            "layer_scale": None if ls_init_value is None else LayerScale2d(dim, ls_init_value),
        }


class StarNetBlock(Mixer):
    """StarNet's block, with its residual: the product of two linear layers between convolutions.

    ``BN(DWConv(x)) -> ReLU6(f1) * f2 -> g -> BN -> DWConv``, plus the input; all with biases.
    Starts from a truncated normal of std 0.02. Parameters, ``h = int(C * mlp_ratio)``:
    ``2*(K*K + 1)*C + 3*C*h + 2*h + 5*C``.

    Args besides those of ``Mixer``:
        mlp_ratio: Hidden width h over C; 4 in the small models.
        act_layer: Makes the activation.

    References:
        https://arxiv.org/abs/2403.19967
    """

    kernel_size = 7
    adds_input = True
    init = staticmethod(init_truncated_)

    def mix(
        self,
        dim: int,
        side: int,
        mlp_ratio: float = 3.0,
        act_layer: Callable[[], nn.Module] = nn.ReLU6,
    ) -> Steps:
        """See the class."""
        hidden = int(dim * mlp_ratio)
        first = nn.Sequential(conv(dim, hidden, bias=True), act_layer())
        return {
            "dwconv": depthwise_norm(dim, side, bias=True),
            "star": Modulated(first, conv(dim, hidden, bias=True)),
            "g": conv_norm(hidden, dim, bias=True),
            "dwconv2": depthwise(dim, side, bias=True),
        }


class UniversalInvertedBottleneck(MapBlock):
    """MobileNetV4's universal inverted bottleneck: depthwise convolutions at up to three places.

    ``[DWConv -> BN] -> 1x1 -> BN -> ReLU -> [DWConv -> BN -> ReLU] -> 1x1 -> BN -> [DWConv -> BN]
    -> [gamma]``, plus the input where width and size stay. The first depthwise convolution alone
    is like ConvNeXt, the middle one like MobileNetV2, both are the paper's "ExtraDW", none is an
    MLP. The stride is that of the middle one, or of the first, or of the last. h is the multiple of
    8 nearest to ``C * exp_ratio``. No biases. Starts from a normal of std ``sqrt(2 / fan_out)``.
    Parameters with the middle one: ``C*h + 4*h + K*K*h + h*O + 2*O``.

    Args besides those of ``MapBlock``, of which ``kernel_size`` is the middle one's:
        dw_kernel_size_start: Side of the first one; 0 leaves it out.
        dw_kernel_size_mid: 0 leaves the middle one out; None takes ``kernel_size``.
        dw_kernel_size_end: Side of the last one; 0 leaves it out.
        exp_ratio: Hidden width h over C.
        act_layer: Makes the activations.
        layer_scale_init_value: What gamma starts from; None leaves it out, as in the models without
            attention.

    Raises:
        ValueError: If a kernel is even, or a stride has no depthwise convolution to take it.

    References:
        https://arxiv.org/abs/2404.10518
    """

    adds_input = True
    init = staticmethod(init_by_group_)

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        dw_kernel_size_start: int = 0,
        dw_kernel_size_mid: int | None = None,
        dw_kernel_size_end: int = 0,
        exp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        layer_scale_init_value: float | None = None,
    ) -> Steps:
        """See the class."""
        middle = side if dw_kernel_size_mid is None else dw_kernel_size_mid
        sides = {"mid": middle, "start": dw_kernel_size_start, "end": dw_kernel_size_end}
        if any(k < 0 or (k and k % 2 == 0) for k in sides.values()):
            raise ValueError(f"expected odd kernel sizes, or 0 for no convolution, got {sides}")
        there = [place for place, k in sides.items() if k]
        if stride > 1 and not there:
            raise ValueError(f"expected a depthwise convolution to take {stride=}, got {sides}")

        def maybe(place: str, width: int, act: nn.Module | None = None) -> nn.Module | None:
            step = stride if there[:1] == [place] else 1
            return (
                depthwise_norm(width, sides[place], act=act, stride=step) if sides[place] else None
            )

        hidden, value = divisible(dim * exp_ratio), layer_scale_init_value
        return {
            "dw_start": maybe("start", dim),
            "pw_exp": conv_norm(dim, hidden, act=act_layer()),
            "dw_mid": maybe("mid", hidden, act_layer()),
            "pw_proj": conv_norm(hidden, out_dim),
            "dw_end": maybe("end", out_dim),
            "layer_scale": None if value is None else LayerScale2d(out_dim, value),
        }
