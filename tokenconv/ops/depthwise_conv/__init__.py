"""Depthwise convolution over the token grid: ``api`` checks and chooses, one file per way."""

from tokenconv.ops.depthwise_conv.api import Impl, depthwise_conv

__all__ = ["Impl", "depthwise_conv"]
