"""What a model's kernels are, from its weights; nothing is timed."""

from tokenconv.analysis.decomposition import (
    DecomposedConv,
    Decomposition,
    decompose,
    decompose_,
)
from tokenconv.analysis.factors import Factors, Order, degrees_of_freedom, factorise, khatri_rao
from tokenconv.analysis.mlp import ExpandedMLP, expand_mlp
from tokenconv.analysis.separability import Separability, Spectrum, separability
from tokenconv.analysis.separable import expand, factors_of, init_from_dense_

__all__ = [
    "DecomposedConv",
    "Decomposition",
    "ExpandedMLP",
    "Factors",
    "Order",
    "Separability",
    "Spectrum",
    "decompose",
    "decompose_",
    "degrees_of_freedom",
    "expand",
    "expand_mlp",
    "factorise",
    "factors_of",
    "init_from_dense_",
    "khatri_rao",
    "separability",
]
