"""The commands of simulated federations: ``skymask-gpu run | sweep | report | data``."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from skymask_gpu.cli.console import UNCERTAIN, console, extra_named, resumable, warn
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.io.files import locked

if TYPE_CHECKING:
    from skymask_gpu.report import FinishedRun

DataDir = Annotated[Path | None, typer.Option(help="Folder with the data set's standard files.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a stopped run left off.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where there are results already.")]

Jobs = Annotated[int, typer.Option(min=1, help="Cells that are played at the same time; the cores are shared out.")]

# The number of rows of the final table that fit on a screen. All rows are in tables.md.
_TABLE_ROWS = 40


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (run, sweep, report, data):
        app.command()(command)


def run(
    config: Annotated[Path, typer.Argument(help="The run's TOML file; examples/ has some.")],
    out: Annotated[Path | None, typer.Option(help="Folder for metrics, plots and report; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit code 3 if a run diverged or, in any round, SkyMask had no verdict or rejected most."
        ),
    ] = False,
) -> None:
    """Simulate a federated run round by round, and report it with plots and one HTML page."""
    with extra_named("run"):
        from skymask_gpu.federation.config import read_config
        from skymask_gpu.federation.datasets import load_dataset
        from skymask_gpu.federation.run_folder import clear_results, has_results
        from skymask_gpu.federation.simulation import Federation

    runs = _with_data(read_config(config), data_dir)
    folder = out or Path("runs") / config.stem
    folders = [folder / r.name if len(runs) > 1 else folder for r in runs]
    check_folders([f for f in folders if has_results(f)], resume=resume, overwrite=overwrite)
    # all of them before the first round, and before anything is overwritten: what cannot run is
    # said now
    with console.status("loading ..."):
        keys = {(r.data.dataset, r.data.data_dir) for r in runs}
        datasets = {(name, where): load_dataset(name, Path(where) if where else None) for name, where in keys}
        federations = [Federation.build(r, datasets[r.data.dataset, r.data.data_dir]) for r in runs]
    with ExitStack() as locks:
        for path in dict.fromkeys([folder, *folders]):
            locks.enter_context(locked(path))
        # another run may have come and gone while this one loaded
        check_folders([f for f in folders if has_results(f)], resume=resume, overwrite=overwrite)
        if overwrite:
            for existing in folders:
                clear_results(existing)
        with resumable("run", config, "--out", folder, *given("--data-dir", data_dir), *["--strict"] * strict, "--resume"):
            _play(runs, federations, folders)
            finished = _report(config.stem, folder)
    _warn_of(finished, strict=strict)


def _play(runs: list[Any], federations: list[Any], folders: list[Path]) -> None:
    from skymask_gpu.federation.playing import play

    with progress_bar("{task.description:<20}") as progress:
        for settings, federation, run_folder in zip(runs, federations, folders, strict=True):
            task = progress.add_task(escape(settings.name), total=settings.rounds, status="")
            for record in play(federation, run_folder, partial(_show_status, progress, task)):
                progress.update(task, completed=record["round"] + 1)
                line = escape(f"{settings.name}, round {record['round'] + 1}: {_status(record)}")
                progress.console.print(f"[dim]{line}[/]", soft_wrap=True)
            progress.update(task, completed=settings.rounds, status="done")


def _warn_of(finished: "list[FinishedRun]", *, strict: bool) -> None:
    """Print the warnings that the numbers need; with ``strict``, the exit code warns, too."""
    from skymask_gpu.report import concerns

    sentences = [f"{run.name}: {sentence}" for run in finished for sentence in concerns(run)]
    for sentence in sentences[:_TABLE_ROWS]:
        warn(sentence)
    if len(sentences) > _TABLE_ROWS:
        warn(f"... and {len(sentences) - _TABLE_ROWS} more of this kind")
    if strict and sentences:
        raise typer.Exit(UNCERTAIN)


def sweep(
    config: Annotated[Path, typer.Argument(help="A run's TOML file with a [grid] table of lists; examples/ has some.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the cells and the report; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    jobs: Jobs = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Play every combination of a grid of attacks, rules, shares, seeds ..., and report tables."""
    with extra_named("run"):
        from skymask_gpu.federation.config import read_grid
        from skymask_gpu.federation.sweep import check_cells, check_inputs, clear_cells, has_cells

    cells = _with_data(read_grid(config), data_dir)
    folder = out or Path("runs") / config.stem
    check_folders([folder] if has_cells(folder) else [], resume=resume, overwrite=overwrite)
    if not overwrite:
        check_cells(folder, cells)
    # for all cells together: what is missing is said once, before anything is overwritten
    with console.status("loading ..."):
        check_inputs(cells)
    command = ["sweep", config, "--out", folder, *given("--data-dir", data_dir), "--jobs", jobs, "--resume"]
    with locked(folder), resumable(*command):
        # another sweep may have come and gone while this one loaded
        check_folders([folder] if has_cells(folder) else [], resume=resume, overwrite=overwrite)
        if overwrite:
            clear_cells(folder, cells)
        done, failed = played_cells(cells, folder, jobs)
        finished = _report(config.stem, folder) if done else []
    if done:
        _warn_of([run for run in finished if run.diverged], strict=False)
    if failed:
        console.print(f"[red]{len(failed)} of {len(cells)} cells failed[/]; --resume tries them again", soft_wrap=True)
        raise typer.Exit(1)


