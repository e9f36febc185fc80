"""``write_report``: tables as Markdown, CSV and LaTeX, pictures, and a self-contained HTML page."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skymask_gpu.io.files import write_text
from skymask_gpu.report.html import page
from skymask_gpu.report.plots import plot_evidence, plot_masks, plot_rates, plot_rounds, plot_witnesses
from skymask_gpu.report.summary import COLUMNS, NOTE, FinishedRun, failed_cells, percent
from skymask_gpu.report.sweep import Sweep, arrange
from skymask_gpu.report.tables import LEGEND, block_tables, csv_text, latex_text, markdown_text

__all__ = ["Report", "write_report"]

# With more runs than this, the page has no part for each single run.
_RUNS_IN_DETAIL = 20


@dataclass(frozen=True)
class Report:
    """The paths of the report's files; a picture is None if there is nothing to show in it."""

    markdown: Path
    csv: Path
    latex: Path
    rounds: Path
    rates_by_share: Path | None
    rates_by_clients: Path | None
    masks: Path | None
    witnesses: Path | None
    evidence: Path | None
    page: Path

    def paths(self) -> dict[str, Path]:
        """The files that were written, by name; the page comes last."""
        every = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        return {name: path for name, path in every.items() if path is not None}


def write_report(title: str, runs: list[FinishedRun], folder: Path) -> Report:
    """Write the report on ``runs``, and on the failed cells below ``folder``, into ``folder``.

    Each file is written whole or not at all. There are always ``report.html``, ``tables.md``,
    ``tables.csv``, ``tables.tex`` and ``rounds.png``. ``rates_by_share.png`` and
    ``rates_by_clients.png`` are there if a setting was run with two shares of attackers or two
    numbers of clients, ``masks.png``, ``witnesses.png`` and ``evidence.png`` if a run made masks. A
    picture of an earlier report that is not made now is removed.

    Args:
        title: the heading of the page and the tables.
        runs: at least one run, from :func:`skymask_gpu.report.load_runs`.
        folder: where the files go.

    Raises:
        ValueError: there is no run, or a file of masks cannot be read.
    """
    if not runs:
        raise ValueError("runs must hold one run at least, got none; see load_runs")
    sweep, failed = arrange(runs), failed_cells(folder)
    html, markdown, csv, latex = (folder / name for name in ("report.html", "tables.md", "tables.csv", "tables.tex"))
    write_text(markdown, markdown_text(title, sweep, failed))
    write_text(csv, csv_text(runs, folder))
    write_text(latex, latex_text(title, sweep, failed))
    pictures = _write_pictures(runs, sweep, folder)
    write_text(html, _page(title, runs, sweep, failed, pictures))
    return Report(markdown, csv, latex, page=html, **pictures)


def _write_pictures(runs: list[FinishedRun], sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Write the pictures; their paths by name, None for a picture that has nothing to show."""
    names = ("rounds", "rates_by_share", "rates_by_clients", "masks", "witnesses", "evidence")
    rounds, by_share, by_clients, masks, witnesses, evidence = paths = [folder / f"{name}.png" for name in names]
    plot_rounds(runs, sweep, rounds)
    made = [
        True,
        plot_rates(sweep, "share", by_share),
        plot_rates(sweep, "clients", by_clients),
        plot_masks(runs, masks),
        plot_witnesses(runs, witnesses),
        plot_evidence(runs, evidence),
    ]
    for path, is_made in zip(paths, made, strict=True):
        if not is_made:
            path.unlink(missing_ok=True)
    return {name: path if is_made else None for name, path, is_made in zip(names, paths, made, strict=True)}


def _page(
    title: str,
    runs: list[FinishedRun],
    sweep: Sweep,
    failed: list[tuple[str, str]],
    pictures: dict[str, Path | None],
) -> str:
    """The HTML page, with its pictures inside."""
    in_detail = runs if len(runs) <= _RUNS_IN_DETAIL else []
    return page(
        "page.html.j2",
        title,
        {name: path for name, path in pictures.items() if path is not None},
        num_runs=len(runs),
        columns=COLUMNS,
        rows=[run.row() for run in in_detail],
        note=NOTE,
        legend=LEGEND,
        blocks=[(block.title, block_tables(block)) for block in sweep.blocks],
        left_out=sweep.left_out,
        failed=failed,
        runs=[{"name": run.name, "config": json.dumps(run.config, indent=2), "records": run.records} for run in in_detail],
        percent=percent,
    )
