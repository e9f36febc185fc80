"""The command ``skymask-gpu example``: makes the files of one round to try ``aggregate`` on."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from skymask_gpu.cli.console import console, extra_named

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(example)


def example(
    folder: Annotated[Path, typer.Argument(help="Where to put the files; it must be empty or not there.")],
) -> None:
    """Make files to try `aggregate` on: a round of 20 clients on digits, 4 of them attackers."""
    with extra_named("run"):
        from skymask_gpu.federation.example import MALICIOUS, NUM_CLIENTS, write_example

    with console.status("training 20 clients ..."):
        written = write_example(folder)
    for path, what in written.items():
        console.print(f"{path!s:40} {what}", soft_wrap=True, markup=False, highlight=False)
    names = ", ".join(f"client{client:02}" for client in MALICIOUS)
    console.print(
        f"\n{len(MALICIOUS)} of the {NUM_CLIENTS} clients are attackers, who send minus five times what they learnt: {names}.\n"
        "Find them with:\n",
        highlight=False,
    )
    options = {
        "--global": folder / "global.safetensors",
        "--updates": folder / "updates",
        "--model": f"{folder / 'my_model.py'}:Net",
        "--root": folder / "root.npz",
        "--out": folder / "new.safetensors",
        "--json": folder / "verdict.json",
    }
    command = shlex.join(["skymask-gpu", "aggregate", *(str(part) for option in options.items() for part in option)])
    console.print(command, soft_wrap=True, markup=False, highlight=False)
