"""The records of finished runs, and the one row a run that every table shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.rounds import METRICS
from skymask_gpu.files import read_lines

__all__ = ["COLUMNS", "FinishedRun", "load_run", "percent"]

COLUMNS = ("run", "rule", "attack", "accuracy", "FPR", "FNR", "s/round")


@dataclass(frozen=True)
class FinishedRun:
    """A run's configuration, its folder and its records, one a round."""

    config: RunConfig
    folder: Path
    records: list[dict[str, Any]]

    def row(self) -> tuple[str, ...]:
        """The run in one line, in the order of ``COLUMNS``; rates are means over all rounds."""
        attack = self.config.attack
        false_negatives = [r["false_negative_rate"] for r in self.records if r["false_negative_rate"] is not None]
        seconds = sorted(r["seconds"]["aggregation"] for r in self.records)
        return (
            self.config.name,
            self.config.defence.rule,
            "none" if attack.name == "none" else f"{attack.name} {attack.malicious}/{self.config.data.clients}",
            percent(self.records[-1]["accuracy"]),
            percent(sum(r["false_positive_rate"] for r in self.records) / len(self.records)),
            percent(sum(false_negatives) / len(false_negatives)) if false_negatives else "-",
            f"{seconds[len(seconds) // 2]:.3f}",
        )


def load_run(config: RunConfig, folder: Path) -> FinishedRun:
    return FinishedRun(config, folder, read_lines(folder / METRICS))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
