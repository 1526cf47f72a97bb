"""Measures any modules against each other, side by side in one run."""

from tokenconv.profiling.comparison import compare
from tokenconv.profiling.gate import Rule, changes, other_conditions
from tokenconv.profiling.measurement import Spread, steady_allocator
from tokenconv.profiling.report import (
    COMPARISON_FILES,
    changes_table,
    write_report,
    write_sweep,
    write_views,
)
from tokenconv.profiling.results import (
    Arm,
    Comparison,
    Measured,
    Memory,
    OperatorChange,
    Point,
    operator_changes,
    read_comparison,
    schema,
    write_comparison,
)

__all__ = [
    "COMPARISON_FILES",
    "Arm",
    "Comparison",
    "Measured",
    "Memory",
    "OperatorChange",
    "Point",
    "Rule",
    "Spread",
    "changes",
    "changes_table",
    "compare",
    "operator_changes",
    "other_conditions",
    "read_comparison",
    "schema",
    "steady_allocator",
    "write_comparison",
    "write_report",
    "write_sweep",
    "write_views",
]
