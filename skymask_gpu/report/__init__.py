"""The report on one run or a sweep: tables, pictures and one self-contained HTML page.

| file | what |
| --- | --- |
| ``page.py``, ``page.html.j2`` | ``write_report``: all files of a report, and the HTML page |
| ``html.py``, ``base.html.j2`` | what all HTML pages share; ``leak.html.j2`` is that of a privacy audit |
| ``summary.py`` | ``FinishedRun``: a run as it lies on disk, and its row in every table |
| ``sweep.py`` | runs sorted into blocks, rows and columns |
| ``tables.py`` | the tables as Markdown, LaTeX and CSV |
| ``panels.py``, ``plots.py`` | what the pictures show, and how it is drawn |
| ``plots_by_round.py`` | pictures of verdicts, rejected clients and masks by round |
| ``history.py`` | what happened to each client from round to round |
| ``interactive.py``, ``interactive.html.j2`` | the page's curves and maps, with their data |
| ``sorting.html.j2``, ``arena.html.j2`` | tables that sort and filter; the arena's page |

The names below are imported when they are first asked for: whoever only reads runs needs neither
matplotlib nor jinja2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skymask_gpu.report.page import Report, write_report
    from skymask_gpu.report.summary import (
        COLUMNS,
        NOTE,
        FinishedRun,
        concerns,
        failed_cells,
        load_folders,
        load_run,
        load_runs,
        missing_cells,
    )

__all__ = [
    "COLUMNS",
    "NOTE",
    "FinishedRun",
    "Report",
    "concerns",
    "failed_cells",
    "load_folders",
    "load_run",
    "load_runs",
    "missing_cells",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "page" if name in ("Report", "write_report") else "summary"
        return getattr(import_module(f"skymask_gpu.report.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
