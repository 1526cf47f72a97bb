"""Scripts of examples/ can be imported, and leave no accelerator behind."""

import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture
def forget_accelerator():
    """Forgets the accelerator of a script that ran in this process, at the end too."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    yield forget
    forget()
