"""What every test shares."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are small: several threads would only wait for each other."""
    torch.set_num_threads(1)
