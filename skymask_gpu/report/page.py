"""One self-contained HTML page for a comparison of runs: the pictures are inside, nothing is loaded from anywhere."""

import base64
import dataclasses
import json
import platform
from pathlib import Path

import jinja2
import torch

from skymask_gpu.files import write_text
from skymask_gpu.report.plots import plot_evidence, plot_masks, plot_rounds
from skymask_gpu.report.summary import COLUMNS, FinishedRun, percent

__all__ = ["Report", "write_report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """Where the report's files are; ``masks`` and ``evidence`` are None if no run made masks."""

    page: Path
    rounds: Path
    masks: Path | None
    evidence: Path | None


def write_report(title: str, runs: list[FinishedRun], folder: Path) -> Report:
    """Write ``rounds.png``, ``masks.png``, ``evidence.png`` and ``report.html`` into ``folder``; each whole or not at all."""
    rounds, masks, evidence = (folder / f"{name}.png" for name in ("rounds", "masks", "evidence"))
    plot_rounds(runs, rounds)
    has_masks = plot_masks(runs, masks) and plot_evidence(runs, evidence)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("skymask_gpu", "report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        columns=COLUMNS,
        rows=[run.row() for run in runs],
        rounds=_data_uri(rounds),
        masks=_data_uri(masks) if has_masks else None,
        evidence=_data_uri(evidence) if has_masks else None,
        runs=[
            {
                "name": run.config.name,
                "config": json.dumps(dataclasses.asdict(run.config), indent=2),
                "records": run.records,
            }
            for run in runs
        ],
        percent=percent,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
    )
    write_text(folder / "report.html", page)
    return Report(folder / "report.html", rounds, masks if has_masks else None, evidence if has_masks else None)


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
