"""What all commands share: consoles, warnings, advice after Ctrl-C, errors for missing extras."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["UNCERTAIN", "console", "errors", "extra_named", "print_table", "resumable", "warn"]

# The exit code of --strict if everything was done and written, but there is something to warn of.
UNCERTAIN = 3

# Output that is redirected into a file has no screen's edge to wrap at, so its lines may be this
# long.
_NO_WRAP = 10_000


def _console(*, stderr: bool) -> Console:
    is_screen = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if is_screen or "COLUMNS" in os.environ else _NO_WRAP)


console = _console(stderr=False)
errors = _console(stderr=True)


def warn(message: str) -> None:
    """Print a warning in one line on stderr."""
    errors.print(f"[yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


@contextmanager
def extra_named(extra: str) -> Iterator[None]:
    """Run imports that need the optional extra ``extra``, such as ``run``.

    Raises:
        ValueError: a package is missing; the message says how to install the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}: pip install 'skymask-gpu[{extra}]'") from error


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of plain texts."""
    table = Table(*columns, title=escape(title))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


@contextmanager
def resumable(*arguments: object) -> Iterator[None]:
    """Do work inside that can be resumed after Ctrl-C, which ends it with exit code 130.

    Args:
        arguments: what to write after ``skymask-gpu`` to go on; the user is told so.
    """
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["skymask-gpu", *map(str, arguments)])
        console.print(f"stopped; go on with: {command}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
