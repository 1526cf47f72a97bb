"""Measures any modules against each other, side by side in one run."""

from tokenconv.profiling.comparison import Arm, Comparison, Measured, compare
from tokenconv.profiling.gate import Rule, changes, read_comparison
from tokenconv.profiling.measurement import Spread, steady_allocator
from tokenconv.profiling.report import report_folder, write_report

__all__ = [
    "Arm",
    "Comparison",
    "Measured",
    "Rule",
    "Spread",
    "changes",
    "compare",
    "read_comparison",
    "report_folder",
    "steady_allocator",
    "write_report",
]
