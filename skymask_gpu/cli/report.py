"""The command ``skymask-gpu report``, and the report that ``run`` and ``sweep`` end with."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from skymask_gpu.cli.console import UNCERTAIN, answer, console, extra_named, warn
from skymask_gpu.cli.options import AsJson

if TYPE_CHECKING:
    from skymask_gpu.report import FinishedRun

__all__ = ["register", "report_on", "warn_of"]

# The number of rows of the printed table that fit on a screen. All rows are in tables.md.
_TABLE_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(report)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folder of a run, of runs or of a sweep; several are compared.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; default: the folder itself, or runs/A-and-B for several.")
    ] = None,
    picture_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="svg or pdf: write the pictures in this format, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tables (Markdown, CSV, LaTeX), plots and one HTML page of what folders hold so far."""
    with answer(as_json=as_json) as found:
        names = [folder.resolve().name for folder in folders]
        default = folders[0] if len(folders) == 1 else Path("runs") / "-and-".join(names)
        report_on(" and ".join(names), folders, out or default, found, picture_format=picture_format)


def report_on(
    title: str, folders: Sequence[Path], out: Path, found: dict[str, Any], *, picture_format: str | None = None
) -> "list[FinishedRun]":
    """Write the report, print its table, and return the runs that it shows.

    Args:
        title: the heading.
        folders: where the runs are; several folders are compared.
        out: where the report goes.
        found: gets what the report says, for programs.
        picture_format: a format for the pictures besides PNG.
    """
    with extra_named("run"):
        from skymask_gpu.report import COLUMNS, NOTE, concerns, failed_cells, load_folders, missing_cells, write_report

    runs = load_folders(folders)
    with console.status("drawing ..."):
        written = write_report(title, runs, out, sources=folders, picture_format=picture_format)
    table = Table(*COLUMNS, title=escape(f"{title}: after {max(len(run.records) for run in runs)} rounds"))
    for finished in runs[:_TABLE_ROWS]:
        table.add_row(*(escape(cell) for cell in finished.row()))
    console.print(table)
    if len(runs) > _TABLE_ROWS:
        console.print(f"... and {len(runs) - _TABLE_ROWS} more")
    console.print(NOTE, style="dim")
    missing = [name for folder in folders for name in missing_cells(folder)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        console.print(f"{len(missing)} cells are not there yet: {escape(shown)}", soft_wrap=True, highlight=False)
    for name, path in written.paths().items():
        console.print(f"{name + ':':20}{path}", soft_wrap=True)
    found |= {
        "title": title,
        "runs": [run.results() for run in runs],
        "failed": {name: why for folder in folders for name, why in failed_cells(folder)},
        "missing": missing,
        "warnings": [f"{run.name}: {sentence}" for run in runs for sentence in concerns(run)],
        "files": written.paths(),
    }
    return runs


def warn_of(finished: "list[FinishedRun]", *, strict: bool) -> None:
    """Print the warnings that the numbers need; with ``strict``, the exit code warns, too."""
    from skymask_gpu.report import concerns

    sentences = [f"{run.name}: {sentence}" for run in finished for sentence in concerns(run)]
    for sentence in sentences[:_TABLE_ROWS]:
        warn(sentence)
    if len(sentences) > _TABLE_ROWS:
        warn(f"... and {len(sentences) - _TABLE_ROWS} more of this kind")
    if strict and sentences:
        raise typer.Exit(UNCERTAIN)
