"""The report on one run or a sweep: tables, pictures and one self-contained HTML page.

| file | what |
| --- | --- |
| ``page.py``, ``page.html.j2`` | ``write_report``: all files of a report, and the HTML page |
| ``html.py``, ``base.html.j2`` | what all HTML pages share; ``leak.html.j2`` is that of a privacy audit |
| ``summary.py`` | ``FinishedRun``: a run as it lies on disk, and its row in every table |
| ``sweep.py`` | runs sorted into blocks, rows and columns |
| ``tables.py`` | the tables as Markdown, LaTeX and CSV |
| ``panels.py``, ``plots.py`` | what the pictures show, and how it is drawn |
"""

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
