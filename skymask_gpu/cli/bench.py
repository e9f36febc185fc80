"""The command ``skymask-gpu bench``."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from skymask_gpu.cli.console import console, extra_named

if TYPE_CHECKING:
    from skymask_gpu.bench.run import Row


# Rows of the final table that still fit on a screen; all are in summary.md.
_TABLE_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(bench)


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="50 clients, by default of the CNN only: within a minute.")] = False,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default bench-out/TIME.")] = None,
) -> None:
    """Time the solvers and the aggregation rules beside their floors; a result that is wrong gets no time."""
    import torch

    with extra_named("run"):
        from skymask_gpu.bench.plots import plot_memory, plot_split, plot_time
        from skymask_gpu.bench.run import FULL, QUICK, count_rows, measure_cases, write_rows
    from skymask_gpu.bench.cases import CASES
    from skymask_gpu.bench.measure import freed_memory_kept
    from skymask_gpu.bench.summary import write_summary

    limits = QUICK if quick else FULL
    unknown = [name for name in case or [] if name not in CASES]
    if unknown:
        raise ValueError(f"--case must be one of {', '.join(CASES)}, got {unknown[0]!r}")
    if case:
        limits = replace(limits, cases=tuple(dict.fromkeys(case)))
    folder = out or Path("bench-out") / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    if (folder / "bench.csv").exists():
        raise ValueError(f"--out: {folder} holds results already; name another folder")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    stopped = False
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with freed_memory_kept(), Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=count_rows(limits))
            for row in measure_cases(limits, device, lambda what: progress.update(task, description=what)):
                rows.append(row)
                write_rows(folder / "bench.csv", rows)
                progress.advance(task)
                if row.status in ("wrong", "failed"):
                    progress.console.print(f"[red]{_what(row)}[/]", soft_wrap=True)
    except KeyboardInterrupt:
        stopped = True
    write_summary(rows, folder / "summary.md")
    for plot, name in ((plot_time, "time.png"), (plot_memory, "memory.png"), (plot_split, "split.png")):
        plot(rows, folder / name)
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    timed = sum(row.status == "ok" for row in rows)
    console.print(_table(rows))
    console.print(
        f"{timed} of {len(rows)} rows have a time, {len(bad)} are wrong or failed: {folder}/summary.md", soft_wrap=True
    )
    if stopped:
        console.print("stopped; what was measured is there")
        raise typer.Exit(130)
    if bad:
        raise typer.Exit(1)


def _table(rows: "list[Row]") -> Table:
    """What has a time; the summary says more."""
    from skymask_gpu.bench.summary import ratio_text, seconds

    table = Table("case", "N", "what", title="times; x: ratios to what was measured in this run")
    for column in ("time", "x reference", "x passes", "x mean", "peak MiB"):
        table.add_column(column, justify="right")
    timed = [row for row in rows if row.status == "ok" and row.median_s is not None]
    for row in timed[:_TABLE_ROWS]:
        ratios = [ratio_text(row.ratio(name)) for name in ("to_reference", "to_passes", "to_mean")]
        memory = "unknown" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        case = f"{row.case}, {row.dtype}"
        table.add_row(case, f"{row.clients:,}", escape(row.provider), seconds(row.median_s or 0.0), *ratios, memory)
    if len(timed) > _TABLE_ROWS:
        table.add_row("...", "", f"{len(timed) - _TABLE_ROWS} more in summary.md")
    return table


def _what(row: "Row") -> str:
    return escape(f"{row.status}: {row.case}, N = {row.clients:,}, {row.dtype}, {row.provider}: {row.detail}")
