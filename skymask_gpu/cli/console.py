"""What all commands share: consoles, JSON answers, warnings, advice after Ctrl-C, extras."""

import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = [
    "UNCERTAIN",
    "answer",
    "as_dicts",
    "console",
    "errors",
    "extra_named",
    "only_first_speaks",
    "print_table",
    "resumable",
    "warn",
]

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
def only_first_speaks(is_first: bool) -> Iterator[None]:
    """Under torchrun, let the first rank alone print and warn inside: all would say the same.

    Errors are printed by every rank that has one.
    """
    if is_first:
        yield
        return
    console.quiet = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        console.quiet = False


@contextmanager
def answer(*, as_json: bool) -> Iterator[dict[str, Any]]:
    """What a command found, for programs: whatever the block puts into the dict.

    With ``as_json``, stdout gets the dict as one JSON document at the end, and everything that is
    printed for people inside the block goes to stderr. If the block ends with an error, or before
    it has found anything, stdout stays empty.
    """
    found: dict[str, Any] = {}
    console.stderr = as_json
    try:
        yield found
    except typer.Exit:
        # Exit codes such as that of --strict come after the work.
        _print_json(found, as_json)
        raise
    finally:
        console.stderr = False
    _print_json(found, as_json)


def _print_json(found: dict[str, Any], as_json: bool) -> None:
    if as_json and found:
        print(json.dumps(_plain(found), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and Inf become null, paths become text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def as_dicts(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The rows of a table by the names of their columns."""
    return [dict(zip(columns, row, strict=True)) for row in rows]


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
