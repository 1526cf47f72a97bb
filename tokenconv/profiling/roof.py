"""What the device can do, measured in the run that is judged by it."""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenconv.profiling.measurement import Rounds, time_interleaved
from tokenconv.profiling.results import Roof

_COPIED = {"cpu": 2**26, "cuda": 2**30}
_LEAST_MS, _LARGEST_SIDE = 2.0, 8192
_ROUNDS = 5


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Time a large matrix product and a large copy, and take the best of a few.

    The product is as large as it takes to last some milliseconds, however slow a dtype is here.

    Args:
        device: A CPU or a GPU.
        dtype: Of the factors.
    """
    side = 256
    while side < _LARGEST_SIDE and _best_ms(_product(side, device, dtype), device) < _LEAST_MS:
        side *= 2
    count = _COPIED[device.type]
    source, target = (torch.zeros(count, device=device, dtype=torch.uint8) for _ in range(2))
    return Roof(
        flops_per_s=2e3 * side**3 / _best_ms(_product(side, device, dtype), device),
        bytes_per_s=2e3 * count / _best_ms(lambda: target.copy_(source), device),
    )


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    a, b, product = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=product)


def _best_ms(step: Callable[[], object], device: torch.device) -> float:
    rounds = Rounds.exactly(_ROUNDS, baseline="", warmup=1)
    return min(time_interleaved({"": step}, rounds=rounds, device=device).samples_ms[""])
