"""Modules that own parameters and call one op."""

from tokenconv.layers.activations import QuickGELU, StarReLU
from tokenconv.layers.base import GridModule
from tokenconv.layers.channel import (
    BatchNorm,
    EfficientChannelAttention,
    GlobalResponseNorm,
    SqueezeExcite,
)
from tokenconv.layers.conv import DWConv3d, GridConv
from tokenconv.layers.depthwise import DWConv, unlike_dwconv
from tokenconv.layers.separable import SeparableConv

__all__ = [
    "BatchNorm",
    "DWConv",
    "DWConv3d",
    "EfficientChannelAttention",
    "GlobalResponseNorm",
    "GridConv",
    "GridModule",
    "QuickGELU",
    "SeparableConv",
    "SqueezeExcite",
    "StarReLU",
    "unlike_dwconv",
]
