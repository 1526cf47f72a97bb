"""Convolutions at several scales, of which every image takes one: Conv-LoRA's mixture.

Shape letters: B batch, E experts, C channels, K kernel side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks.chain import Steps
from tokenconv.blocks.map_layers import conv
from tokenconv.blocks.maps import Mixer
from tokenconv.grid import PrefixTokens


class ScaleExperts(Mixer):
    """Convolutions at several scales, of which each image takes one: Conv-LoRA's mixture.

    Expert i makes the map i times as large, ``GELU(conv3x3)`` runs on it, and it is made small
    again. Prefix tokens become zero. Parameters: ``E*(K*K*C*C + C) + 2*C*E``.

    Args besides those of ``Mixer``:
        num_experts: Convolutions E.
        balance: Weight of what keeps them all in use, see ``NoisyTopOne``.

    References:
        https://arxiv.org/abs/2401.17868
    """

    prefix_tokens = PrefixTokens.ZERO

    def mix(self, dim: int, side: int, num_experts: int = 8, balance: float = 1e-2) -> Steps:
        """See the class."""
        if num_experts < 1:
            raise ValueError(f"expected num_experts >= 1, got {num_experts=}")
        experts = [_AtScale(dim, side, times) for times in range(1, num_experts + 1)]
        return {"mixture": NoisyTopOne(dim, *experts, balance=balance)}

    def reset_parameters(self) -> None:
        """Initialise as the official code does: as torch's layers, biases zero."""
        super().reset_parameters()
        for key, parameter in self.named_parameters():
            if key.endswith(".bias"):
                nn.init.zeros_(parameter)


class _AtScale(nn.Sequential):
    """Convolution and activation on a map that is several times as large."""

    def __init__(self, dim: int, side: int, times: int):
        super().__init__(conv(dim, dim, side, bias=True), nn.GELU())
        self.times = times

    def forward(self, input: Tensor) -> Tensor:
        if self.times == 1:
            return super().forward(input)
        size = (input.shape[2], input.shape[3])
        large = (self.times * size[0], self.times * size[1])
        out = super().forward(F.interpolate(input, size=large, mode="bicubic"))
        return F.interpolate(out, size=size, mode="bicubic")


class NoisyTopOne(nn.Module):
    """Each image takes one of several experts, by the means of its channels.

    In training the choice is noisy, and the gradient of ``balance`` times the squared coefficients
    of variation, of how many images the experts got and of how many they were likely to get, is
    added in the backward pass: the gates learn from nothing else. It is added as it is, whatever
    the loss is multiplied by; a ``GradScaler`` makes it small.

    Args:
        dim: Channels C.
        *experts: Modules on maps.
        balance: Weight of the loss that keeps all experts in use.

    References:
        https://arxiv.org/abs/1701.06538
    """

    def __init__(self, dim: int, *experts: nn.Module, balance: float):
        super().__init__()
        self.balance = balance
        self.w_gate = nn.Parameter(torch.empty(dim, len(experts)))
        self.w_noise = nn.Parameter(torch.empty(dim, len(experts)))
        self.experts = nn.ModuleList(experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with all experts alike."""
        nn.init.zeros_(self.w_gate)
        nn.init.zeros_(self.w_noise)

    def forward(self, x: Tensor) -> Tensor:
        """Run all experts, and give each image what its own made of it."""
        outs = torch.stack([expert(x) for expert in self.experts], dim=1)
        balance = self.balance if self.training else None
        return _take_one(outs, x.mean((2, 3)), self.w_gate, self.w_noise, balance)


@torch.fx.wrap
def _take_one(
    outs: Tensor, means: Tensor, w_gate: Tensor, w_noise: Tensor, balance: float | None
) -> Tensor:
    """What the expert of each image made of it; one fx node, the same in both modes."""
    clean = means @ w_gate
    loss, logits = None, clean
    if balance is not None:
        std = F.softplus(means @ w_noise) + 1e-2
        logits = clean + torch.randn_like(clean) * std
        loss = balance * _imbalance(clean, logits, std)
    images = torch.arange(outs.shape[0], device=outs.device)
    out = outs[images, logits.argmax(dim=1)]
    return out if loss is None else _WithLoss.apply(out, loss)


class _WithLoss(torch.autograd.Function):
    """The first tensor as it is; the second counts as a part of the loss of the model.

    A loss that is kept on the module instead would be lost by checkpoints, replicas and compilers.
    """

    @staticmethod
    def forward(out: Tensor, loss: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_ones(())


def _imbalance(clean: Tensor, logits: Tensor, std: Tensor) -> Tensor:
    """How unevenly images fall on experts, and were likely to fall."""
    count = logits.shape[1]
    if count == 1:
        return logits.sum() * 0
    highest, second = logits.topk(2, dim=1).values.unbind(dim=1)
    won = logits > second[:, None]
    to_beat = torch.where(won, second[:, None], highest[:, None])
    load = torch.special.ndtr((clean - to_beat) / std).sum(0)
    importance = F.one_hot(logits.argmax(dim=1), count).to(load.dtype).sum(0)
    variations = [x.var() / (x.mean() ** 2 + 1e-10) for x in (importance, load)]
    return torch.stack(variations).sum()
