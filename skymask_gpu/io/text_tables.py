"""Small tables as text: Markdown for people, CSV for other programs."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

__all__ = ["csv_table", "markdown_table"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with a head.

    Example:
        >>> print(markdown_table(["rule", "FPR"], [["a|b", "0%"]]), end="")
        | rule | FPR |
        | --- | --- |
        | a\\|b | 0% |
    """
    texts = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in texts)


def csv_table(kind: type, rows: Sequence[Any]) -> str:
    """A CSV file with a column per field of the dataclass ``kind``, and a line per instance."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(kind)])
    writer.writerows(astuple(row) for row in rows)
    return file.getvalue()
