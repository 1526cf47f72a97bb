"""Depthwise convolution over the token grid: ``api`` checks and chooses, one file per way."""

from tokenconv.ops.depthwise_conv.api import Impl, depthwise_conv
from tokenconv.ops.depthwise_conv.epilogue import Activation, PrefixTokens

__all__ = ["Activation", "Impl", "PrefixTokens", "depthwise_conv"]
