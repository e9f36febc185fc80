"""The command ``skymask-gpu bench``."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from skymask_gpu.bench.run import Row

console = Console()


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

    try:
        from skymask_gpu.bench.plots import plot_memory, plot_split, plot_time
        from skymask_gpu.bench.run import FULL, QUICK, count_rows, measure_cases, write_rows
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}: pip install 'skymask-gpu[run]'") from error
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
    console.print(
        f"{timed} of {len(rows)} rows have a time, {len(bad)} are wrong or failed: {folder}/summary.md", soft_wrap=True
    )
    if stopped:
        console.print("stopped; what was measured is there")
        raise typer.Exit(130)
    if bad:
        raise typer.Exit(1)


def _what(row: "Row") -> str:
    return escape(f"{row.status}: {row.case}, N = {row.clients:,}, {row.dtype}, {row.provider}: {row.detail}")
