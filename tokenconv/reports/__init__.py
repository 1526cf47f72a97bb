"""What every report is made of: tables, charts, pages, and a folder that is written whole."""

from tokenconv.reports.folder import report_folder

__all__ = ["report_folder"]
