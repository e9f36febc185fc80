"""The command ``skymask-gpu profile``: where a round's time, memory traffic and memory go."""

import json
from dataclasses import replace
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
    from skymask_gpu.engine.profiling import Profile
    from skymask_gpu.profile import RoundProfile


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(profile)


def profile(
    config: Annotated[Path, typer.Argument(help="A run's TOML file; its first run with rule skymask is taken.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default profile-out/TIME.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data set's standard files.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where time and memory go in a run's first round: table, plot and Chrome trace."""
    with extra_named("run"):
        from skymask_gpu.federation.config import read_config
        from skymask_gpu.federation.simulation import Federation
        from skymask_gpu.profile import NOTE, FirstRound, choose_run, profile_rounds, write_profiles, write_trace

    run = choose_run(read_config(config))
    if data_dir is not None:
        run = replace(run, data=replace(run.data, data_dir=str(data_dir)))
    folder = out or Path("profile-out") / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    if (folder / "profile.json").exists():
        raise ValueError(f"--out: {folder} holds results already; name another folder")
    with answer(as_json=as_json) as found:
        with Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
        ) as progress:
            task = progress.add_task("loading", total=3)

            def show(what: str) -> None:
                progress.update(task, description=what)

            played = FirstRound.play(Federation.build(run), show)
            progress.advance(task)
            profiles = profile_rounds(played, show)
            progress.advance(task)
            show("tracing")
            write_trace(played, folder / "trace.json")
            write_profiles(played, profiles, run, folder)
            progress.update(task, completed=3, description="done")
        largest = profiles[-1]
        console.print(_table(largest, played.training_seconds, f"{run.name}: the server's first round"))
        measured = largest.profile
        console.print(
            f"the phases account for {measured.accounted:.1%} of {1000 * measured.seconds:,.1f} ms; solver {largest.solver}, "
            f"P = {played.updates.shape[1]:,}; a plain copy moves {measured.copy_bandwidth / 1e9:,.1f} GB/s",
            soft_wrap=True,
        )
        console.print(NOTE, style="dim", soft_wrap=True)
        for name in ("profile.json", "profile.csv", "profile.png", "trace.json"):
            console.print(f"{name + ':':20}{folder / name}", soft_wrap=True)
        found |= json.loads((folder / "profile.json").read_text(encoding="utf-8"))


def _table(largest: "RoundProfile", training_seconds: float, title: str) -> Table:
    table = Table(title=f"{escape(title)}, N = {largest.num_clients:,}")
    table.add_column("phase")
    for column in ("ms", "of the round", "calls", "MB moved, at least", "of the copy bandwidth", "peak MiB"):
        table.add_column(column, justify="right")
    for row in _rows(largest.profile):
        table.add_row(*row)
    table.add_section()
    training = "all clients' local training (not the server's)"
    table.add_row(training, f"{1000 * training_seconds:,.1f}", f"{training_seconds / largest.profile.seconds:.0%}", *[""] * 4)
    return table


def _rows(measured: "Profile") -> list[list[str]]:
    rows = []
    for name, cost in measured.phases.items():
        rows.append(
            [
                name,
                f"{1000 * cost.seconds:,.2f}",
                f"{cost.seconds / measured.seconds:.1%}",
                f"{cost.calls:,}",
                f"{cost.num_bytes / 1e6:,.2f}" if cost.num_bytes else "-",
                "-" if cost.copy_share is None else f"{cost.copy_share:.1%}",
                "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.1f}",
            ]
        )
    return rows
