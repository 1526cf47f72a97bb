"""Depthwise convolution over the token grid: ``api`` checks and chooses, one file per way."""

from tokenconv.grid import PrefixTokens
from tokenconv.ops.depthwise_conv.api import Impl, depthwise_conv
from tokenconv.ops.depthwise_conv.epilogue import ACTIVATE, Activation

__all__ = ["ACTIVATE", "Activation", "Impl", "PrefixTokens", "depthwise_conv"]
