"""Where the depthwise convolutions stand under the roof of the device."""

from dataclasses import dataclass

import torch

from tokenconv.profiling.measurement import Mode
from tokenconv.profiling.results import Arm, Comparison


@dataclass(frozen=True)
class RooflinePoint:
    """One depthwise convolution, in the forward pass of a batch."""

    name: str
    intensity: float
    """FLOPs per byte of traffic."""
    flops_per_s: float


def roofline_points(comparison: Comparison, arm: Arm, mode: Mode) -> list[RooflinePoint]:
    """Every depthwise convolution of an arm that was timed in a mode."""
    if mode not in arm.modes:
        return []
    itemsize = getattr(torch, comparison.dtype).itemsize
    batch = comparison.batch_size
    points = []
    for name, ms in arm.modes[mode].depthwise_ms.items():
        one = arm.depthwise[name]
        weight = one.params * itemsize  # read once for all images
        flops, traffic = 2 * one.macs * batch, batch * (one.bytes - weight) + weight
        if flops and ms:
            points.append(RooflinePoint(name, flops / traffic, flops / (ms / 1e3)))
    return points
