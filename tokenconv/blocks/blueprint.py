"""Blueprint separable convolutions: pointwise first, then depthwise, the reverse of MobileNetV1.

Shape letters: C channels, O channels that come out, M channels between, K kernel side.
"""

import math

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import conv, depthwise
from tokenconv.blocks.maps import MapBlock


class BSConvU(MapBlock):
    """BSConv-U: ``1x1 -> [BN] -> DWConv (stride)``, no activation and no residual.

    Only the depthwise part has a bias. Parameters: ``C*O + K*K*O + O``, and ``2*O`` for BN.

    Args besides those of ``MapBlock``:
        dilation: Distance between kernel taps.
        bias: Learn an offset per channel.
        with_bn: Normalise between the parts.

    References:
        https://arxiv.org/abs/2003.13549
    """

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        dilation: int = 1,
        bias: bool = True,
        with_bn: bool = False,
    ) -> Steps:
        """See the class."""
        return {
            "pw": conv(dim, out_dim),
            "bn": nn.BatchNorm2d(out_dim) if with_bn else None,
            "dw": depthwise(out_dim, side, stride=stride, dilation=dilation, bias=bias),
        }


class BSConvS(MapBlock):
    """BSConv-S: ``1x1 (to M) -> [BN] -> 1x1 -> [BN] -> DWConv (stride)``, no activation.

    ``M = min(C, max(min_mid_channels, ceil(p * C)))``. Train it with ``bsconv_reg_loss``, which
    keeps the first part near orthonormal. Only the depthwise part has a bias. Parameters:
    ``C*M + M*O + K*K*O + O``, and ``2*M + 2*O`` for BN.

    Args besides those of ``MapBlock``:
        p: Channels between over ``dim``.
        min_mid_channels: The fewest channels between.
        dilation: Distance between kernel taps.
        bias: Learn an offset per channel.
        with_bn: Normalise behind both 1x1 convolutions.

    References:
        https://arxiv.org/abs/2003.13549
    """

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        p: float = 0.25,
        min_mid_channels: int = 4,
        dilation: int = 1,
        bias: bool = True,
        with_bn: bool = False,
    ) -> Steps:
        """See the class."""
        if not 0 <= p <= 1:
            raise ValueError(f"expected 0 <= p <= 1, got {p}")
        mid = min(dim, max(min_mid_channels, math.ceil(p * dim)))
        return {
            "pw1": conv(dim, mid),
            "bn1": nn.BatchNorm2d(mid) if with_bn else None,
            "pw2": conv(mid, out_dim),
            "bn2": nn.BatchNorm2d(out_dim) if with_bn else None,
            "dw": depthwise(out_dim, side, stride=stride, dilation=dilation, bias=bias),
        }


def orthonormal_loss(weight: Tensor) -> Tensor:
    """How far the rows of a matrix are from orthonormal: ``||W W^T - I||``, Frobenius, not squared.

    Args:
        weight: ``(M, C)``, or that of a 1x1 convolution, ``(M, C, 1, 1)``.

    Returns:
        A number, on the graph.

    Raises:
        ValueError: If it is the weight of a larger convolution.

    References:
        https://arxiv.org/abs/2003.13549
    """
    if weight.ndim < 2 or weight[0, 0].numel() != 1:
        raise ValueError(f"expected a weight (M, C) or (M, C, 1, 1), got {tuple(weight.shape)}")
    rows = weight.flatten(1)
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows)).to(rows))


def bsconv_reg_loss(model: nn.Module, alpha: float = 0.1) -> Tensor:
    """The regulariser of BSConv-S, for the training loss: ``alpha`` times the sum over all of them.

    The paper's MobileNets apply it to the last 1x1 convolution of their blocks instead: add
    ``alpha * orthonormal_loss(block.body.project.weight)``.

    Args:
        model: Holds ``BSConvS`` blocks.
        alpha: Weight in the loss.

    Returns:
        A number, on the graph.

    Raises:
        ValueError: If there is no such block.

    References:
        https://arxiv.org/abs/2003.13549
    """
    blocks = [block for block in model.modules() if isinstance(block, BSConvS)]
    if not blocks:
        raise ValueError("expected a model with BSConvS blocks, got one without")
    losses = [orthonormal_loss(block.get_parameter("body.pw1.weight")) for block in blocks]
    return alpha * torch.stack(losses).sum()
