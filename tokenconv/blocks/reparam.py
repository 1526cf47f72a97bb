"""Large and small depthwise kernels side by side, which become one kernel for inference.

Shape letters: C channels, h hidden width, K kernel side.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.folding import check_foldable, merged_conv
from tokenconv.blocks.map_layers import (
    LayerScale2d,
    Parallel,
    Residual,
    ResponseNorm2d,
    conv,
    conv_norm,
    depthwise,
    depthwise_norm,
    divisible,
    in_a_row,
    squeeze_excite,
)
from tokenconv.blocks.maps import Mixer
from tokenconv.blocks.starts import init_truncated_, silence_


class Reparameterised(Mixer):
    """Steps that, as a whole and in evaluation mode, are one depthwise convolution.

    ``fold_`` makes that of them, the input included where it is added. A block that has such a
    mixer as one of its steps folds it too, and the norm behind it.
    """

    def merged(self) -> nn.Conv2d:
        """The one convolution, with a bias."""
        assert isinstance(self.kernel_size, int)
        return merged_conv(self, depthwise(self.dim, self.kernel_size))

    def fold_(self) -> bool:
        """Become one convolution, in place, for inference; see ``MapBlock``."""
        check_foldable(self)
        if type(self.body[0]) is nn.Conv2d:
            return False
        self.body = in_a_row({"conv": self.merged()})
        self.skip = None
        return True


class Difference(nn.Module):
    """``mixer(x) - norm(x)``.

    Args:
        mixer: What is taken from.
        norm: What is taken away.
    """

    def __init__(self, mixer: nn.Module, norm: nn.Module):
        super().__init__()
        self.mixer, self.norm = mixer, norm

    def init_neutral_(self) -> None:
        """Make the output zero."""
        silence_(self.mixer)
        silence_(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Subtract."""
        return self.mixer(x) - self.norm(x)


class RepMixer(Reparameterised):
    """FastViT's token mixer: a convolution for inference.

    ``x + gamma * (BN(DWConv(x)) + BN(DWConv 1x1(x)) + BN(x) - BN(x))``, each norm its own, no
    biases. ``fold_`` makes one K x K convolution of all. Starts as ``nn.Conv2d``, gamma from a
    small value. Parameters: ``K*K*C + 10*C``.

    Args besides those of ``Mixer``:
        layer_scale_init_value: What gamma starts from; None leaves it out.

    References:
        https://arxiv.org/abs/2303.14189
    """

    adds_input = True

    def mix(self, dim: int, side: int, layer_scale_init_value: float | None = 1e-5) -> Steps:
        """See the class."""
        mixer = Parallel(
            depthwise_norm(dim, side), depthwise_norm(dim, 1), nn.BatchNorm2d(dim), add=True
        )
        value = layer_scale_init_value
        return {
            "mix": Difference(mixer, nn.BatchNorm2d(dim)),
            "layer_scale": None if value is None else LayerScale2d(dim, value),
        }


class RepLargeKernel(Reparameterised):
    """RepLKNet's convolution: ``BN(DWConv K(x)) + BN(DWConv small(x))``, no biases.

    ``fold_`` adds the small kernel to the middle of the large one. Starts as ``nn.Conv2d``.
    Parameters: ``(K*K + small*small)*C + 4*C``.

    Args besides those of ``Mixer``:
        small_kernel: Side of the small kernel; None leaves it out.

    References:
        https://arxiv.org/abs/2203.06717
    """

    kernel_size = 27

    def mix(self, dim: int, side: int, small_kernel: int | None = 5) -> Steps:
        """See the class."""
        if small_kernel is not None and (small_kernel > side or small_kernel % 2 == 0):
            raise ValueError(
                f"expected an odd small_kernel of at most {side}, got {small_kernel}: choose the "
                f"smaller one, or None"
            )
        sides = [side] if small_kernel is None else [side, small_kernel]
        return {"sum": Parallel(*(depthwise_norm(dim, k) for k in sides), add=True)}


class RepLKNetBlock(Mixer):
    """RepLKNet's block, with its norm and residual: a large kernel between 1x1 convolutions.

    ``x + BN(1x1(ReLU(large(ReLU(BN(1x1(BN(x))))))))``, ``large`` as ``RepLargeKernel``, at width
    ``h = int(C * dw_ratio)``; no biases. The paper takes K = 31, 29, 27 and 13 in its four stages;
    here that of the stage whose grid is that of most ViTs. Starts as ``nn.Conv2d``. Parameters:
    ``2*C*h + (K*K + 25)*h + 6*h + 4*C``.

    Args besides those of ``Mixer``:
        small_kernel: Side of the small kernel; None leaves it out.
        dw_ratio: Width of the large kernel over C; 1.5 in the largest model.

    References:
        https://arxiv.org/abs/2203.06717
    """

    kernel_size = 27
    adds_input = True

    def mix(
        self, dim: int, side: int, small_kernel: int | None = 5, dw_ratio: float = 1.0
    ) -> Steps:
        """See the class."""
        hidden = int(dim * dw_ratio)
        return {
            "norm": nn.BatchNorm2d(dim),
            "pw1": conv_norm(dim, hidden, act=nn.ReLU()),
            "large_kernel": RepLargeKernel(hidden, kernel_size=side, small_kernel=small_kernel),
            "act": nn.ReLU(),
            "pw2": conv_norm(hidden, dim),
        }


DILATIONS = {
    5: {1: 3, 2: 3},
    7: {1: 5, 2: 3, 3: 3},
    9: {1: 5, 2: 5, 3: 3, 4: 3},
    11: {1: 5, 2: 5, 3: 3, 4: 3, 5: 3},
    13: {1: 5, 2: 7, 3: 3, 4: 3, 5: 3},
    15: {1: 5, 2: 7, 3: 3, 5: 3, 7: 3},
    17: {1: 5, 2: 9, 4: 3, 5: 3, 7: 3},
}
"""UniRepLKNet's branches: by the large kernel's side, small sides by their dilation."""


