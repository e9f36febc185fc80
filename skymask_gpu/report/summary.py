"""``FinishedRun``: a run as it lies on disk, and the row that every table shows of it.

A run's folder holds ``config.json`` (its settings), ``metrics.jsonl`` and ``times.jsonl`` (one line
per round each), and ``masks.safetensors`` if the rule is SkyMask. The code reads only what is
there, so that runs of older versions stay readable.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skymask_gpu.federation.run_folder import CONFIG, METRICS, TIMES
from skymask_gpu.federation.sweep import CELLS, ERROR, planned_cells
from skymask_gpu.io.files import read_lines

__all__ = [
    "COLUMNS",
    "NOTE",
    "FinishedRun",
    "concerns",
    "failed_cells",
    "flat_settings",
    "load_folders",
    "load_run",
    "load_runs",
    "missing_cells",
    "percent",
]

COLUMNS = ("run", "rule", "attack", "accuracy", "FPR", "FNR", "ASR", "s/round")
NOTE = (
    "accuracy and ASR (attack success rate of a backdoor) of the last evaluated round; FPR: honest clients rejected, "
    "FNR: attackers kept, means over the rounds from the second on; s/round: aggregation, median"
)

# From this success rate on, a backdoor counts as alive.
_ALIVE = 0.5


@dataclass(frozen=True)
class FinishedRun:
    """A run as it lies on disk.

    Attributes:
        config: its settings, as the nested tables of its TOML file.
        folder: where it is.
        records: what was recorded, one entry per round.
        times: the seconds of each part of a round, one entry per round.
        origin: where folders are compared, the one that the run is from; its name then begins with
            it.

    Example:
        >>> rounds = [{"round": 0, "accuracy": 0.5}, {"round": 1, "accuracy": None}]
        >>> run = FinishedRun({"rounds": 2}, Path("runs/mine"), rounds, [])
        >>> run.name, run.is_complete, run.last("accuracy")
        ('mine', True, 0.5)
    """

    config: dict[str, Any]
    folder: Path
    records: list[dict[str, Any]]
    times: list[dict[str, Any]]
    origin: str = ""

    @property
    def name(self) -> str:
        name = str(self.config.get("name", self.folder.name))
        return f"{self.origin}: {name}" if self.origin else name

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def rounds_done(self) -> int:
        return int(self.records[-1]["round"]) + 1

    @property
    def rounds(self) -> int:
        """The number of rounds that the run was to have."""
        return int(self.config.get("rounds", self.rounds_done))

    @property
    def diverged(self) -> bool:
        """Whether the run ended early with NaN or Inf in the global model."""
        return bool(self.records[-1].get("diverged", False))

    @property
    def is_complete(self) -> bool:
        return self.diverged or self.rounds_done >= self.rounds

    def last(self, key: str) -> float | None:
        """The value of ``key`` in the last round that has it; not every round is evaluated."""
        return next((record[key] for record in reversed(self.records) if record.get(key) is not None), None)

    @property
    def worst_class(self) -> float | None:
        """The lowest accuracy of a class in the last evaluated round; None if not recorded."""
        shares: list[float | None] = next(
            (record["class_accuracy"] for record in reversed(self.records) if record.get("class_accuracy")), []
        )
        return min((share for share in shares if share is not None), default=None)

    @property
    def lifespan(self) -> int | None:
        """How many rounds a backdoor outlives its attackers.

        This is the number of rounds from the last attacked round to the last tested one in which
        the backdoor succeeds in at least half of the cases (Zhang et al., ICML 2022); 0 if it never
        does. It is at most the number of rounds that were played since. None if there is no
        backdoor, or if the attackers did not leave.
        """
        attacked = [record["round"] for record in self.records if record.get("attacked")]
        later = [record for record in self.records if attacked and record["round"] > attacked[-1]]
        tested = [record for record in later if record.get("attack_success_rate") is not None]
        if not tested:
            return None
        alive = [record["round"] for record in tested if record["attack_success_rate"] >= _ALIVE]
        return alive[-1] - attacked[-1] if alive else 0

    def mean_rate(self, key: str) -> float | None:
        """The mean of a rate, such as ``false_positive_rate``, over the rounds from the second on.

        If there is only one round, it is the rate of that round. None if it was never measured.
        """
        return _of_rates(statistics.fmean, self._rates(key))

    def worst_rate(self, key: str) -> float | None:
        """The largest rate in the rounds that :meth:`mean_rate` takes the mean of."""
        return _of_rates(max, self._rates(key))

    def median_seconds(self, phase: str) -> float | None:
        """The median over the rounds of the seconds of a phase; None if it was not timed.

        ``phase`` is ``local_training`` or ``aggregation``.
        """
        seconds = [times[phase] for times in self.times if times.get(phase) is not None]
        return statistics.median(seconds) if seconds else None

    def row(self) -> tuple[str, ...]:
        """The run in one line, in the order of ``COLUMNS``."""
        settings = flat_settings(self.config)
        seconds = self.median_seconds("aggregation")
        done = "" if self.is_complete else f" ({self.rounds_done} of {self.rounds} rounds)"
        if self.diverged:
            done = f" (diverged in round {self.rounds_done})"
        return (
            self.name,
            str(settings.get("defence.rule", "-")),
            _attack(settings),
            percent(self.last("accuracy")) + done,
            percent(self.mean_rate("false_positive_rate")),
            percent(self.mean_rate("false_negative_rate")),
            percent(self.last("attack_success_rate")),
            "-" if seconds is None else f"{seconds:.3f}",
        )

    def results(self) -> dict[str, Any]:
        """The run's results as numbers, for programs; None where something is not known."""
        settings = flat_settings(self.config)
        return {
            "run": self.name,
            "folder": str(self.folder),
            "rule": settings.get("defence.rule"),
            "attack": settings.get("attack.name"),
            "rounds": self.rounds,
            "rounds_done": self.rounds_done,
            "diverged": self.diverged,
            "accuracy": self.last("accuracy"),
            "false_positive_rate": self.mean_rate("false_positive_rate"),
            "false_negative_rate": self.mean_rate("false_negative_rate"),
            "attack_success_rate": self.last("attack_success_rate"),
            "aggregation_seconds": self.median_seconds("aggregation"),
        }

    def _rates(self, key: str) -> list[float]:
        judged = [record for record in self.records if record["round"] > 0] or self.records
        return [record[key] for record in judged if record.get(key) is not None]


