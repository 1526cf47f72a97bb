"""What a device can do: known times give known roofs."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tokenconv.profiling import roof
from tokenconv.profiling.measurement import Timing
from tokenconv.profiling.roof import measure_roof

CPU = torch.device("cpu")


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sides of the products that are timed; a product of side 512 takes 1, 3 and 2 ms."""
    found: list[int] = []

    def timed(steps: Mapping[str, Callable[[], torch.Tensor]], **options: Any) -> Timing:
        result = steps[""]()
        if result.ndim == 1:  # the copy
            return Timing({"": [40.0, 20.0, 30.0]}, {}, 0.0)
        found.append(len(result))
        scale = (len(result) / 512) ** 3
        return Timing({"": [1.0 * scale, 3.0 * scale, 2.0 * scale]}, {}, 0.0)

    monkeypatch.setattr(roof, "time_interleaved", timed)
    return found


def test_the_best_time_of_a_product_that_lasts(sides: list[int]):
    found = measure_roof(CPU, torch.float32)
    assert sides == [256, 512, 1024, 1024]
    assert found.flops_per_s == pytest.approx(2 * 512**3 / 1e-3)
    assert found.bytes_per_s == pytest.approx(2 * 2**26 / 20e-3), "read and written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_has_a_roof(dtype: torch.dtype):
    found = measure_roof(CPU, dtype)
    assert found.flops_per_s > 1e6
    assert found.bytes_per_s > 1e6
