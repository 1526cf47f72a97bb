"""What a model's kernels are, from its weights; nothing is timed."""

from tokenconv.analysis.decomposition import (
    DecomposedConv,
    Decomposition,
    decompose,
    decompose_,
)
from tokenconv.analysis.depthwise import DepthwiseKernels, depthwise_kernels, moved
from tokenconv.analysis.factors import Factors, Order, degrees_of_freedom, factorise, khatri_rao
from tokenconv.analysis.fields import Fields
from tokenconv.analysis.mlp import ExpandedMLP, expand_mlp
from tokenconv.analysis.receptive_field import (
    attention_distance,
    effective_receptive_field,
    radius,
)
from tokenconv.analysis.separability import Separability, Spectrum, separability
from tokenconv.analysis.separable import expand, factors_of, init_from_dense_
from tokenconv.analysis.survey import Analysis, DenseLayer, Option, analyze

__all__ = [
    "Analysis",
    "DecomposedConv",
    "Decomposition",
    "DenseLayer",
    "DepthwiseKernels",
    "ExpandedMLP",
    "Factors",
    "Fields",
    "Option",
    "Order",
    "Separability",
    "Spectrum",
    "analyze",
    "attention_distance",
    "decompose",
    "decompose_",
    "degrees_of_freedom",
    "depthwise_kernels",
    "effective_receptive_field",
    "expand",
    "expand_mlp",
    "factorise",
    "factors_of",
    "init_from_dense_",
    "khatri_rao",
    "moved",
    "radius",
    "separability",
]
