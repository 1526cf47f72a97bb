"""The charts of a report, each a picture that stands alone."""

from tokenconv.profiling.report.charts.of_comparison import comparison_charts
from tokenconv.profiling.report.charts.of_sweep import sweep_charts

__all__ = ["comparison_charts", "sweep_charts"]
