"""The command ``skymask-gpu bench``."""

from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from skymask_gpu.cli.console import answer, console, extra_named
from skymask_gpu.cli.options import AsJson

if TYPE_CHECKING:
    from skymask_gpu.bench.points import Limits
    from skymask_gpu.bench.table import Row


# The final table shows as many rows as fit on a screen; all are in summary.md.
_TABLE_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(bench)


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="50 clients, by default of the CNN only: within a minute.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Compare --quick's calls with those of another revision of this git checkout."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default bench-out/TIME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the solvers and the aggregation rules beside their baselines.

    A result that is wrong gets no time.
    """
    from skymask_gpu.bench.cases import CASES
    from skymask_gpu.bench.points import FULL, QUICK
    from skymask_gpu.bench.summary import write_summary

    limits = QUICK if quick or against else FULL
    unknown = [name for name in case or [] if name not in CASES]
    if unknown:
        raise ValueError(f"--case must be one of {', '.join(CASES)}, got {unknown[0]!r}")
    if case:
        limits = replace(limits, cases=tuple(dict.fromkeys(case)))
    folder = out or Path("bench-out") / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    if (folder / "bench.csv").exists():
        raise ValueError(f"--out: {folder} holds results already; name another folder")

    with answer(as_json=as_json) as found:
        rows, stopped = _measured(limits, against, folder)
        write_summary(rows, folder / "summary.md")
        if not against:
            _draw(rows, folder)
        bad = [row for row in rows if row.status in ("wrong", "failed")]
        timed = sum(row.status == "ok" for row in rows)
        console.print(_table(rows))
        console.print(
            f"{timed} of {len(rows)} rows have a time, {len(bad)} are wrong or failed: {folder}/summary.md", soft_wrap=True
        )
        found |= {"rows": [asdict(row) for row in rows], "folder": folder}
        if stopped:
            console.print("stopped; what was measured is there")
            raise typer.Exit(130)
        if bad:
            raise typer.Exit(1)


def _measured(limits: "Limits", against: str | None, folder: Path) -> "tuple[list[Row], bool]":
    """The measured rows, and whether somebody pressed Ctrl-C.

    Each row is written to the folder as soon as it is measured.
    """
    import torch

    with extra_named("run"):
        from skymask_gpu.bench import against as revisions
        from skymask_gpu.bench import run
    from skymask_gpu.bench.measure import freed_memory_kept
    from skymask_gpu.bench.table import write_rows

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with freed_memory_kept(), Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=run.count_rows(limits))
            started = lambda what: progress.update(task, description=what)  # noqa: E731
            measured = (
                revisions.measure_against(against, limits, started) if against else run.measure_cases(limits, device, started)
            )
            for row in measured:
                rows.append(row)
                write_rows(folder / "bench.csv", rows)
                progress.advance(task)
                if row.status in ("wrong", "failed"):
                    progress.console.print(f"[red]{_what(row)}[/]", soft_wrap=True)
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _draw(rows: "list[Row]", folder: Path) -> None:
    with extra_named("run"):
        from skymask_gpu.bench.plots import plot_memory, plot_time
    for plot, name in ((plot_time, "time.png"), (plot_memory, "memory.png")):
        plot(rows, folder / name)


def _table(rows: "list[Row]") -> Table:
    """The printed table: the rows that have a time. The file summary.md has all rows."""
    from skymask_gpu.bench.summary import cells, shown_ratios

    ratios = shown_ratios(rows)
    table = Table("case", "N", "what", title="times; x: ratios to what was measured in this run")
    for column in ("time", *(f"x {name.removeprefix('to_')}" for name in ratios), "peak MiB"):
        table.add_column(column, justify="right")
    timed = [row for row in rows if row.status == "ok" and row.median_s is not None]
    for row in timed[:_TABLE_ROWS]:
        table.add_row(f"{row.case}, {row.dtype}", f"{row.clients:,}", escape(row.provider), *cells(row, ratios))
    if len(timed) > _TABLE_ROWS:
        table.add_row("...", "", f"{len(timed) - _TABLE_ROWS} more in summary.md")
    return table


def _what(row: "Row") -> str:
    return escape(f"{row.status}: {row.case}, N = {row.clients:,}, {row.dtype}, {row.provider}: {row.detail}")