class DilatedReparam(Reparameterised):
    """UniRepLKNet's dilated reparameterised convolution: small dilated kernels beside a large one.

    ``BN(DWConv K(x)) + sum of BN(DWConv k, dilated(x))``, with the branches of ``DILATIONS``; no
    biases. ``fold_`` adds all to one K x K kernel. Starts from a truncated normal of std 0.02.
    Parameters: ``C`` times the sum of all ``k*k``, and ``2*C`` for each.

    Raises:
        ValueError: If ``kernel_size`` is none of ``DILATIONS``.

    References:
        https://arxiv.org/abs/2311.15599
    """

    kernel_size = 13
    init = staticmethod(init_truncated_)

    def mix(self, dim: int, side: int) -> Steps:
        """See the class."""
        if side not in DILATIONS:
            raise ValueError(f"expected kernel_size from {[*DILATIONS]}, got {side}")
        small = [depthwise_norm(dim, k, dilation=r) for r, k in DILATIONS[side].items()]
        return {"sum": Parallel(depthwise_norm(dim, side), *small, add=True)}


class UniRepLKNetBlock(Mixer):
    """UniRepLKNet's block, with its residual: a large kernel, squeeze-and-excitation and an MLP.

    ``x + gamma * BN(fc2(GRN(GELU(fc1(SE(BN(large(x))))))))``: ``large`` is ``DilatedReparam`` from
    K = 7 on, and else a depthwise convolution; SE is C/4 wide. No biases but in SE and ``fc1``.
    Starts from a truncated normal of std 0.02, gamma from a small value. Parameters, of ``large``
    P, ``h = int(C * ffn_factor)``, ``r = C // 4``: ``P + 2*C*r + r + C + 2*C*h + 3*h + 5*C``.

    Args besides those of ``Mixer``:
        ffn_factor: Hidden width h of the MLP over C.
        layer_scale_init_value: What gamma starts from; None leaves it out.

    Raises:
        ValueError: If ``kernel_size`` is neither 3 nor one of ``DILATIONS``.

    References:
        https://arxiv.org/abs/2311.15599
    """

    kernel_size = 13
    adds_input = True
    init = staticmethod(init_truncated_)

    def mix(
        self,
        dim: int,
        side: int,
        ffn_factor: float = 4.0,
        layer_scale_init_value: float | None = 1e-6,
    ) -> Steps:
        """See the class."""
        hidden, value = int(dim * ffn_factor), layer_scale_init_value
        plain = side in (3, 5)
        return {
            "dwconv": depthwise(dim, side) if plain else DilatedReparam(dim, kernel_size=side),
            "norm": nn.BatchNorm2d(dim),
            "se": squeeze_excite(dim, dim // 4, nn.ReLU()),
            "fc1": conv(dim, hidden, bias=True),
            "act": nn.GELU(),
            "grn": ResponseNorm2d(hidden),
            "fc2": conv(hidden, dim),
            "norm2": nn.BatchNorm2d(dim),
            "layer_scale": None if value is None else LayerScale2d(dim, value),
        }


class RepViTMixer(Reparameterised):
    """RepViT's token mixer: ``BN(BN(DWConv(x)) + DWConv 1x1(x) + x)``.

    Only the 1x1 convolution has a bias. ``fold_`` makes one K x K convolution of all. Starts as
    ``nn.Conv2d``. Parameters: ``K*K*C + 6*C``.

    References:
        https://arxiv.org/abs/2307.09283
    """

    def mix(self, dim: int, side: int) -> Steps:
        """See the class."""
        branches = depthwise_norm(dim, side), depthwise(dim, 1, bias=True), nn.Identity()
        return {"sum": Parallel(*branches, add=True), "norm": nn.BatchNorm2d(dim)}


class RepViTBlock(Mixer):
    """RepViT's block: its token mixer, squeeze-and-excitation in every other block, and an MLP.

    ``y + BN(fc2(act(BN(fc1(y)))))``, ``y = SE(mixer(x))``, ``mixer`` as ``RepViTMixer``. SE is
    ``r`` wide, the multiple of 8 nearest to C/4. No biases but in SE and the mixer. Starts as
    ``nn.Conv2d``, the last norm from zero. Parameters, ``h = int(C * mlp_ratio)``:
    ``K*K*C + 6*C + 2*C*h + 2*h + 2*C``, with SE ``2*C*r + r + C``.

    Args besides those of ``Mixer``:
        mlp_ratio: Hidden width h over C.
        use_se: Have squeeze-and-excitation.
        act_layer: Makes the activation of the MLP.

    References:
        https://arxiv.org/abs/2307.09283
    """

    def mix(
        self,
        dim: int,
        side: int,
        mlp_ratio: float = 2.0,
        use_se: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ) -> Steps:
        """See the class."""
        hidden, width = int(dim * mlp_ratio), divisible(dim / 4, limit=0)
        mlp: dict[str, nn.Module] = {
            "fc1": conv_norm(dim, hidden, act=act_layer()),
            "fc2": conv_norm(hidden, dim),
        }
        return {
            "token_mixer": RepViTMixer(dim, kernel_size=side),
            "se": squeeze_excite(dim, width, nn.ReLU()) if use_se else None,
            "channel_mixer": Residual(OrderedDict(mlp)),
        }

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        super().reset_parameters()
        nn.init.zeros_(self.get_parameter("body.channel_mixer.fc2.norm.weight"))
