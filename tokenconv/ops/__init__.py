"""Stateless functions on tokens ``(B, N, C)``, a folder each."""

from tokenconv.ops.depthwise_conv import Impl, depthwise_conv

__all__ = ["Impl", "depthwise_conv"]