def concerns(run: FinishedRun) -> list[str]:
    """What a reader of the run's numbers must be told, in sentences; an empty list if all is well.

    The number of rejected clients says something about SkyMask only. Krum, for instance, keeps a
    single client by its definition.
    """
    sentences = []
    if run.diverged:
        sentences.append(f"diverged: after round {run.rounds_done} the global model holds NaN or Inf, and the run ended there")
    for verdict, what in (
        ("most rejected", "most clients were rejected"),
        ("no verdict", "there was no verdict, so everyone was kept,"),
    ):
        rounds = [record["round"] for record in run.records if record.get("verdict") == verdict]
        if rounds:
            sentences.append(f"{what} in {len(rounds)} of {len(run.records)} rounds (first: round {rounds[0] + 1})")
    return sentences


def load_run(folder: Path) -> FinishedRun:
    """The run in ``folder``; its records are empty if no round was finished.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {CONFIG}, so it is no run's folder") from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} must hold a run's settings, got {type(config).__name__}")
    records = read_lines(folder / METRICS)
    recorded = {record["round"] for record in records}
    # A run that was killed and resumed may have timed a round twice. The last time counts, because
    # it is that of the round that was kept.
    times = {line["round"]: line for line in read_lines(folder / TIMES) if line["round"] in recorded}
    return FinishedRun(config, folder, records, [times[number] for number in sorted(times)])


def load_runs(folder: Path) -> list[FinishedRun]:
    """All runs at or below ``folder`` that finished at least one round, sorted by path.

    Raises:
        ValueError: there is none, or a file cannot be read.
    """
    runs = [load_run(path.parent) for path in sorted(folder.rglob(CONFIG))]
    runs = [run for run in runs if run.records]
    if not runs:
        failed = failed_cells(folder)
        first = f"; {len(failed)} failed, the first, {failed[0][0]}, with: {failed[0][1]}" if failed else ""
        raise ValueError(
            f"{folder}: no run found: a run's folder holds {CONFIG} and a {METRICS} of one round at least{first}; "
            "give a folder that `skymask-gpu run` or `sweep` wrote"
        )
    return runs


def load_folders(folders: Sequence[Path]) -> list[FinishedRun]:
    """All runs at or below several folders, to be compared; of one folder, those of ``load_runs``.

    Raises:
        ValueError: a folder is named twice, it holds no run, or a file cannot be read.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"the folders to compare must differ, got {', '.join(map(str, folders))}")
    if len(folders) == 1:
        return load_runs(folders[0])
    names = [folder.resolve().name for folder in folders]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [replace(run, origin=label) for folder, label in zip(folders, labels, strict=True) for run in load_runs(folder)]


def missing_cells(folder: Path) -> list[str]:
    """The cells of the sweep in ``folder`` that finished no round, and did not fail either.

    They may wait for their turn, or be in another shard.
    """
    failed = {name for name, _ in failed_cells(folder)}
    done = {path.parent.name for path in folder.glob(f"{CELLS}/*/{METRICS}") if read_lines(path)}
    return [name for name in planned_cells(folder) if name not in failed | done]


def failed_cells(folder: Path) -> list[tuple[str, str]]:
    """The name of each cell below ``folder`` that failed, and its error's first line, by path."""
    failed = []
    for path in sorted(folder.rglob(ERROR)):
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failed.append((path.parent.name, lines[0] if lines else "(no message)"))
    return failed


def flat_settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys.

    A list becomes its JSON text, so that all values can serve as keys of a dict.

    Example:
        >>> flat_settings({"data": {"clients": 5}, "seeds": [1, 2]})
        {'data.clients': 5, 'seeds': '[1, 2]'}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def percent(share: float | None) -> str:
    """A share as text in percent; ``-`` for None."""
    return "-" if share is None else f"{100 * share:.1f}%"


def _attack(settings: dict[str, Any]) -> str:
    name, share, clients = (settings.get(key) for key in ("attack.name", "attack.share", "data.clients"))
    if name in (None, "none"):
        return "none"
    return f"{name} {max(1, round(share * clients))}/{clients}" if share and clients else str(name)


def _of_rates(reduce: Callable[[list[float]], float], rates: list[float]) -> float | None:
    return reduce(rates) if rates else None
