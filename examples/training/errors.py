"""What stops a run with a line that says why."""


class TrainingError(RuntimeError):
    """Training cannot begin or go on; what was written before is whole."""


class ResumeError(TrainingError):
    """A run cannot go on from a checkpoint."""
