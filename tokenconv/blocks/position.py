"""Position encodings and local interaction by convolution over the token grid.

Shape letters: B batch, N tokens = P prefix + grid, C channels, K kernel side.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenconv.blocks.chain import Chain
from tokenconv.blocks.starts import init_kaiming_, init_linears_, init_pvt_, init_torch_
from tokenconv.grid import Grid, PrefixTokens, TokenGrid, map_to_tokens, tokens_to_map
from tokenconv.layers import BatchNorm, DWConv, GridModule
from tokenconv.ops.depthwise_conv import Impl


class PositionalConv(GridModule):
    """``x + DWConv(x)``, common to the position encodings; prefix tokens pass unchanged.

    Zero padding tells the tokens where the border is. Parameters: ``C * (K*K + 1)``. Keys:
    ``proj``; those of the official modules (``proj.0``, ``pos_enc``) load as well.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K; None takes that of the paper.
        impl: Implementation of the convolution, see ``Impl``; None chooses.

    Raises:
        ValueError: If the kernel is even or ``dim`` is not positive.
    """

    kernel_size: ClassVar[int] = 3
    init: ClassVar[Callable[[nn.Module], None]] = staticmethod(init_torch_)
    """How the paper's code starts the kernel."""

    def __init__(self, dim: int, *, kernel_size: int | None = None, impl: Impl | str | None = None):
        super().__init__()
        side = self.kernel_size if kernel_size is None else kernel_size
        self.proj = DWConv(dim, side, residual=True, impl=impl)
        self._register_load_state_dict_pre_hook(_accept_official_keys)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper's code does."""
        type(self).init(self)

    def init_neutral_(self) -> None:
        """Make the output equal to the input."""
        self.proj.init_neutral_()

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Add the position encoding; see ``GridModule``."""
        return self.proj(x, *grid)


class PEG(PositionalConv):
    """Position encoding generator of CPVT and Twins: behind the first block, or of every stage.

    The kernel starts from a normal of std ``sqrt(2) / K``, the bias from zero.

    References:
        CPVT, https://arxiv.org/abs/2102.10882; Twins, https://arxiv.org/abs/2104.13840
    """

    init = staticmethod(init_pvt_)

    def no_weight_decay(self) -> set[str]:
        """Parameters that Twins keeps out of weight decay: the kernel (biases always are)."""
        return {"proj.weight"}


class LPU(PositionalConv):
    """Local perception unit of CMT: in front of every block.

    The paper has no prefix tokens. The kernel starts from a Kaiming normal over the outputs.

    References:
        https://arxiv.org/abs/2107.06263
    """

    init = staticmethod(init_kaiming_)


class CPE(PositionalConv):
    """Convolutional position encoding of CoaT: in front of every block, one for a whole stage.

    The kernel starts as that of ``nn.Conv2d``.

    References:
        https://arxiv.org/abs/2104.06399
    """


class DPE(PositionalConv):
    """Dynamic position embedding of UniFormer: in front of every block.

    RMT and BiFormer have the same. The papers have no prefix tokens. The kernel starts as that of
    ``nn.Conv2d``.

    References:
        UniFormer, https://arxiv.org/abs/2201.04676; RMT, https://arxiv.org/abs/2309.11523;
        BiFormer, https://arxiv.org/abs/2303.08810
    """


class RepCPE(PositionalConv):
    """Conditional position encoding of FastViT, with a 7x7 kernel: in front of a stage.

    ``fold_`` makes one convolution of it. The paper has no prefix tokens. The kernel starts as
    that of ``nn.Conv2d``.

    References:
        https://arxiv.org/abs/2303.14189
    """

    kernel_size = 7


class AbsPosEmbed(GridModule):
    """Learned absolute position embedding of ViT and PVT: ``x + pos``; no convolution.

    For the attention-only side of a comparison: PVTv2 and SegFormer know positions from the zero
    padding of their convolutions alone, and without those from nothing. In front of the first
    block, or of that of every stage. Prefix tokens pass unchanged. Parameters: ``C * H * W``.
    Starts from a truncated normal of std 0.02.

    Args:
        dim: Channels C.
        size: Rows and columns H, W that are learned; on another grid they are resized, bilinearly
            as in PVT.

    Raises:
        ValueError: If ``dim`` or a side is not positive.

    References:
        PVT, https://arxiv.org/abs/2102.12122; ViT, https://arxiv.org/abs/2010.11929
    """

    def __init__(self, dim: int, *, size: tuple[int, int] = (14, 14)):
        super().__init__()
        if min(dim, *size) < 1:
            raise ValueError(f"expected positive dim and size, got {dim=}, {size=}")
        self.size = tuple(size)
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(size), dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ViT does."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def init_neutral_(self) -> None:
        """Make the output equal to the input."""
        nn.init.zeros_(self.pos_embed)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the papers keep out of weight decay."""
        return {"pos_embed"}

    def forward(self, x: Tensor, *grid: Grid) -> Tensor:
        """Add the position embedding; see ``GridModule``."""
        return _add_position(x, self.pos_embed, self.size, grid)


