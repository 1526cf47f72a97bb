"""What the device can do, measured in the run that is judged by it."""

import torch

from tokenconv.profiling.measurement import Rounds, time_interleaved
from tokenconv.profiling.results import Roof

_SIDE = {"cpu": 1024, "cuda": 8192}
_COPIED = {"cpu": 2**26, "cuda": 2**30}
_ROUNDS = 5


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Time a large matrix product and a large copy, and take the best of a few.

    Args:
        device: A CPU or a GPU.
        dtype: Of the factors.
    """
    side, count = _SIDE[device.type], _COPIED[device.type]
    a, b, product = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    source, target = (torch.zeros(count, device=device, dtype=torch.uint8) for _ in range(2))
    timing = time_interleaved(
        {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)},
        rounds=Rounds.exactly(_ROUNDS, baseline="copy", warmup=1),
        device=device,
    )
    seconds = {name: min(own) / 1e3 for name, own in timing.samples_ms.items()}
    return Roof(
        flops_per_s=2 * side**3 / seconds["product"], bytes_per_s=2 * count / seconds["copy"]
    )
