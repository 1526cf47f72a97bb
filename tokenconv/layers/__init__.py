"""Modules that own parameters and call one op."""

from tokenconv.layers.depthwise import DWConv

__all__ = ["DWConv"]
