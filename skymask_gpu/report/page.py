"""``write_report``: tables as Markdown, CSV and LaTeX, pictures, and a self-contained HTML page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skymask_gpu.engine.registry import one_of
from skymask_gpu.io.files import write_text
from skymask_gpu.report.html import page
from skymask_gpu.report.interactive import page_data
from skymask_gpu.report.plots import plot_evidence, plot_masks, plot_rates, plot_rounds, plot_witnesses
from skymask_gpu.report.plots_by_round import plot_masks_by_round, plot_rejections, plot_verdicts
from skymask_gpu.report.summary import COLUMNS, NOTE, FinishedRun, failed_cells, missing_cells, percent
from skymask_gpu.report.sweep import Sweep, arrange
from skymask_gpu.report.tables import LEGEND, block_tables, csv_text, latex_text, markdown_text

__all__ = ["Report", "write_report"]

# The formats of pictures besides PNG.
FORMATS = ("svg", "pdf")
# With more runs than this, the page has no part for each single run.
_RUNS_IN_DETAIL = 20


@dataclass(frozen=True)
class Report:
    """The paths of the report's files; a picture is None if there is nothing to show in it."""

    markdown: Path
    csv: Path
    latex: Path
    rounds: Path
    verdicts: Path | None
    rejections: Path | None
    rates_by_share: Path | None
    rates_by_clients: Path | None
    masks_by_round: Path | None
    masks: Path | None
    witnesses: Path | None
    evidence: Path | None
    page: Path

    def paths(self) -> dict[str, Path]:
        """The files that were written, by name; the page comes last."""
        every = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        return {name: path for name, path in every.items() if path is not None}


def write_report(
    title: str,
    runs: list[FinishedRun],
    folder: Path,
    *,
    sources: Sequence[Path] | None = None,
    picture_format: str | None = None,
) -> Report:
    """Write the report on ``runs``, and on the failed cells below ``folder``, into ``folder``.

    Each file is written whole or not at all. There are always ``report.html``, ``tables.md``,
    ``tables.csv``, ``tables.tex`` and ``rounds.png``. ``rejections.png`` is there if a rule judges
    clients, and ``verdicts.png`` if the runs are few besides. ``rates_by_share.png`` and
    ``rates_by_clients.png`` are there if a setting was run with two shares of attackers or two
    numbers of clients, ``masks_by_round.png``, ``masks.png``, ``witnesses.png`` and
    ``evidence.png`` if a run made masks. A picture of an earlier report that is not made now is
    removed.

    Args:
        title: the heading of the page and the tables.
        runs: at least one run, from :func:`skymask_gpu.report.load_runs`.
        folder: where the files go.
        sources: where failed and missing cells are looked for; None means ``folder``.
        picture_format: ``"svg"`` or ``"pdf"``: the pictures are written in this format, too. Those
            of the page are PNG.

    Raises:
        ValueError: there is no run, a file of masks cannot be read, or there is no such format.
    """
    if picture_format is not None:
        one_of("--format", picture_format, FORMATS)
    if not runs:
        raise ValueError("runs must hold one run at least, got none; see load_runs")
    every = [folder] if sources is None else sources
    sweep = arrange(runs)
    failed, missing = ([entry for one in every for entry in found(one)] for found in (failed_cells, _missing))
    html, markdown, csv, latex = (folder / name for name in ("report.html", "tables.md", "tables.csv", "tables.tex"))
    write_text(markdown, markdown_text(title, sweep, failed, missing))
    write_text(csv, csv_text(runs, folder))
    write_text(latex, latex_text(title, sweep, failed))
    pictures = _write_pictures(runs, sweep, folder, ".png")
    if picture_format is not None:
        _write_pictures(runs, sweep, folder, f".{picture_format}")
    write_text(html, _page(title, runs, sweep, failed, missing, pictures))
    return Report(markdown, csv, latex, page=html, **pictures)


def _missing(folder: Path) -> list[tuple[str, str]]:
    return [(name, "no round is finished yet") for name in missing_cells(folder)]


def _write_pictures(runs: list[FinishedRun], sweep: Sweep, folder: Path, suffix: str) -> dict[str, Any]:
    """Write the pictures; their paths by name, None for a picture that has nothing to show."""
    drawings: dict[str, Callable[[Path], bool | None]] = {
        "rounds": lambda path: plot_rounds(runs, sweep, path),
        "verdicts": lambda path: plot_verdicts(runs, path),
        "rejections": lambda path: plot_rejections(runs, path),
        "rates_by_share": lambda path: plot_rates(sweep, "share", path),
        "rates_by_clients": lambda path: plot_rates(sweep, "clients", path),
        "masks_by_round": lambda path: plot_masks_by_round(runs, path),
        "masks": lambda path: plot_masks(runs, path),
        "witnesses": lambda path: plot_witnesses(runs, path),
        "evidence": lambda path: plot_evidence(runs, path),
    }
    paths: dict[str, Any] = {}
    for name, draw in drawings.items():
        path = folder / f"{name}{suffix}"
        # The accuracies can always be drawn, and their function returns nothing.
        paths[name] = None if draw(path) is False else path
        if paths[name] is None:
            path.unlink(missing_ok=True)
    return paths


def _page(
    title: str,
    runs: list[FinishedRun],
    sweep: Sweep,
    failed: list[tuple[str, str]],
    missing: list[tuple[str, str]],
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
        missing=missing,
        runs=[{"name": run.name, "config": json.dumps(run.config, indent=2), "records": run.records} for run in in_detail],
        percent=percent,
        data=page_data(in_detail),
    )
