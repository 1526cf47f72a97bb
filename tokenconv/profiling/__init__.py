"""Measures any modules against each other, side by side in one run."""

from tokenconv.profiling.comparison import (
    Arm,
    Comparison,
    Measured,
    OperatorChange,
    compare,
    operator_changes,
)
from tokenconv.profiling.gate import Rule, changes, read_comparison
from tokenconv.profiling.measurement import Spread, steady_allocator
from tokenconv.profiling.report import changes_table, report_folder, write_report

__all__ = [
    "Arm",
    "Comparison",
    "Measured",
    "OperatorChange",
    "Rule",
    "Spread",
    "changes",
    "changes_table",
    "compare",
    "operator_changes",
    "read_comparison",
    "report_folder",
    "steady_allocator",
    "write_report",
]
