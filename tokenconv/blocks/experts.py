"""Several convolutions, of which every image takes its own mixture.

Convolution is linear in its kernel: mixing kernels is mixing their outputs, for the price of one.

Shape letters: B batch, E experts, C channels, O channels that come out, K kernel side.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import conv, depthwise
from tokenconv.blocks.maps import MapBlock
from tokenconv.blocks.starts import init_kaiming_
from tokenconv.errors import GridError


class ExpertConv(nn.Module):
    """A convolution with the kernel ``sum_e gate_e(x) * weight_e`` of an image's own gates.

    Args:
        one: Has the shape of every kernel, and the stride, padding and groups.
        routing: Makes gates ``(B, E)`` of the means of the channels ``(B, C)``.
        num_experts: Kernels E.
        bias: Learn offsets, mixed as the kernels are.

    Raises:
        ValueError: If there is no expert.
    """

    def __init__(self, one: nn.Conv2d, routing: nn.Module, num_experts: int, *, bias: bool = False):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"expected num_experts >= 1, got {num_experts}")
        self.routing = routing
        self.stride, self.padding, self.groups = one.stride, one.padding, one.groups
        self.weight = nn.Parameter(torch.empty(num_experts, *one.weight.shape))
        self.bias = nn.Parameter(torch.empty(num_experts, one.out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every kernel as ``nn.Conv2d`` does."""
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0, 0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def init_neutral_(self) -> None:
        """Make all kernels zero; the gates stay."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every map ``(C, H, W)`` of the batch with a kernel of its own."""
        gates = self.routing(x.mean((2, 3))).to(self.weight.dtype)
        if torch.compiler.is_exporting():
            return self._mix_outputs(x, gates)
        weight = torch.einsum("be,eoihw->boihw", gates, self.weight)
        bias = None if self.bias is None else gates @ self.bias
        return _convolve_each(x, weight, bias, self.stride, self.padding, self.groups)

    def _mix_outputs(self, x: Tensor, gates: Tensor) -> Tensor:
        """The same, by the outputs of all kernels: ONNX wants a constant number of groups."""
        out = x.new_zeros(())
        for expert, kernel in enumerate(self.weight):
            bias = None if self.bias is None else self.bias[expert]
            one = F.conv2d(x, kernel, bias, self.stride, self.padding, groups=self.groups)
            out = out + gates[:, expert, None, None, None] * one
        return out


@torch.fx.wrap
def _convolve_each(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, groups: int
) -> Tensor:
    """Every image with its own kernel ``(B, O, C/groups, K, K)``; one fx node."""
    if x.shape[0] == 0:  # no image, and no group
        some = weight.new_zeros(weight.shape[1:])
        return F.conv2d(x, some, stride=stride, padding=padding, groups=groups)
    side_by_side = x.flatten(0, 1)[None]  # images in the channels
    out = F.conv2d(
        side_by_side,
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        stride=stride,
        padding=padding,
        groups=groups * x.shape[0],
    )
    return out[0].unflatten(0, (x.shape[0], -1))


class CondConv(MapBlock):
    """CondConv: a convolution whose kernel is mixed by a sigmoid of the image's channel means.

    Parameters: ``E*K*K*C*O/groups + E*(C + 1)``, and ``E*O`` with bias.

    Args besides those of ``MapBlock``:
        num_experts: Kernels E.
        groups: Groups of channels.
        bias: Learn offsets.

    References:
        https://arxiv.org/abs/1904.04971
    """

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        num_experts: int = 4,
        groups: int = 1,
        bias: bool = False,
    ) -> Steps:
        """See the class."""
        routing = nn.Sequential(nn.Linear(dim, max(1, num_experts)), nn.Sigmoid())
        one = conv(dim, out_dim, side, stride=stride, groups=groups)
        return {"conv": ExpertConv(one, routing, num_experts, bias=bias)}


