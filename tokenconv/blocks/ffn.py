"""Feed-forward blocks with a convolution over the token grid; those with a gate are in ``gated``.

A class lists the steps of the paper's code in their order. A 1x1 convolution there is a linear
layer here; dropout stands where the official code has it.

Shape letters: B batch, N tokens = P prefix + grid, C channels, h hidden width, K kernel side.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Local, Shortcut, Steps
from tokenconv.blocks.feed_forward import FeedForward, Parts
from tokenconv.blocks.starts import (
    init_kaiming_,
    init_linears_,
    init_pvt_,
    init_pvt_convs_,
    init_torch_,
    init_truncated_,
)
from tokenconv.errors import GridError, UnknownNameError
from tokenconv.grid import AnyGrid, Grid, MultiGrid, PrefixTokens, TokenGrid, grid_of
from tokenconv.layers import (
    BatchNorm,
    EfficientChannelAttention,
    GlobalResponseNorm,
    SeparableConv,
    SqueezeExcite,
)


class MLP(FeedForward):
    """The feed-forward of a Transformer, without a convolution: what the others are compared with.

    ``fc1 -> activation -> dropout -> fc2 -> dropout``; UniFormer's and iFormer's, and ConvFormer's
    without biases and with ``act_layer=StarReLU``. Prefix tokens take part. Parameters:
    ``2*C*h + h + C``. Keys as in ``timm.layers.Mlp``.

    Args besides those of ``FeedForward``:
        bias: Learn offsets.

    References:
        UniFormer, https://arxiv.org/abs/2201.04676; iFormer, https://arxiv.org/abs/2205.12956;
        ConvFormer, https://arxiv.org/abs/2210.13452
    """

    init = staticmethod(init_linears_)

    def steps(self, parts: Parts, bias: bool = True) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(bias=bias),
            "act": parts.act(),
            "drop1": parts.drop(),
            "fc2": parts.project(bias=bias),
            "drop2": parts.drop(),
        }


class MixFFN(FeedForward):
    """PVTv2's and SegFormer's feed-forward: the convolution stands in front of the activation.

    ``fc1 -> [ReLU, if linear] -> DWConv -> activation -> dropout -> fc2 -> dropout``; no norm, no
    residual. The papers have no prefix tokens; here they skip the convolution and take the rest.
    VAN and LITv2 have the same, BiFormer with ``mlp_ratio=3``. PVTv2 takes ratio 8 in early and 4
    in late stages, SegFormer 4.

    Parameters: ``2*C*h + h + C + (K*K + 1)*h``. Linear weights start from a truncated normal of
    std 0.02, the kernel from a normal of std ``sqrt(2) / K``, biases from zero. Keys as in
    ``timm.models.pvt_v2.MlpWithDepthwiseConv``; the official ``dwconv.dwconv`` loads as well.

    Args besides those of ``FeedForward``:
        linear: Put a ReLU in front of the convolution, as PVTv2-Linear does.
        dilation: Distance between kernel taps, in tokens.

    References:
        PVT v2, https://arxiv.org/abs/2106.13797; SegFormer, https://arxiv.org/abs/2105.15203
    """

    init = staticmethod(init_pvt_)

    def steps(self, parts: Parts, linear: bool = False, dilation: int = 1) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "relu": nn.ReLU() if linear else None,
            "dwconv": parts.conv(dilation=dilation),
            "act": parts.act(),
            "drop1": parts.drop(),
            "fc2": parts.project(),
            "drop2": parts.drop(),
        }


class ShuntedFFN(FeedForward):
    """Shunted Transformer's and SMT's feed-forward: a shortcut around the convolution.

    ``fc1 -> x + DWConv(x) -> activation -> dropout -> fc2 -> dropout``. The papers have no prefix
    tokens; here they skip the convolution and take the rest. Parameters and start as ``MixFFN``.

    References:
        Shunted, https://arxiv.org/abs/2111.15193; SMT, https://arxiv.org/abs/2307.08579
    """

    init = staticmethod(init_pvt_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "dwconv": parts.conv(residual=True),
            "act": parts.act(),
            "drop1": parts.drop(),
            "fc2": parts.project(),
            "drop2": parts.drop(),
        }


class RMTFFN(FeedForward):
    """RMT's feed-forward: convolution with a shortcut, behind the activation.

    ``fc1 -> activation -> dropout -> x + [LayerNorm](DWConv(x)) -> fc2 -> dropout``. The paper has
    no prefix tokens; here they skip the convolution, its norm included, and take the rest.
    Parameters as ``MixFFN``, and ``2*h`` with ``subln``.

    Args besides those of ``FeedForward``:
        subln: Normalise behind the convolution (eps 1e-6), in front of the addition.

    References:
        https://arxiv.org/abs/2309.11523
    """

    init = staticmethod(init_linears_)

    def steps(self, parts: Parts, subln: bool = False) -> Steps:
        """See the class."""
        norm = nn.LayerNorm(parts.hidden_dim, eps=1e-6) if subln else None
        return {
            "fc1": parts.expand(),
            "act": parts.act(),
            "drop1": parts.drop(),
            "local": Local(dwconv=parts.conv(), norm=norm),
            "fc2": parts.project(),
            "drop2": parts.drop(),
        }


class UformerLeFF(FeedForward):
    """Uformer's locally-enhanced feed-forward: two activations, no norm.

    ``fc1 -> activation -> DWConv -> activation -> fc2 -> [ECA]``. The paper has no prefix tokens;
    here they skip the convolution and take the rest. Parameters as ``MixFFN``, and 3 with ECA.

    Args besides those of ``FeedForward``:
        eca: Scale the channels that come out by efficient channel attention.

    References:
        https://arxiv.org/abs/2106.03106
    """

    init = staticmethod(init_linears_)

    def steps(self, parts: Parts, eca: bool = False) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "act1": parts.act(),
            "dwconv": parts.conv(),
            "act2": parts.act(),
            "fc2": parts.project(),
            "eca": EfficientChannelAttention(parts.dim, kernel_size=3) if eca else None,
        }


class LeFF(FeedForward):
    """CeiT's locally-enhanced feed-forward: a norm behind each of the three layers.

    ``fc1 -> BN -> activation -> DWConv -> BN -> activation -> fc2 -> BN``; the last one without an
    activation. Prefix tokens pass unchanged, as in the paper; a Transformer block then adds its
    norm's output to them. Parameters: ``2*C*h + h + C + (K*K + 1)*h``, and ``4*h + 2*C`` for BN.

    Args besides those of ``FeedForward``:
        with_bn: Have the three norms.

    References:
        https://arxiv.org/abs/2103.11816
    """

    prefix_tokens = PrefixTokens.PASS

    def steps(self, parts: Parts, with_bn: bool = True) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "norm1": BatchNorm(parts.hidden_dim) if with_bn else None,
            "act1": parts.act(),
            "dwconv": parts.conv(),
            "norm2": BatchNorm(parts.hidden_dim) if with_bn else None,
            "act2": parts.act(),
            "fc2": parts.project(),
            "norm3": BatchNorm(parts.dim) if with_bn else None,
        }


class IRFFN(FeedForward):
    """CMT's inverted residual feed-forward: every activation comes before its norm.

    ``fc1 -> activation -> BN -> dropout -> x + DWConv(x) -> activation -> BN -> fc2 -> BN ->
    dropout``. The paper has no prefix tokens; here they skip the convolution and take the rest, and
    count in the norms. Parameters: ``2*C*h + h + C + (K*K + 1)*h + 4*h + 2*C``. The paper takes
    ratio 3.6 (Ti), 3.77 (XS) and 4.

    References:
        https://arxiv.org/abs/2107.06263
    """

    init = staticmethod(init_kaiming_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "act1": parts.act(),
            "norm1": BatchNorm(parts.hidden_dim),
            "drop1": parts.drop(),
            "dwconv": parts.conv(residual=True),
            "act2": parts.act(),
            "norm2": BatchNorm(parts.hidden_dim),
            "fc2": parts.project(),
            "norm3": BatchNorm(parts.dim),
            "drop2": parts.drop(),
        }


class LocalityFFN(FeedForward):
    """LocalViT's feed-forward, with its residual.

    ``x + (fc1 -> BN -> activation -> DWConv -> BN -> activation -> [SE or ECA] -> fc2 -> BN)``,
    without biases; prefix tokens pass unchanged, as in the paper. LocalViT puts neither a norm in
    front of it nor drop path behind it. Parameters: ``2*C*h + K*K*h + 4*h + 2*C``, and with SE
    ``2*h*(h//reduction) + h//reduction + h``, with ECA the width of its kernel.

    Args besides those of ``FeedForward``, of which it has no ``act_layer``:
        act: ``"relu6"``, ``"hs"`` (hard swish), ``"hs+se"``, ``"hs+eca"`` or ``"hs+ecah"`` (with a
            hard sigmoid).
        reduction: Hidden width over the width between the layers of SE.
        residual: Add ``x``.

    References:
        https://arxiv.org/abs/2104.05707
    """

    prefix_tokens = PrefixTokens.PASS

    def steps(
        self, parts: Parts, act: str = "hs+se", reduction: int = 4, residual: bool = True
    ) -> Steps:
        """See the class."""
        if act not in _GATES:
            raise UnknownNameError("act", act, _GATES)
        if parts.hidden_dim // reduction < 1:
            raise ValueError(f"expected reduction <= {parts.hidden_dim}, got {reduction}")
        activation = nn.ReLU6 if act == "relu6" else nn.Hardswish
        branch: Steps = {
            "fc1": parts.expand(bias=False),
            "norm1": BatchNorm(parts.hidden_dim),
            "act1": activation(),
            "dwconv": parts.conv(bias=False),
            "norm2": BatchNorm(parts.hidden_dim),
            "act2": activation(),
            "gate": _GATES[act](parts.hidden_dim, reduction),
            "fc2": parts.project(bias=False),
            "norm3": BatchNorm(parts.dim),
        }
        return {"branch": Local(**branch)} if residual else branch

    def reset_parameters(self) -> None:
        """Convolutions of the paper's code as in torch, those of SE from a truncated normal."""
        init_torch_(self)
        for part in self.modules():
            if isinstance(part, SqueezeExcite):
                init_linears_(part)


_GATES: Mapping[str, Callable[[int, int], nn.Module | None]] = {
    "relu6": lambda dim, reduction: None,
    "hs": lambda dim, reduction: None,
    "hs+se": lambda dim, reduction: SqueezeExcite(dim, dim // reduction, gate_layer=nn.Hardsigmoid),
    "hs+eca": lambda dim, reduction: EfficientChannelAttention(dim),
    "hs+ecah": lambda dim, reduction: EfficientChannelAttention(dim, gate_layer=nn.Hardsigmoid),
}


class Conv2FormerMLP(FeedForward):
    """Conv2Former's MLP: the norm is inside, the shortcut goes around convolution and activation.

    ``LayerNorm (eps 1e-6) -> fc1 -> activation -> x + activation(DWConv(x)) -> fc2``. The paper has
    no prefix tokens; here they skip convolution and second activation and take the rest.
    Parameters as ``MixFFN``, and ``2*C``.

    References:
        https://arxiv.org/abs/2211.11943
    """

    init = staticmethod(init_truncated_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "norm": nn.LayerNorm(parts.dim, eps=1e-6),
            "fc1": parts.expand(),
            "act": parts.act(),
            "local": Local(dwconv=parts.conv(), act=parts.act()),
            "fc2": parts.project(),
        }


class EfficientFormerV2FFN(FeedForward):
    """EfficientFormerV2's feed-forward: CeiT's, with dropout.

    ``fc1 -> BN -> activation -> DWConv -> BN -> activation -> dropout -> fc2 -> BN -> dropout``.
    The paper has no prefix tokens; here they skip the convolution and take the rest, and count in
    the norms. Parameters as ``LeFF``.

    References:
        https://arxiv.org/abs/2212.08059
    """

    init = staticmethod(init_linears_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "norm1": BatchNorm(parts.hidden_dim),
            "act1": parts.act(),
            "dwconv": parts.conv(),
            "norm2": BatchNorm(parts.hidden_dim),
            "act2": parts.act(),
            "drop1": parts.drop(),
            "fc2": parts.project(),
            "norm3": BatchNorm(parts.dim),
            "drop2": parts.drop(),
        }


class FastViTFFN(FeedForward):
    """FastViT's feed-forward: a large convolution first, at the width of the tokens.

    ``DWConv 7x7 -> BN -> fc1 -> activation -> dropout -> fc2 -> dropout``. The paper has no prefix
    tokens; here they skip the convolution and take the rest, and count in the norm. Parameters:
    ``K*K*C + 2*C + 2*C*h + h + C``.

    References:
        https://arxiv.org/abs/2303.14189
    """

    kernel_size = 7
    init = staticmethod(init_truncated_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "dwconv": parts.conv(parts.dim, bias=False),
            "norm": BatchNorm(parts.dim),
            "fc1": parts.expand(),
            "act": parts.act(),
            "drop1": parts.drop(),
            "fc2": parts.project(),
            "drop2": parts.drop(),
        }


class ChannelAggregation(nn.Module):
    """``x + scale * (x - GELU(fc(x)))``, where ``fc`` makes one channel for all; MogaNet's.

    Args:
        dim: Channels C.
        act_layer: Makes the activation.

    References:
        https://arxiv.org/abs/2211.03295
    """

    def __init__(self, dim: int, *, act_layer: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        self.fc = nn.Linear(dim, 1)
        self.act = act_layer()
        self.scale = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the identity."""
        self.fc.reset_parameters()
        nn.init.constant_(self.scale, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate the channels of tokens ``(B, N, C)``."""
        return x + self.scale * (x - self.act(self.fc(x)))


class MogaFFN(FeedForward):
    """MogaNet's feed-forward: ``MixFFN`` with channel aggregation behind the activation.

    ``fc1 -> DWConv -> activation -> dropout -> aggregation -> fc2 -> dropout``. The paper has no
    prefix tokens; here they skip the convolution and take the rest. Parameters as ``MixFFN``, and
    ``2*h + 1``.

    References:
        https://arxiv.org/abs/2211.03295
    """

    init = staticmethod(init_pvt_convs_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "dwconv": parts.conv(),
            "act": parts.act(),
            "drop1": parts.drop(),
            "aggregate": ChannelAggregation(parts.hidden_dim, act_layer=parts.act),
            "fc2": parts.project(),
            "drop2": parts.drop(),
        }


class RepLKNetFFN(FeedForward):
    """RepLKNet's feed-forward, with its residual; there is no convolution in it.

    ``x + (BN -> fc1 -> BN -> activation -> fc2 -> BN)``, without biases. Prefix tokens take part.
    Parameters: ``2*C*h + 4*C + 2*h``.

    Args besides those of ``FeedForward``:
        residual: Add ``x``.

    References:
        https://arxiv.org/abs/2203.06717
    """

    def steps(self, parts: Parts, residual: bool = True) -> Steps:
        """See the class."""
        branch: Steps = {
            "norm": BatchNorm(parts.dim),
            "fc1": parts.expand(bias=False),
            "norm1": BatchNorm(parts.hidden_dim),
            "act": parts.act(),
            "fc2": parts.project(bias=False),
            "norm2": BatchNorm(parts.dim),
        }
        return {"branch": Shortcut(**branch)} if residual else branch


class UniRepLKNetFFN(FeedForward):
    """UniRepLKNet's feed-forward, with global response normalisation instead of a convolution.

    ``fc1 -> activation -> GRN -> fc2 (no bias) -> BN``. The paper has no prefix tokens; here they
    take part, and do not count in what GRN measures. Parameters: ``2*C*h + 3*h + 2*C``.

    References:
        https://arxiv.org/abs/2311.15599
    """

    init = staticmethod(init_truncated_)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "act": parts.act(),
            "grn": GlobalResponseNorm(parts.hidden_dim),
            "fc2": parts.project(bias=False),
            "norm": BatchNorm(parts.dim),
        }


class ConvMLP(FeedForward):
    """ConvMLP's whole block, with its residuals: MLP, convolution *without* a residual, MLP.

    ``x + MLP(LN(x)) -> DWConv(LN(x)) -> x + MLP(LN(x))``; norms of eps 1e-5, no bias in the
    convolution. The paper has no prefix tokens; here they skip the convolution and take the rest.
    Parameters: ``2*(2*C*h + h + C) + K*K*C + 6*C``. The paper takes ratio 2 and 3.

    References:
        https://arxiv.org/abs/2109.04454
    """

    mlp_ratio = 2.0

    def steps(self, parts: Parts) -> Steps:
        """See the class."""

        def mlp() -> Shortcut:
            return Shortcut(
                norm=nn.LayerNorm(parts.dim),
                fc1=parts.expand(),
                act=parts.act(),
                fc2=parts.project(),
            )

        return {
            "mlp1": mlp(),
            "norm": nn.LayerNorm(parts.dim),
            "dwconv": parts.conv(parts.dim, bias=False),
            "mlp2": mlp(),
        }

    def reset_parameters(self) -> None:
        """Linear weights from a truncated normal, the kernel from a Kaiming normal."""
        init_kaiming_(self)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)


class MultiScaleFFN(MixFFN):
    """ViT-Adapter's feed-forward: ``MixFFN`` on three maps in one sequence, with one kernel.

    Called with the size ``(H, W)`` of the middle map, on tokens of a map of ``(2H, 2W)``, one of
    ``(H, W)`` and one of ``(H/2, W/2)``, in this order: ``N = 21*H*W/4``. No convolution crosses
    maps. The paper takes class tokens away before; here prefix tokens skip the convolution.
    Parameters: ``2*C*h + h + C + (K*K + 1)*h``.

    Raises:
        GridError: On other sequences than this, or if H or W is odd.

    References:
        https://arxiv.org/abs/2205.08534
    """

    mlp_ratio = 0.25

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Run the feed-forward on tokens ``(B, P + 21*H*W/4, C)``."""
        known = grid_of(*grid)
        if isinstance(known, TokenGrid):
            if len(known.size) != 2 or any(side % 2 for side in known.size):
                raise GridError(
                    f"expected an even size (H, W) of the middle map, got {known.size}: the third "
                    f"map is half as high and wide"
                )
            rows, cols = known.size
            sizes = ((2 * rows, 2 * cols), (rows, cols), (rows // 2, cols // 2))
            known = MultiGrid(sizes, known.num_prefix_tokens)
        known.check(x)
        return super().forward(x, known)


class SeparableFFN(FeedForward):
    """Feed-forward with a depthwise separable convolution beside it.

    ``fc2(act(fc1(x))) + SeparableConv(x)``, dropout after the activation and at the end; no norm,
    no residual. Prefix tokens skip the depthwise part of the convolution and take the rest.
    Parameters: ``2*C*h + h + C + (K*K + 1)*C + C*C + C``. Linear weights start from a truncated
    normal of std 0.02, biases from zero, the kernel as ``nn.Conv2d``. Keys: ``fc1``, ``fc2`` as in
    ``timm.layers.Mlp``, ``conv.depthwise``, ``conv.pointwise``.

    Args besides those of ``FeedForward``:
        dilation: Distance between kernel taps, in tokens.

    References:
        The convolution: MobileNets, https://arxiv.org/abs/1704.04861; a branch of that kind beside
        the MLP of a ViT: Convpass, https://arxiv.org/abs/2207.07039
    """

    init = staticmethod(init_linears_)

    def steps(self, parts: Parts, dilation: int = 1) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(),
            "act": parts.act(),
            "drop": parts.drop(),
            "fc2": parts.project(),
            "conv": SeparableConv(parts.dim, parts.kernel_size, dilation=dilation, impl=parts.impl),
        }

    def run(self, x: Tensor, grid: AnyGrid) -> Tensor:
        """Run both branches."""
        fc1, act, drop, fc2, conv = self._modules.values()
        return drop(fc2(drop(act(fc1(x)))) + conv(x, grid))  # pyright: ignore[reportOptionalCall]
