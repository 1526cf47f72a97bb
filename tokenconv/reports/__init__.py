"""What every report is made of: tables, charts, pages, and a folder that is written whole."""

from tokenconv.reports.folder import alone_in, report_folder

__all__ = ["alone_in", "report_folder"]