class DynamicConv(MapBlock):
    """Dynamic convolution: CondConv with gates that add up to one, by a softmax.

    ``gates = softmax(fc2(ReLU(fc1(means))) / temperature)``, ``fc1`` to a quarter of the channels.
    The paper starts training at a temperature of 30 and lowers it to 1 over the first epochs: set
    ``block.temperature``. Parameters, ``w = C//4``: ``E*(K*K*C*O/groups + O) + C*w + w + w*E + E``.

    Args besides those of ``MapBlock``:
        num_experts: Kernels E.
        temperature: Divides what the softmax is given.
        groups: Groups of channels.
        bias: Learn offsets.

    References:
        https://arxiv.org/abs/1912.03458
    """

    def steps(
        self,
        dim: int,
        out_dim: int,
        side: int,
        stride: int,
        num_experts: int = 4,
        temperature: float = 30.0,
        groups: int = 1,
        bias: bool = True,
    ) -> Steps:
        """See the class."""
        if temperature <= 0:
            raise ValueError(f"expected temperature > 0, got {temperature}")
        routing = _Softmax(dim, max(1, dim // 4), num_experts, temperature)
        one = conv(dim, out_dim, side, stride=stride, groups=groups)
        return {"conv": ExpertConv(one, routing, num_experts, bias=bias)}

    @property
    def temperature(self) -> float:
        """Divides what the softmax is given; a buffer, which is saved."""
        return self._routing.temperature.item()

    @temperature.setter
    def temperature(self, value: float) -> None:
        if value <= 0:
            raise ValueError(f"expected temperature > 0, got {value}")
        self._routing.temperature.fill_(value)

    @property
    def _routing(self) -> "_Softmax":
        routing = self.get_submodule("body.conv.routing")
        assert isinstance(routing, _Softmax)
        return routing


class _Softmax(nn.Module):
    """Gates that add up to one, of the means of the channels."""

    temperature: Tensor

    def __init__(self, dim: int, width: int, num_experts: int, temperature: float | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, max(1, num_experts))
        self.first_temperature = temperature
        if temperature is not None:
            self.register_buffer("temperature", torch.tensor(float(temperature)))

    def reset_parameters(self) -> None:
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        if self.first_temperature is not None:
            self.temperature.fill_(self.first_temperature)

    def forward(self, means: Tensor) -> Tensor:
        logits = self.fc2(F.relu(self.fc1(means)))
        if self.first_temperature is not None:
            logits = logits / self.temperature
        return logits.softmax(dim=-1)


class ResDSC(MapBlock):
    """The residual block of ResNet-26 with separable convolutions, for one domain or several.

    ``DWConv (stride) -> 1x1 -> BN -> ReLU -> DWConv -> 1x1 -> BN``, plus the input, then ReLU.
    Where width or size change the input is averaged and filled up with zero channels. No biases. A
    model serves several domains by depthwise kernels, norms and a head of each (``add_domain`` of
    ``tokenconv.surgery``). Soft sharing lets a domain mix the depthwise kernels of all: with
    ``num_domains > 1`` every depthwise convolution has a kernel of each domain, and gates
    ``softmax(fc2(ReLU(fc1(means))))``, ``fc1`` to ``C//4 + 1`` channels. Parameters of one domain:
    ``K*K*C + C*O + 2*O + K*K*O + O*O + 2*O``.

    Args besides those of ``MapBlock``:
        num_domains: Depthwise kernels to mix; 1 mixes none.

    Raises:
        ValueError: If ``out_dim`` is less than ``dim``.
        GridError: If a stride does not divide the size.

    References:
        https://arxiv.org/abs/1902.00927
    """

    adds_input = True
    init = staticmethod(init_kaiming_)

    def steps(self, dim: int, out_dim: int, side: int, stride: int, num_domains: int = 1) -> Steps:
        """See the class."""
        if out_dim < dim:
            raise ValueError(f"expected out_dim >= dim, got {dim=}, {out_dim=}")
        if num_domains < 1:
            raise ValueError(f"expected num_domains >= 1, got {num_domains}")
        return {
            "depthwise1": _shared_depthwise(dim, side, stride, num_domains),
            "pointwise1": conv(dim, out_dim),
            "norm1": nn.BatchNorm2d(out_dim),
            "act1": nn.ReLU(),
            "depthwise2": _shared_depthwise(out_dim, side, 1, num_domains),
            "pointwise2": conv(out_dim, out_dim),
            "norm2": nn.BatchNorm2d(out_dim),
        }

    def reset_parameters(self) -> None:
        """Initialise as the official code does."""
        super().reset_parameters()
        for part in self.modules():
            if isinstance(part, ExpertConv):
                for kernel in part.weight:
                    nn.init.kaiming_normal_(kernel, mode="fan_out")

    def shortcut(self, dim: int, out_dim: int, stride: int) -> nn.Module:
        """The mean of each patch, and channels of zeros."""
        return _AverageAndPad(out_dim - dim, stride)

    def behind(self, out_dim: int) -> nn.Module:
        """An activation."""
        return nn.ReLU()


def _shared_depthwise(dim: int, side: int, stride: int, num_domains: int) -> nn.Module:
    one = depthwise(dim, side, stride=stride)
    if num_domains == 1:
        return one
    return ExpertConv(one, _Softmax(dim, dim // 4 + 1, num_domains), num_domains)


class _AverageAndPad(nn.Module):
    """Means of patches, with channels of zeros behind those that are there."""

    def __init__(self, more: int, stride: int):
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        pooled = _average_patches(x, self.stride) if self.stride > 1 else x
        return F.pad(pooled, (0, 0, 0, 0, 0, self.more))


@torch.fx.wrap
def _average_patches(x: Tensor, side: int) -> Tensor:
    """One fx node, since its check cannot be traced symbolically."""
    if x.shape[-2] % side or x.shape[-1] % side:
        raise GridError(f"expected a size that {side} divides, got {tuple(x.shape[-2:])}")
    return F.avg_pool2d(x, side)