@torch.fx.wrap
def _add_position(
    x: Tensor, pos_embed: Tensor, size: tuple[int, ...], grid: tuple[Grid, ...]
) -> Tensor:
    """One fx node: it depends on sizes."""
    full = TokenGrid.of(*grid)
    full.check(x)
    if torch.compiler.is_compiling() or full.size != size:  # else no graph would take all sizes
        fmap = tokens_to_map(pos_embed, size)
        pos_embed = map_to_tokens(F.interpolate(fmap, full.size[-2:], mode="bilinear"))
    if len(full.size) == 3:  # the same in every frame
        pos_embed = pos_embed.repeat(1, full.size[0], 1)
    return x + F.pad(pos_embed, (0, 0, full.num_prefix_tokens, 0)).to(x.dtype)


class LPI(Chain):
    """Local patch interaction of XCiT: two convolutions between the tokens' channels and nothing.

    ``DWConv -> activation -> BN -> DWConv``, no residual: XCiT adds it as a third branch of the
    block, behind a norm and LayerScale. Prefix tokens pass unchanged; the paper's model has none
    there. Parameters: ``2*C*(K*K + 1) + 2*C``.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K.
        act_layer: Makes the activation.
        impl: Implementation of the convolutions, see ``Impl``; None chooses.

    Raises:
        ValueError: If the kernel is even or ``dim`` is not positive.

    References:
        https://arxiv.org/abs/2106.09681
    """

    prefix_tokens = PrefixTokens.PASS

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 3,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        impl: Impl | str | None = None,
    ):
        super().__init__(
            dwconv1=DWConv(dim, kernel_size, impl=impl),
            act=act_layer(),
            norm=BatchNorm(dim),
            dwconv2=DWConv(dim, kernel_size, impl=impl),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as XCiT does."""
        init_linears_(self)


class TinyViTConv(Chain):
    """TinyViT's local convolution, between attention and MLP: ``DWConv -> BN``, no residual.

    Prefix tokens pass unchanged; the paper has none. No bias in the convolution. Starts as
    ``nn.Conv2d``. Parameters: ``K*K*C + 2*C``.

    Args:
        dim: Channels C.
        kernel_size: Odd kernel side K.
        impl: Implementation of the convolution, see ``Impl``; None chooses.

    Raises:
        ValueError: If the kernel is even or ``dim`` is not positive.

    References:
        https://arxiv.org/abs/2207.10666
    """

    prefix_tokens = PrefixTokens.PASS

    def __init__(self, dim: int, *, kernel_size: int = 3, impl: Impl | str | None = None):
        super().__init__(
            dwconv=DWConv(dim, kernel_size, bias=False, impl=impl), norm=BatchNorm(dim)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d``."""
        init_torch_(self)


def _accept_official_keys(state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    for name in ("weight", "bias"):
        for official in (f"{prefix}proj.0.{name}", f"{prefix}pos_enc.{name}"):
            if official in state_dict:
                state_dict[f"{prefix}proj.{name}"] = state_dict.pop(official)