def played_cells(cells: list[Any], folder: Path, jobs: int) -> tuple[int, dict[str, str]]:
    """Play the cells; return how many are done, and the error of each that failed, by name."""
    from skymask_gpu.federation.sweep import play_cells

    failed, done = {}, 0
    with progress_bar("{task.description}") as progress:
        total = progress.add_task(f"{len(cells)} cells, rounds", total=sum(c.rounds for c in cells), status="")
        rounds = dict.fromkeys((c.name for c in cells), 0)
        for cell in play_cells(cells, folder, jobs):
            name = cell.config.name
            rounds[name] = cell.rounds if cell.state == "running" else cell.config.rounds
            if cell.state == "failed":
                failed[name] = cell.error
                progress.console.print(f"[red]failed:[/] {escape(name)}: {escape(cell.error)}", soft_wrap=True)
            done += cell.state == "done"
            status = f"{done} done, {len(failed)} failed, last {escape(name)}"
            progress.update(total, completed=sum(rounds.values()), status=status)
    return done, failed


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, of runs or of a sweep.")],
) -> None:
    """Tables (Markdown, CSV, LaTeX), plots and one HTML page of what a folder holds so far."""
    _report(folder.resolve().name, folder)


def data(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(k for k, spec in DATASETS.items() if spec.source)}.")],
    folder: Annotated[Path, typer.Argument(help="Where to put the standard files.")],
) -> None:
    """Download a data set's standard files and check them (needs the extra 'data')."""
    from skymask_gpu.federation.datasets.download import download

    with console.status(f"downloading {name} ..."):
        download(name, folder)
    console.print(f"{name}: {folder}")


def given(option: str, value: object) -> list[object]:
    """The option as it is written on a command line; empty if there is no value."""
    return [] if value is None else [option, value]


def _with_data(runs: list[Any], data_dir: Path | None) -> list[Any]:
    if data_dir is None:
        return runs
    return [replace(r, data=replace(r.data, data_dir=str(data_dir))) for r in runs]


def check_folders(existing: list[Path], *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if existing and not resume and not overwrite:
        raise ValueError(f"--out: {existing[0]} holds results already; go on with --resume or start anew with --overwrite")


def progress_bar(description: str) -> Progress:
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def _report(title: str, folder: Path) -> "list[FinishedRun]":
    """Write the report, print its table, and return the runs that it shows."""
    with extra_named("run"):
        from skymask_gpu.report import COLUMNS, NOTE, load_runs, write_report

    runs = load_runs(folder)
    with console.status("drawing ..."):
        written = write_report(title, runs, folder)
    table = Table(*COLUMNS, title=f"{title}: after {max(len(run.records) for run in runs)} rounds")
    for finished in runs[:_TABLE_ROWS]:
        table.add_row(*(escape(cell) for cell in finished.row()))
    console.print(table)
    if len(runs) > _TABLE_ROWS:
        console.print(f"... and {len(runs) - _TABLE_ROWS} more")
    console.print(NOTE, style="dim")
    for name, path in written.paths().items():
        console.print(f"{name + ':':20}{path}", soft_wrap=True)
    return runs


def _show_status(progress: Progress, task: TaskID, text: str) -> None:
    progress.update(task, status=text)


def _status(record: dict[str, Any]) -> str:
    parts = []
    if record["accuracy"] is not None:
        parts.append(f"accuracy {record['accuracy']:.1%}")
    for name, key in (
        ("honest rejected", "false_positive_rate"),
        ("attackers kept", "false_negative_rate"),
        ("attack success", "attack_success_rate"),
    ):
        if record[key] is not None:
            parts.append(f"{name} {record[key]:.0%}")
    if record["diverged"]:
        parts.append("diverged: NaN or Inf in the global model, the run ends here")
    return ", ".join(parts)
