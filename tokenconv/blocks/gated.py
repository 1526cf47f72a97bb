"""Feed-forward blocks in which one half of the hidden channels gates the other.

Shape letters: B batch, N tokens = P prefix + grid, C channels, h hidden width, K kernel side.
"""

import torch
from torch import Tensor, nn

from tokenconv.blocks.chain import Chain, Shortcut, Steps
from tokenconv.blocks.feed_forward import FeedForward, Parts
from tokenconv.blocks.starts import init_pvt_, init_truncated_
from tokenconv.grid import Grid
from tokenconv.layers import DWConv, GridModule


class Gate(GridModule):
    """``gate(a) * value(b)``, where the channels of ``x`` are cut into ``a`` and ``b``.

    Args:
        gate: What is made of the first half.
        value: What is made of the second half; None leaves it.
    """

    def __init__(self, gate: nn.Module, value: nn.Module | None = None):
        super().__init__()
        self.gate = gate
        self.value = nn.Identity() if value is None else value
        self.is_fused = False
        """Whether the convolution, which has the activation then, multiplies as well."""

    def can_fuse(self) -> bool:
        """Whether the first half is a convolution and an activation, and the second is left."""
        steps = [*self.gate.children()] if isinstance(self.gate, Chain) else []
        return (
            len(steps) == 2 and isinstance(steps[0], DWConv) and isinstance(self.value, nn.Identity)
        )

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Half the channels of tokens ``(B, N, 2*h)``."""
        halves = x.chunk(2, dim=-1)
        if self.is_fused:
            conv: DWConv = next(self.gate.children())  # pyright: ignore[reportAssignmentType]
            return conv(halves[0], *grid, gate=halves[1])
        outs = [
            part(halves[i], *grid) if isinstance(part, GridModule) else part(halves[i])
            for i, part in enumerate((self.gate, self.value))
        ]
        return outs[0] * outs[1]


class GDFN(FeedForward):
    """Restormer's gated feed-forward: the convolution runs over gate and value.

    ``fc1 (to 2*h) -> DWConv -> activation(first half) * second half -> fc2``; one ``bias`` flag for
    all layers. The paper has no prefix tokens; here they skip the convolution and take the rest.
    Parameters without biases: ``3*C*h + 2*K*K*h``.

    Args besides those of ``FeedForward``:
        bias: Learn offsets, in all layers.

    References:
        https://arxiv.org/abs/2111.09881
    """

    mlp_ratio = 2.66

    def steps(self, parts: Parts, bias: bool = False) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(2, bias=bias),
            "dwconv": parts.conv(2 * parts.hidden_dim, bias=bias),
            "gate": Gate(parts.act()),
            "fc2": parts.project(bias=bias),
        }


class ConvGLU(FeedForward):
    """TransNeXt's convolutional gated linear unit: the convolution runs over the gate alone.

    ``fc1 (to 2*h) -> activation(DWConv(first half)) * second half -> dropout -> fc2 -> dropout``,
    ``h = int(2/3 * int(C * mlp_ratio))``. The paper has no prefix tokens; here they skip the
    convolution and take the rest. Parameters: ``3*C*h + 2*h + C + (K*K + 1)*h``. The paper takes
    ratio 8 in early and 4 in late stages.

    References:
        https://arxiv.org/abs/2311.17132
    """

    init = staticmethod(init_pvt_)

    @staticmethod
    def hidden_dim_of(dim: int, mlp_ratio: float) -> int:
        """Two thirds, since the first layer is twice as wide."""
        return int(2 * int(dim * mlp_ratio) / 3)

    def steps(self, parts: Parts) -> Steps:
        """See the class."""
        return {
            "fc1": parts.expand(2),
            "gate": Gate(Chain(dwconv=parts.conv(), act=parts.act())),
            "drop1": parts.drop(),
            "fc2": parts.project(),
            "drop2": parts.drop(),
        }


class LastChannels(GridModule):
    """A convolution on as many of the last channels as it takes; the others stay as they are."""

    def __init__(self, conv: DWConv):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """See the class."""
        kept, convolved = x[..., : -self.conv.dim], x[..., -self.conv.dim :]
        return torch.cat([kept, self.conv(convolved, *grid)], dim=-1)


class GatedCNN(FeedForward):
    """MambaOut's gated CNN block, with its norm and residual: some channels are convolved.

    ``x + fc2(activation(g) * concat(i, DWConv(c)))``, where ``fc1(LayerNorm(x))``, eps 1e-6, is cut
    into ``g`` of h channels, and ``i`` and ``c``, together h. The paper has no prefix tokens; here
    they skip the convolution and take the rest. Parameters, with c convolved channels:
    ``3*C*h + 2*h + C + (K*K + 1)*c + 2*C``.

    Args besides those of ``FeedForward``:
        conv_ratio: Channels that are convolved, over ``dim``.
        residual: Add ``x``.

    References:
        https://arxiv.org/abs/2405.07992
    """

    mlp_ratio = 8 / 3
    kernel_size = 7
    init = staticmethod(init_truncated_)

    def steps(self, parts: Parts, conv_ratio: float = 1.0, residual: bool = True) -> Steps:
        """See the class."""
        convolved = int(conv_ratio * parts.dim)
        if not 0 < convolved <= parts.hidden_dim:
            raise ValueError(
                f"expected 1 to {parts.hidden_dim} convolved channels, got {convolved} "
                f"({conv_ratio=})"
            )
        branch: Steps = {
            "norm": nn.LayerNorm(parts.dim, eps=1e-6),
            "fc1": parts.expand(2),
            "gate": Gate(parts.act(), LastChannels(parts.conv(convolved))),
            "fc2": parts.project(),
        }
        return {"branch": Shortcut(**branch)} if residual else branch
