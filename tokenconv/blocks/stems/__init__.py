"""Stems: what makes tokens of an image, or fewer tokens of many, by convolution."""

from tokenconv.blocks.stems.base import Stem
from tokenconv.blocks.stems.embeddings import ConvEmbed, ConvNeXtStem, MetaFormerStem, PatchEmbed
from tokenconv.blocks.stems.mobile import FastViTStem, MobileOne, MobileViTStem
from tokenconv.blocks.stems.prior import SpatialPrior
from tokenconv.blocks.stems.rows import (
    CCTTokenizer,
    CeiTStem,
    CMTStem,
    Conv2FormerStem,
    EarlyConv,
    ShuntedStem,
    XCiTStem,
)

__all__ = [
    "CCTTokenizer",
    "CMTStem",
    "CeiTStem",
    "Conv2FormerStem",
    "ConvEmbed",
    "ConvNeXtStem",
    "EarlyConv",
    "FastViTStem",
    "MetaFormerStem",
    "MobileOne",
    "MobileViTStem",
    "PatchEmbed",
    "ShuntedStem",
    "SpatialPrior",
    "Stem",
    "XCiTStem",
]
