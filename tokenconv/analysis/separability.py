"""How nearly a kernel is a sum of few depthwise and pointwise pairs, before anything is changed.

Shape letters as in ``factors``.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokenconv.analysis.factors import Order, matrices

_MOST_RANDOM = 64  # matrices; their mean share varies by a percent then


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a kernel's matrices, see ``factors.matrices``."""

    order: Order
    values: Tensor
    """``(channels, full rank)``, float64, falling."""

    @cached_property
    def explained(self) -> list[float]:
        """Share of the energy ``||W||^2`` that the best 1, 2, ... pairs keep; 1 for no energy."""
        energy = self.values.square().sum(0)
        total = energy.sum()
        if total == 0:
            return [1.0] * len(energy)
        return (1 - self._discarded / total).clamp(0, 1).tolist()

    @cached_property
    def errors(self) -> list[float]:
        """``||W - W'|| / ||W||`` of the best 1, 2, ... pairs; 0 at full rank."""
        total = self.values.square().sum()
        if total == 0:
            return [0.0] * self.values.shape[1]
        return (self._discarded / total).sqrt().tolist()

    @property
    def _discarded(self) -> Tensor:
        """Energy behind each rank, summed from the small end, where nothing cancels."""
        energy = self.values.square().sum(0)
        behind = energy.flip(0).cumsum(0).flip(0)
        return torch.cat([behind[1:], behind.new_zeros(1)])

    @cached_property
    def first(self) -> Tensor:
        """Share of each channel's energy in its first pair, ``(channels,)``; 1 for no energy."""
        energy = self.values.square()
        total = energy.sum(1)
        return torch.where(total > 0, energy[:, 0] / total.clamp(min=1e-300), 1.0)

    def rank_for(self, *, energy: float | None = None, max_error: float | None = None) -> int:
        """The fewest pairs that keep this share of the energy, or do not exceed this error.

        Errors below 1e-12 count as none.

        Args:
            energy: Above 0, at most 1.
            max_error: ``||W - W'|| / ||W||``, from 0 to below 1; used if ``energy`` is None.

        Raises:
            ValueError: If the number is out of its range.
        """
        if energy is not None:
            if not 0 < energy <= 1:
                raise ValueError(f"expected 0 < energy <= 1, got {energy}")
            max_error = (1 - energy) ** 0.5
        if max_error is None or not 0 <= max_error < 1:
            raise ValueError(f"expected 0 <= max_error < 1, got {max_error}")
        within = max(max_error * (1 + 1e-12), 1e-12)
        return next(rank for rank, error in enumerate(self.errors, 1) if error <= within)


@dataclass(frozen=True)
class Separability:
    """What pairs of both orders would keep of one kernel."""

    spectra: dict[Order, Spectrum]
    intra_kernel_correlation: float
    """Share of a filter's energy that one blueprint carries, the mean over filters; what BSConv
    argues with (there with the mean taken away first)."""
    cross_kernel_correlation: float
    """The same for the kernels that read one input channel, which MobileNets presume."""
    of_random: dict[Order, float]
    """What random kernels of this shape would have: only what is above it is structure."""


def separability(weight: Tensor, *, groups: int = 1) -> Separability:
    """Singular spectra of a kernel, per input channel and per filter.

    Args:
        weight: ``(O, I, K, K)``, finite.
        groups: As in ``nn.Conv2d``.

    References:
        https://arxiv.org/abs/1808.05517; https://arxiv.org/abs/2003.13549, section 3
    """
    spectra = {order: spectrum(weight, order, groups) for order in Order}
    return Separability(
        spectra,
        intra_kernel_correlation=spectra[Order.PW_DW].first.mean().item(),
        cross_kernel_correlation=spectra[Order.DW_PW].first.mean().item(),
        of_random={order: _of_random(weight, order, groups) for order in Order},
    )


def spectrum(weight: Tensor, order: Order, groups: int = 1) -> Spectrum:
    """Singular values of one order alone."""
    wide = matrices(weight.detach().double(), order, groups)
    return Spectrum(order, torch.linalg.svdvals(wide))


def _of_random(weight: Tensor, order: Order, groups: int) -> float:
    """Mean share of the first pair for normal kernels."""
    channels, rows, columns = matrices(weight, order, groups).shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(
        min(channels, _MOST_RANDOM), rows, columns,
        generator=generator, dtype=torch.float64, device="cpu",
    )  # fmt: skip
    return Spectrum(order, torch.linalg.svdvals(wide)).first.mean().item()


def pair_macs(
    weight: Tensor, rank: int, order: Order, *, groups: int = 1, stride: tuple[int, int] = (1, 1)
) -> int:
    """Multiply-accumulates of T pairs per output position.

    The pointwise part of ``pw_dw`` runs in front of the stride, so on ``stride`` times as many
    positions; on somewhat fewer where the stride does not divide the sides, and on more where there
    is no padding. A dense kernel takes ``weight.numel()``.
    """
    out_dim, per_group, *sides = weight.shape
    taps, dim = sides[0] * sides[1], per_group * groups
    if order is Order.DW_PW:
        return rank * (dim * taps + out_dim * per_group)
    return rank * (out_dim * taps + out_dim * per_group * stride[0] * stride[1])
