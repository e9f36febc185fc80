"""What people look at after one run or a sweep: tables, plots and one self-contained HTML page."""

from skymask_gpu.report.page import Report, write_report
from skymask_gpu.report.summary import COLUMNS, NOTE, FinishedRun, concerns, failed_cells, load_run, load_runs

__all__ = [
    "COLUMNS",
    "NOTE",
    "FinishedRun",
    "Report",
    "concerns",
    "failed_cells",
    "load_run",
    "load_runs",
    "write_report",
]
