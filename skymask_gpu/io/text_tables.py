"""Small tables as text: Markdown for people, LaTeX for papers, CSV for other programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from typing import Any

__all__ = ["csv_table", "latex_escaped", "latex_row", "latex_table", "markdown_table"]

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "#": r"\#", "$": r"\$", "%": r"\%", "&": r"\&", "_": r"\_",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)  # fmt: skip


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


def latex_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A LaTeX ``table``, scaled to the line. It needs the packages booktabs and graphicx.

    Example:
        >>> print(latex_table("Leaks", ["mask", "share"], [["1%", "0"]]).splitlines()[6])
        1\% & 0 \\
    """
    lines = [
        r"\begin{table}[htbp]",
        rf"\caption{{{latex_escaped(caption)}}}",
        rf"\resizebox{{\linewidth}}{{!}}{{\begin{{tabular}}{{{'l' * len(columns)}}}",
        r"\toprule",
        latex_row(map(latex_escaped, columns)),
        r"\midrule",
        *(latex_row(map(latex_escaped, row)) for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex_escaped(text: str) -> str:
    """A text as LaTeX prints it, on one line."""
    return " ".join(text.split()).translate(_LATEX)


def latex_row(cells: Iterable[str]) -> str:
    """A line of a LaTeX ``tabular``; the cells are LaTeX already."""
    return " & ".join(cells) + r" \\"
