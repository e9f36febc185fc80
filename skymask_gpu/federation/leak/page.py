"""An audit's results for people: tables, pictures and what they mean, each file written whole."""

from pathlib import Path
from typing import Any

from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.judging import Line, lines
from skymask_gpu.federation.leak.pictures import plot_curves, plot_faces
from skymask_gpu.federation.leak.tables import html_values, leak_text, thresholds_latex, thresholds_text
from skymask_gpu.federation.leak.thresholds import Threshold, counting_bound, thresholds
from skymask_gpu.federation.leak.victims import Victims
from skymask_gpu.io.files import write_text
from skymask_gpu.io.text_tables import csv_table
from skymask_gpu.report.html import page

__all__ = ["write_audit"]

# The page comes last: it is what a reader opens.
_FILES = ("leak.csv", "leak.md", "thresholds.csv", "thresholds.md", "thresholds.tex", "curves.png", "faces.png", "leak.html")


def write_audit(title: str, audit: Audit, victims: Victims, records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write what a finished audit found into ``folder``, each file as a whole."""
    table = lines(records)
    found = thresholds(table, counting_bound(victims))
    texts = {
        "leak.csv": csv_table(Line, table),
        "leak.md": leak_text(title, audit, victims, table),
        "thresholds.csv": csv_table(Threshold, found),
        "thresholds.md": thresholds_text(title, audit, victims, table, found),
        "thresholds.tex": thresholds_latex(title, audit, victims, found),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    plot_curves(audit, table, folder / "curves.png")
    plot_faces(audit, victims, records, found, folder / "faces.png")
    pictures = {name: folder / f"{name}.png" for name in ("curves", "faces")}
    write_text(folder / "leak.html", page("leak.html.j2", title, pictures, **html_values(audit, victims, table, found)))
    return [folder / name for name in _FILES]
