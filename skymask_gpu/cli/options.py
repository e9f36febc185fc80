"""Options that several commands have, and what they do with them."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from skymask_gpu.cli.console import console

__all__ = [
    "AsJson",
    "Changes",
    "DataDir",
    "Jobs",
    "Overwrite",
    "Resume",
    "check_folders",
    "given",
    "progress_bar",
    "with_data",
]

DataDir = Annotated[Path | None, typer.Option(help="Folder with the data set's standard files.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a stopped run left off.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where there are results already.")]
Jobs = Annotated[int, typer.Option(min=1, help="Cells that are played at the same time; the cores are shared out.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting in place of the file's, as attack.share=0.2; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and all else on stderr.")]


def given(option: str, value: object) -> list[object]:
    """The option as it is written on a command line, once per value; empty if there is none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [part for one in values for part in (option, one)]


def with_data(runs: list[Any], data_dir: Path | None) -> list[Any]:
    """The runs with the data set's files in another folder; the same runs if none is given."""
    if data_dir is None:
        return runs
    return [replace(r, data=replace(r.data, data_dir=str(data_dir))) for r in runs]


def check_folders(existing: list[Path], *, resume: bool, overwrite: bool) -> None:
    """Refuse to touch results that are there, unless the user says what to do with them."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if existing and not resume and not overwrite:
        raise ValueError(f"--out: {existing[0]} holds results already; go on with --resume or start anew with --overwrite")


def progress_bar(description: str, *, transient: bool = False) -> Progress:
    """A progress bar whose tasks have a field ``status``.

    Args:
        description: what stands before the bar, as rich's ``TextColumn`` takes it.
        transient: whether the bar disappears at the end. It is then for terminals only; in a file,
            a bar that stays leaves its last state.
    """
    return Progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=transient,
    )
