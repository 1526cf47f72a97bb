"""Kernels of convolutions as sums of depthwise and pointwise pairs, and back.

Shape letters: O channels that come out, I channels per group that come in, G groups, K*K kernel,
T pairs (the rank). A kernel is ``(O, I, K, K)``, as in ``nn.Conv2d``, for ``G * I`` channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenconv.choice import Choice


class Order(Choice):
    """Which part of a pair comes first."""

    DW_PW = "dw_pw"
    """Depthwise first, as in MobileNets: rank T for the kernels of every input channel."""
    PW_DW = "pw_dw"
    """Pointwise first, as in blueprint separable convolutions: rank T for every filter."""


def matrices(weight: Tensor, order: Order, groups: int = 1) -> Tensor:
    """The matrices whose rank a separable form bounds, one per channel.

    Args:
        weight: ``(O, I, K, K)``.
        order: ``dw_pw``: one of ``(O/G, K*K)`` for each of ``G*I`` input channels; ``pw_dw``: one
            of ``(I, K*K)`` for each of O output channels.
        groups: G.

    Returns:
        ``(channels, m, K*K)``, a view.
    """
    out_dim, per_group = weight.shape[:2]
    if order is Order.PW_DW:
        return weight.reshape(out_dim, per_group, -1)
    by_group = weight.reshape(groups, out_dim // groups, per_group, -1)
    return by_group.transpose(1, 2).reshape(groups * per_group, out_dim // groups, -1)


def full_rank(weight: Tensor, order: Order, groups: int = 1) -> int:
    """Pairs that suffice for any kernel of this shape: ``min(O/G, K*K)`` or ``min(I, K*K)``."""
    return min(matrices(weight, order, groups).shape[1:])


@dataclass(frozen=True)
class Factors:
    """A kernel as T pairs, ``W = sum_t pointwise_t x depthwise_t``, by channel.

    ``dw_pw``: ``W[o, i] = sum_t pointwise[o, i, t] * depthwise[i, t]``;
    ``pw_dw``: ``W[o, i] = sum_t pointwise[o, i, t] * depthwise[o, t]``.
    """

    order: Order
    depthwise: Tensor
    """``(G*I, T, K, K)`` for ``dw_pw``, ``(O, T, K, K)`` for ``pw_dw``."""
    pointwise: Tensor
    """``(O, I, T)``."""

    @property
    def rank(self) -> int:
        """T."""
        return self.depthwise.shape[1]

    @property
    def groups(self) -> int:
        """G."""
        return len(self.depthwise) // self.pointwise.shape[1] if self.order is Order.DW_PW else 1

    def expand(self) -> Tensor:
        """The dense kernel ``(O, I, K, K)``."""
        out_dim, per_group, rank = self.pointwise.shape
        if self.order is Order.PW_DW:
            return torch.einsum("oit,otxy->oixy", self.pointwise, self.depthwise)
        pointwise = self.pointwise.view(self.groups, -1, per_group, rank)
        depthwise = self.depthwise.view(self.groups, per_group, *self.depthwise.shape[1:])
        kernels = torch.einsum("goit,gitxy->goixy", pointwise, depthwise)
        return kernels.reshape(out_dim, per_group, *self.depthwise.shape[2:])

    @property
    def depthwise_weight(self) -> Tensor:
        """For ``nn.Conv2d``: ``(G*I*T, 1, K, K)`` for ``dw_pw``, ``(O, T, K, K)`` for ``pw_dw``."""
        return self.depthwise.flatten(0, 1).unsqueeze(1) if self._is_first else self.depthwise

    @property
    def pointwise_weight(self) -> Tensor:
        """For ``nn.Conv2d``: ``(O, I*T, 1, 1)`` for ``dw_pw``, ``(O*T, I, 1, 1)`` for ``pw_dw``."""
        if self._is_first:
            return self.pointwise.flatten(1)[..., None, None]
        return self.pointwise.transpose(1, 2).flatten(0, 1)[..., None, None]

    @classmethod
    def of_weights(cls, order: Order, depthwise: Tensor, pointwise: Tensor, rank: int) -> "Factors":
        """Factors from weights laid out as the two properties say, or linear ones ``(O, I*T)``."""
        sides = depthwise.shape[-2:]
        if order is Order.DW_PW:
            pointwise = pointwise.reshape(len(pointwise), -1, rank)
            return cls(order, depthwise.reshape(-1, rank, *sides), pointwise)
        pointwise = pointwise.reshape(len(pointwise) // rank, rank, -1).transpose(1, 2)
        return cls(order, depthwise.reshape(-1, rank, *sides), pointwise)

    @property
    def _is_first(self) -> bool:
        """Whether the depthwise part is."""
        return self.order is Order.DW_PW

    def padded(self, rank: int) -> "Factors":
        """The same kernel with pairs of zeros behind the others, to have so many."""
        more = rank - self.rank
        depthwise = F.pad(self.depthwise, (0, 0, 0, 0, 0, more))
        return Factors(self.order, depthwise, F.pad(self.pointwise, (0, more)))

    def canonical(self) -> "Factors":
        """The same kernel in the one gauge that all who have that kernel share.

        Each depthwise kernel can be scaled if its pointwise weights are scaled back, and pairs of
        one channel can be mixed. Here the depthwise kernels of a channel are orthonormal, in order
        of the energy they carry, each with its largest entry positive. Unique where no two
        singular values of a channel are equal.
        """
        weight = self.expand()
        rank = min(self.rank, full_rank(weight, self.order, self.groups))
        return factorise(weight, rank, order=self.order, groups=self.groups)


def factorise(
    weight: Tensor, rank: int = 1, *, order: Order | str = Order.DW_PW, groups: int = 1
) -> Factors:
    """The T pairs nearest to a kernel in the Frobenius norm, in canonical form.

    One singular value decomposition per channel, cut off behind T values: what is lost is the
    energy of those cut off, and no other T pairs of this order lose less (Eckart and Young).

    Args:
        weight: ``(O, I, K, K)``.
        rank: T, from 1 to ``full_rank``, where the pairs are exact.
        order: Which part comes first, see ``Order``.
        groups: G.

    Returns:
        Factors in the dtype of ``weight``; computed in float64.

    Raises:
        ValueError: If ``rank`` is out of range.
        UnknownNameError: If there is no such order.

    References:
        Network Decoupling, https://arxiv.org/abs/1808.05517;
        Blueprint Separable Convolution, https://arxiv.org/abs/2003.13549
    """
    order = Order.of(order)
    most = full_rank(weight, order, groups)
    if not 1 <= rank <= most:
        raise ValueError(f"expected a rank from 1 to {most}, got {rank}")
    wide = matrices(weight.detach().double(), order, groups)
    left, right = (part[..., :rank] for part in _svd(wide))
    right = right.mT
    peak = right.gather(2, right.abs().argmax(2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(right)  # (channels, T, 1)
    left, right = left * sign.transpose(1, 2), right * sign
    out_dim, per_group, *sides = weight.shape
    if order is Order.DW_PW:  # (G*I, O/G, T) -> (O, I, T)
        left = left.reshape(groups, per_group, out_dim // groups, rank).transpose(1, 2)
    return Factors(
        order,
        right.reshape(len(right), rank, *sides).to(weight.dtype),
        left.reshape(out_dim, per_group, rank).to(weight.dtype),
    )


def _svd(wide: Tensor) -> tuple[Tensor, Tensor]:
    """``A = left @ right.T`` with orthonormal columns on the right and the energy on the left.

    By way of the triangular factor, whose decomposition is small: 100 times as fast for many
    matrices of 512 rows and 9 columns.
    """
    if wide.shape[1] < wide.shape[2]:
        basis, triangle = torch.linalg.qr(wide.mT)
        right, values, left = torch.linalg.svd(triangle, full_matrices=False)
        return left.mT * values.unsqueeze(1), basis @ right
    basis, triangle = torch.linalg.qr(wide)
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return basis @ (left * values.unsqueeze(1)), right.mT


def relative_error(weight: Tensor, other: Tensor) -> float:
    """``||W - W'|| / ||W||`` in float64; of no energy, 0 where nothing is lost."""
    weight = weight.detach().double()
    lost = (other.detach().to(weight) - weight).norm()
    return (lost / weight.norm().clamp(min=1e-300)).item()


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker products of corresponding columns: ``(m, C), (n, C) -> (m*n, C)``.

    A separable layer is one: with the pointwise weights ``P`` ``(O, C)`` and the depthwise kernels
    ``D`` as columns ``(K*K, C)``, ``khatri_rao(P, D)`` is its dense kernel with the columns
    ``W[:, c].flatten()``.

    References:
        https://doi.org/10.1137/07070111X, section 2.6
    """
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"expected as many columns, got {left.shape[1]} and {right.shape[1]}")
    return torch.einsum("mc,nc->mnc", left, right).flatten(0, 1)


def degrees_of_freedom(
    weight: Tensor, rank: int = 1, *, order: Order | str = Order.DW_PW, groups: int = 1
) -> int:
    """Dimension of the set of kernels that T pairs can be.

    ``T * (m + K*K - T)`` for each matrix ``(m, K*K)``: less than there are parameters, since
    ``T * T`` per channel only move within one kernel. For one pair of ``dw_pw``:
    ``C*K*K + C*O - C``, of ``C*K*K + C*O`` parameters.

    Args:
        weight: Any kernel of that shape, ``(O, I, K, K)``; values do not matter.
        rank: T.
        order: Which part comes first.
        groups: G.
    """
    channels, rows, columns = matrices(weight, Order.of(order), groups).shape
    rank = min(rank, rows, columns)
    return channels * rank * (rows + columns - rank)
