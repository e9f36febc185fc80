"""The command ``skymask-gpu board``."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from skymask_gpu.cli.console import console, extra_named, resumable
from skymask_gpu.cli.federation import DataDir, Overwrite, Resume, check_folders, given, progress_bar
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
    resume: Resume = False,
    overwrite: Overwrite = False,
    judge_only: Annotated[bool, typer.Option("--judge-only", help="Judge the stored mask sets again, and make none.")] = False,
) -> None:
    """Build every attack on the same honest updates, judge by every rule, and write one table."""
    with extra_named("run"):
        from skymask_gpu.federation.board.config import read_board
        from skymask_gpu.federation.board.judging import judge_sets
        from skymask_gpu.federation.board.making import MODELS, SETS
        from skymask_gpu.federation.board.page import LEGEND, summary, write_board

    asked = read_board(config).with_data(data_dir)
    folder = out or Path("runs") / config.stem
    if judge_only and overwrite:
        raise ValueError("--judge-only and --overwrite exclude each other")
    with locked(folder), resumable("board", config, "--out", folder, *given("--data-dir", data_dir), "--resume"):
        existing = [folder] if (folder / SETS).exists() or (folder / MODELS).exists() else []
        check_folders(existing, resume=resume or judge_only, overwrite=overwrite)
        if overwrite:
            for name in (SETS, MODELS):
                shutil.rmtree(folder / name, ignore_errors=True)
        if not judge_only:
            _make(asked, folder)
        with console.status("judging ..."):
            judged = judge_sets(asked, folder / SETS)
            written = write_board(config.stem, judged, folder)
    table = Table("rule", "attacked sets", "within 5%", "wrong side", "worse than FedAvg", "FPR", title=escape(config.stem))
    for row in summary(judged):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(LEGEND, style="dim")
    for path in written:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def _make(asked: "Board", folder: Path) -> None:
    from skymask_gpu.federation.board.making import make_sets, missing_sets

    missing, total = missing_sets(asked, folder), len(list(asked.set_keys()))
    if not missing:
        return
    with progress_bar("{task.description}") as progress:
        task = progress.add_task(f"{total} mask sets", total=total, completed=total - len(missing), status="")
        for _ in make_sets(asked, missing, folder, lambda text: progress.update(task, status=escape(text))):
            progress.advance(task)
