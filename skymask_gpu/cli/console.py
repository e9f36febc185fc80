"""What all commands share: the consoles they print to, warnings, the advice after Ctrl-C, the error of a missing extra."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["UNCERTAIN", "console", "errors", "extra_named", "resumable", "warn"]

# Exit code of --strict: all was done, but there is something to warn of.
UNCERTAIN = 3

# What is redirected into a file has no edge to wrap at.
_NO_WRAP = 10_000


def _console(*, stderr: bool) -> Console:
    is_screen = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if is_screen or "COLUMNS" in os.environ else _NO_WRAP)


console = _console(stderr=False)
errors = _console(stderr=True)


def warn(message: str) -> None:
    errors.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


@contextmanager
def extra_named(extra: str) -> Iterator[None]:
    """Imports of what an optional extra brings.

    Raises:
        ValueError: a package is missing; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}: pip install 'skymask-gpu[{extra}]'") from error


@contextmanager
def resumable(*arguments: object) -> Iterator[None]:
    """Work that Ctrl-C stops with exit code 130, and that the command of these arguments goes on with."""
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["skymask-gpu", *map(str, arguments)])
        console.print(f"stopped; go on with: {command}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
