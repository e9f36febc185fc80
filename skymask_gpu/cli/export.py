"""The command ``skymask-gpu export``: hand finished rounds to a tracker, such as TensorBoard."""

from pathlib import Path
from typing import Annotated

import typer

from skymask_gpu.cli.console import console
from skymask_gpu.io.files import locked

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(export)


def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, of runs or of a sweep.")],
    to: Annotated[str, typer.Option(help="The tracker: tensorboard, wandb or mlflow.")],
) -> None:
    """Hand the recorded rounds of a folder's runs to a tracker, also if none followed them."""
    from skymask_gpu.federation.tracking import export as export_run
    from skymask_gpu.federation.tracking import tracking_for
    from skymask_gpu.report import load_runs

    tracking_for(to, {})
    for run in load_runs(folder):
        seconds = {line["round"]: line for line in run.times}
        rounds = [(record, seconds.get(record["round"], {})) for record in run.records]
        with locked(run.folder):
            export_run(tracking_for(to, run.config), run.config, run.folder, rounds)
        console.print(f"{run.folder}: {len(rounds)} rounds to {to}", soft_wrap=True, markup=False, highlight=False)
