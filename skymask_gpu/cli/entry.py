"""The entry of the command line: its options, its commands, and what happens after an error."""

import os
import sys
import tempfile
import traceback
import warnings
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from typer.core import TyperGroup

import skymask_gpu
from skymask_gpu.cli import aggregate, arena, bench, board, example, export, federation, info, leak, profile, report
from skymask_gpu.cli.console import errors, warn
from skymask_gpu.defence import VerdictWarning

__all__ = ["app", "main"]

_DEBUG = "--debug"


class _DebugAnywhere(TyperGroup):
    """Lets ``--debug`` also follow a command, because that is where one adds it after a failure."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = [argument for argument in args if argument != _DEBUG]
        return super().parse_args(ctx, [_DEBUG, *rest] if len(rest) < len(args) else rest)


app = typer.Typer(
    cls=_DebugAnywhere,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SkyMask, the mask-based defence of federated learning.",
)
for command in (aggregate, info, federation, report, board, arena, leak, bench, profile, export, example):
    command.register(app)


def main() -> None:
    """Run the command line.

    A wrong argument, file or setting raises a ValueError or OSError that names it. It ends the
    command with one line and exit code 2. In case it was our own mistake, the traceback goes to a
    file, or to the screen with ``--debug``. Any other exception is a bug of this package: its
    traceback is shown, and the exit code is 1.
    """
    warnings.showwarning = lambda message, *_: warn(str(message))
    # The commands say the same themselves, with unreadable files counted or once per run.
    warnings.simplefilter("ignore", VerdictWarning)
    try:
        # The same name however it was started: completion is installed for it.
        app(prog_name="skymask-gpu")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        where = f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        _show_traceback(debug=_DEBUG in sys.argv[1:])
        errors.print(f"[red]error{where}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        errors.print("[red]this is a bug of skymask-gpu[/]; please report it with the lines above", soft_wrap=True)
        sys.exit(1)


def _show_traceback(*, debug: bool) -> None:
    """Show the traceback of the exception being handled, on the screen or in a file of its own."""
    if debug:
        traceback.print_exc()
        return
    try:
        with tempfile.NamedTemporaryFile("w", prefix="skymask-gpu-", suffix=".log", delete=False, encoding="utf-8") as log:
            traceback.print_exc(file=log)
    except OSError:
        # There is no room for the file; --debug still shows the traceback.
        return
    errors.print(f"[dim]traceback: {escape(log.name)} (or --debug)[/]", highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"skymask-gpu {skymask_gpu.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """The options of all commands. :func:`main` reads ``--debug``, a callback ``--version``."""
