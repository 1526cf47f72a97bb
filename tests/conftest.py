"""What every test shares."""

import os
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

if not torch.cuda.is_available():  # before Triton is imported, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are small: several threads would only wait for each other."""
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what an older package than a test needs cannot do."""
    for mark in item.iter_markers("needs"):
        package, least, why = mark.args
        if Version(version(package)) < Version(least):
            pytest.skip(f"{package} before {least} {why}")


_DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run: on a GPU if there is one, else they are interpreted."""
    return torch.device(request.param)
