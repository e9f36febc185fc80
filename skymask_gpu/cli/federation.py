"""The commands of simulated federations: ``skymask-gpu run | sweep | data``."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, TaskID

from skymask_gpu.cli.console import answer, console, extra_named, only_first_speaks, resumable
from skymask_gpu.cli.options import (
    AsJson,
    Changes,
    DataDir,
    Jobs,
    Overwrite,
    Resume,
    check_folders,
    given,
    progress_bar,
    with_data,
)
from skymask_gpu.cli.report import report_on, warn_of
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.io.files import locked
from skymask_gpu.io.torchrun import column_mesh


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (run, sweep, data):
        app.command()(command)


def run(
    config: Annotated[Path, typer.Argument(help="The run's TOML file; examples/ has some.")],
    out: Annotated[Path | None, typer.Option(help="Folder for metrics, plots and report; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    changes: Changes = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit code 3 if a run diverged or, in any round, SkyMask had no verdict or rejected most."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate a federated run round by round, and report it with plots and one HTML page.

    Under torchrun each process trains a share of the clients; the first prints and writes.
    """
    with extra_named("run"):
        from skymask_gpu.federation.config import read_config
        from skymask_gpu.federation.ranks import Ranks
        from skymask_gpu.federation.run_folder import clear_results, has_results

    runs = with_data(read_config(config, changes or []), data_dir)
    folder = out or Path("runs") / config.stem
    folders = [folder / r.name if len(runs) > 1 else folder for r in runs]
    command = ["run", config, "--out", folder, *given("--data-dir", data_dir), *given("--set", changes)]
    command += ["--strict"] * strict + ["--json"] * as_json + ["--resume"]
    finished = []

    def check() -> None:
        check_folders([f for f in folders if has_results(f)], resume=resume, overwrite=overwrite)

    def prepare(locks: ExitStack) -> None:
        for path in dict.fromkeys([folder, *folders]):
            locks.enter_context(locked(path))
        # Another run may have written to the folder while this one loaded.
        check()
        if overwrite:
            for existing in folders:
                clear_results(existing)

    with column_mesh() as mesh, only_first_speaks((ranks := Ranks(mesh)).is_first), answer(as_json=as_json) as found:
        ranks.on_first(check)
        # All runs are built before the first round, so that what cannot run is said before anything
        # is overwritten.
        with console.status("loading ..."):
            keys = {(r.data.dataset, r.data.data_dir) for r in runs}
            federations = ranks.together(lambda: _built(runs, {key: _loaded(*key) for key in keys}, ranks))
        with ExitStack() as locks:
            ranks.on_first(partial(prepare, locks))
            with resumable(*command):
                _play(runs, federations, folders)
                if ranks.is_first:
                    finished = report_on(config.stem, [folder], folder, found)
        if ranks.is_first:
            warn_of(finished, strict=strict)


def _loaded(name: str, where: str) -> Any:
    from skymask_gpu.federation.datasets import load_dataset

    return load_dataset(name, Path(where) if where else None)


def _built(runs: list[Any], datasets: dict[tuple[str, str], Any], ranks: Any) -> list[Any]:
    from skymask_gpu.federation.simulation import Federation

    return [Federation.build(r, datasets[r.data.dataset, r.data.data_dir], ranks) for r in runs]


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


def sweep(
    config: Annotated[Path, typer.Argument(help="A run's TOML file with a \\[grid] table of lists; examples/ has some.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the cells and the report; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    changes: Changes = None,
    jobs: Jobs = 1,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Play only each N-th cell, from the I-th on; all shards share the folder."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Play every combination of a grid of attacks, rules, shares, seeds ..., and report tables."""
    with extra_named("run"):
        from skymask_gpu.federation.config import read_grid
        from skymask_gpu.federation.sweep import check_inputs, clear_cells, shard_of, write_plan

    every = with_data(read_grid(config, changes or []), data_dir)
    cells = every if shard is None else shard_of(every, shard)
    folder = out or Path("runs") / config.stem
    check = partial(check_own_cells, folder, cells, whole=shard is None, resume=resume, overwrite=overwrite)
    check()
    command = ["sweep", config, "--out", folder, *given("--data-dir", data_dir), *given("--set", changes), "--jobs", jobs]
    command += [*given("--shard", shard), *["--json"] * as_json, "--resume"]
    with answer(as_json=as_json) as found:
        # What is missing is said once for all cells, before anything is overwritten.
        with console.status("loading ..."):
            check_inputs(cells)
        with locked(folder, shared=shard is not None), resumable(*command):
            # Another sweep may have written to the folder while this one loaded.
            check()
            if overwrite:
                clear_cells(folder, cells)
            write_plan(folder, every)
            done, failed = played_cells(cells, folder, jobs)
            found["runs"] = []
            finished = report_on(config.stem, [folder], folder, found) if done else []
        if done:
            warn_of([run for run in finished if run.diverged], strict=False)
        if failed:
            found["failed"] = failed
            console.print(f"[red]{len(failed)} of {len(cells)} cells failed[/]; --resume tries them again", soft_wrap=True)
            raise typer.Exit(1)


def check_own_cells(folder: Path, cells: list[Any], *, whole: bool, resume: bool, overwrite: bool) -> None:
    """Refuse to touch cells that are there, unless the user says what to do with them.

    Args:
        folder: the folder of the sweep.
        cells: the cells that this process is to play.
        whole: whether these are all cells of the sweep, not those of a shard.
        resume: whether to go on with what is there.
        overwrite: whether to start anew.
    """
    from skymask_gpu.federation.sweep import check_cells, has_cells

    begun = has_cells(folder, None if whole else cells)
    check_folders([folder] if begun else [], resume=resume, overwrite=overwrite)
    if not overwrite:
        check_cells(folder, cells)


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


def data(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(k for k, spec in DATASETS.items() if spec.source)}.")],
    folder: Annotated[Path, typer.Argument(help="Where to put the standard files.")],
) -> None:
    """Download a data set's standard files and check them (needs the extra 'data')."""
    with extra_named("data"):
        from skymask_gpu.federation.datasets.download import download

    with console.status(f"downloading {name} ..."):
        download(name, folder)
    console.print(f"{name}: {folder}")


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
