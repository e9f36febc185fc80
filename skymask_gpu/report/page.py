"""The report of one run or a sweep: tables as Markdown, CSV and LaTeX, pictures, and one self-contained HTML page."""

import base64
import json
import platform
from dataclasses import dataclass, fields
from pathlib import Path

import jinja2
import torch

from skymask_gpu.io.files import write_text
from skymask_gpu.report.plots import plot_evidence, plot_masks, plot_rates, plot_rounds
from skymask_gpu.report.summary import COLUMNS, NOTE, FinishedRun, failed_cells, percent
from skymask_gpu.report.sweep import arrange
from skymask_gpu.report.tables import LEGEND, block_tables, csv_text, latex_text, markdown_text

__all__ = ["Report", "write_report"]

# with more runs the page has no part for each
_RUNS_IN_DETAIL = 20


@dataclass(frozen=True)
class Report:
    """Where the report's files are; a picture is None if there is nothing to show in it."""

    markdown: Path
    csv: Path
    latex: Path
    rounds: Path
    rates_by_share: Path | None
    rates_by_clients: Path | None
    masks: Path | None
    evidence: Path | None
    page: Path

    def paths(self) -> dict[str, Path]:
        """The files that there are, the page last."""
        every = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        return {name: path for name, path in every.items() if path is not None}


def write_report(title: str, runs: list[FinishedRun], folder: Path) -> Report:
    """Write the report on ``runs`` and on the failed cells below ``folder`` into ``folder``; each file whole or not at all.

    Files: ``report.html``, ``tables.md``, ``tables.csv``, ``tables.tex``, ``rounds.png``; ``rates_by_share.png`` and
    ``rates_by_clients.png`` if a setting was run with two shares of attackers or two numbers of clients; ``masks.png`` and
    ``evidence.png`` if a run made masks. A picture of an earlier report that is not made now is removed.

    Raises:
        ValueError: no run, or a file of masks cannot be read.
    """
    if not runs:
        raise ValueError("runs must hold one run at least, got none; see load_runs")
    sweep, failed = arrange(runs), failed_cells(folder)
    page, markdown, csv, latex = (folder / name for name in ("report.html", "tables.md", "tables.csv", "tables.tex"))
    write_text(markdown, markdown_text(title, sweep, failed))
    write_text(csv, csv_text(runs, folder))
    write_text(latex, latex_text(title, sweep, failed))
    rounds, by_share, by_clients, masks, evidence = (
        folder / f"{name}.png" for name in ("rounds", "rates_by_share", "rates_by_clients", "masks", "evidence")
    )
    plot_rounds(runs, sweep, rounds)
    made = {
        by_share: plot_rates(sweep, "share", by_share),
        by_clients: plot_rates(sweep, "clients", by_clients),
        masks: plot_masks(runs, masks),
        evidence: plot_evidence(runs, evidence),
    }
    for picture, is_made in made.items():
        if not is_made:
            picture.unlink(missing_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skymask_gpu", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    in_detail = runs if len(runs) <= _RUNS_IN_DETAIL else []
    text = environment.get_template("page.html.j2").render(
        title=title,
        num_runs=len(runs),
        columns=COLUMNS,
        rows=[run.row() for run in in_detail],
        note=NOTE,
        legend=LEGEND,
        blocks=[(block.title, block_tables(block)) for block in sweep.blocks],
        left_out=sweep.left_out,
        failed=failed,
        pictures={path.stem: _data_uri(path) for path in (rounds, *(path for path in made if made[path]))},
        runs=[{"name": run.name, "config": json.dumps(run.config, indent=2), "records": run.records} for run in in_detail],
        percent=percent,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
    )
    write_text(page, text)
    return Report(
        markdown,
        csv,
        latex,
        rounds,
        rates_by_share=by_share if made[by_share] else None,
        rates_by_clients=by_clients if made[by_clients] else None,
        masks=masks if made[masks] else None,
        evidence=evidence if made[evidence] else None,
        page=page,
    )


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
