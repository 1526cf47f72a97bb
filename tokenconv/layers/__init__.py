"""Modules that own parameters and call one op."""

from tokenconv.layers.depthwise import DWConv
from tokenconv.layers.separable import SeparableConv

__all__ = ["DWConv", "SeparableConv"]
