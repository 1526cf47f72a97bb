"""Measures any modules against each other, side by side in one run."""

from tokenconv.profiling.comparison import Arm, Comparison, Measured, compare
from tokenconv.profiling.measurement import Spread
from tokenconv.profiling.report import report_folder, write_report

__all__ = [
    "Arm",
    "Comparison",
    "Measured",
    "Spread",
    "compare",
    "report_folder",
    "write_report",
]
