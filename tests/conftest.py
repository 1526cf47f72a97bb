"""What every test shares."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are small: several threads would only wait for each other."""
    torch.set_num_threads(1)


_DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: on a GPU if there is one, else they are interpreted."""
    return torch.device(request.param)
