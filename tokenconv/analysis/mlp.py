"""An MLP with an inserted convolution, as the dense convolution it is in front of its activation.

Shape letters: C channels, h hidden width, K kernel side.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.errors import AnalysisError
from tokenconv.layers import DWConv, unlike_dwconv


@dataclass(frozen=True)
class ExpandedMLP:
    """A linear layer and a depthwise convolution behind it, as one dense convolution.

    Blueprint separable: ``weight[o, i] = fc1[o, i] * kernel[o]``. The bias of the linear layer is
    convolved as well, and near the borders less of it arrives: it is the weight of one more input
    channel, which is 1 on the whole grid.
    """

    weight: Tensor
    """``(h, C, K, K)``."""
    ones_weight: Tensor
    """``(h, 1, K, K)``, of the channel of ones."""
    bias: Tensor | None
    """``(h,)``."""
    dilation: int
    params: int
    """Of the two layers; the dense convolution has ``weight.numel() + len(weight)``."""

    def __call__(self, fmap: Tensor) -> Tensor:
        """Convolve maps ``(B, C, H, W)`` to ``(B, h, H, W)``, zero padding that keeps the size."""
        padding = self.dilation * (self.weight.shape[-1] // 2)
        with_ones = torch.cat([fmap, torch.ones_like(fmap[:, :1])], dim=1)
        weight = torch.cat([self.weight, self.ones_weight], dim=1)
        return F.conv2d(with_ones, weight, self.bias, padding=padding, dilation=self.dilation)

    @property
    def saving(self) -> float:
        """Parameters of the dense convolution over those of the two layers."""
        dense = self.weight.numel() + len(self.weight)
        return dense / self.params


def expand_mlp(fc1: nn.Linear, conv: DWConv | nn.Conv2d) -> ExpandedMLP:
    """What an MLP with an inserted convolution computes in front of its activation.

    Args:
        fc1: ``(C -> h)``, such as ``mlp.fc1``.
        conv: Depthwise over h channels, such as what ``insert_(model, "mix_ffn")`` puts behind it
            or PVTv2's ``mlp.dwconv``; with its residual, if it has one.

    Raises:
        AnalysisError: If the widths differ, or ``conv`` is not depthwise with an odd square kernel,
            a stride of 1 and a padding that keeps the size.

    References:
        Blueprint separable convolutions, https://arxiv.org/abs/2003.13549
    """
    kernel = conv.weight
    dilation: Any = conv.dilation if isinstance(conv, DWConv) else conv.dilation[0]
    other = isinstance(conv, nn.Conv2d) and unlike_dwconv(conv)
    if other or len(kernel) != fc1.out_features:
        raise AnalysisError(
            f"expected a depthwise convolution of {fc1.out_features} channels, an odd square "
            f"kernel, stride 1 and zero padding that keeps the size, got {conv}"
        )
    if getattr(conv, "residual", False):
        kernel = kernel + nn.init.dirac_(torch.empty_like(kernel), groups=len(kernel))
    offset = torch.zeros_like(fc1.weight[:, 0]) if fc1.bias is None else fc1.bias
    params = sum(p.numel() for part in (fc1, conv) for p in part.parameters())
    return ExpandedMLP(
        (fc1.weight[..., None, None] * kernel).detach(),
        (offset[:, None, None, None] * kernel).detach(),
        None if conv.bias is None else conv.bias.detach(),
        dilation,
        params,
    )
