"""The command ``skymask-gpu board``."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from skymask_gpu.cli.console import answer, as_dicts, console, extra_named, print_table, resumable
from skymask_gpu.cli.federation import played_cells
from skymask_gpu.cli.options import AsJson, Changes, DataDir, Jobs, Overwrite, Resume, check_folders, given, progress_bar
from skymask_gpu.io.files import locked

if TYPE_CHECKING:
    from skymask_gpu.federation.board.config import Board


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(board)


def board(
    config: Annotated[Path, typer.Argument(help="The board's TOML file; examples/board.toml is one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the mask sets and the table; default runs/NAME.")] = None,
    data_dir: DataDir = None,
    changes: Changes = None,
    jobs: Jobs = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    judge_only: Annotated[bool, typer.Option("--judge-only", help="Judge the stored mask sets again, and make none.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build every attack on the same honest updates, judge by every rule, and write one table.

    If the file asks for trajectories, whole runs are played besides.
    """
    with extra_named("run"):
        from skymask_gpu.federation.board.config import read_board
        from skymask_gpu.federation.board.judging import judge_sets, lines
        from skymask_gpu.federation.board.making import MODELS, SETS
        from skymask_gpu.federation.board.page import LEGEND, SUMMARY, TRAJECTORIES, summary, trajectory_summary, write_board
        from skymask_gpu.federation.board.trajectories import ended, trajectory_runs
        from skymask_gpu.federation.sweep import CELLS, check_cells

    asked = read_board(config, changes or []).with_data(data_dir)
    folder = out or Path("runs") / config.stem
    runs = trajectory_runs(asked)
    if judge_only and overwrite:
        raise ValueError("--judge-only and --overwrite exclude each other")
    command = ["board", config, "--out", folder, *given("--data-dir", data_dir), *given("--set", changes), "--jobs", jobs]
    command += [*["--json"] * as_json, "--resume"]
    failed: dict[str, str] = {}
    with answer(as_json=as_json) as found:
        with locked(folder), resumable(*command):
            parts = (SETS, MODELS, CELLS)
            existing = [folder] if any((folder / name).exists() for name in parts) else []
            check_folders(existing, resume=resume or judge_only, overwrite=overwrite)
            if overwrite:
                for name in parts:
                    shutil.rmtree(folder / name, ignore_errors=True)
            check_cells(folder, runs)
            if not judge_only:
                _make(asked, folder, config, data_dir, changes or [], jobs)
                _, failed = played_cells(runs, folder, jobs) if runs else (0, {})
            with console.status("judging ..."):
                judged, played = judge_sets(asked, folder / SETS), ended(asked, folder)
                written = write_board(config.stem, judged, played, folder)
        print_table(config.stem, SUMMARY, summary(judged))
        console.print(LEGEND, style="dim")
        if played:
            print_table("whole runs", TRAJECTORIES, trajectory_summary(played))
        for path in written:
            console.print(str(path), soft_wrap=True, markup=False, highlight=False)
        found |= {
            "title": config.stem,
            "summary": as_dicts(SUMMARY, summary(judged)),
            "lines": [asdict(line) for line in lines(judged)],
            "whole_runs": [asdict(one) for one in played],
            "failed": failed,
            "files": written,
        }
        if failed:
            console.print(f"[red]{len(failed)} of {len(runs)} whole runs failed[/]; --resume tries them again", soft_wrap=True)
            raise typer.Exit(1)


def _make(asked: "Board", folder: Path, config: Path, data_dir: Path | None, changes: list[str], jobs: int) -> None:
    from skymask_gpu.federation.board.making import make_sets, missing_sets
    from skymask_gpu.federation.board.side_by_side import make_sets_side_by_side

    missing, total = missing_sets(asked, folder), len(list(asked.set_keys()))
    if not missing:
        return
    with progress_bar("{task.description}") as progress:
        task = progress.add_task(f"{total} mask sets", total=total, completed=total - len(missing), status="")
        if jobs == 1:
            for _ in make_sets(asked, missing, folder, lambda text: progress.update(task, status=escape(text))):
                progress.advance(task)
            return
        for stored in make_sets_side_by_side(config, data_dir, changes, missing, folder, jobs):
            progress.update(task, advance=len(stored), status=escape(stored[-1].file_name))
