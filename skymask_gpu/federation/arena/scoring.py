"""Scores: of a run, of an attack over seeds, and of a rule, which is that of its worst attack.

The score of a run is the test accuracy of its final model minus, for a backdoor, the attack's
success rate: the share of test samples with the trigger that the model takes for the target class.
It is at most 1, and a backdoor can bring it down to -1.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymask_gpu.federation.arena.config import Arena, Key
from skymask_gpu.federation.run_folder import CONFIG
from skymask_gpu.federation.sweep import cell_folder, most_held
from skymask_gpu.report.summary import FinishedRun, load_run

__all__ = ["AttackLine", "Cost", "RuleLine", "attack_lines", "costs", "ended", "half_width", "rule_lines", "score"]

_FPR, _FNR = "false_positive_rate", "false_negative_rate"

Runs = Mapping[Key, FinishedRun]


@dataclass(frozen=True)
class AttackLine:
    """One rule against one attack, over all seeds. Numbers are None if a seed's run is missing.

    Attributes:
        share: the share of attackers; 0, with attack ``"none"``, without.
        runs, planned: the number of runs that have ended, and how many there will be.
        score: the mean over the seeds.
        interval: half of its 95% interval; None with a single seed.
        accuracy, attack_success: the means of the score's parts; the second is None but for
            backdoors.
        fpr, fnr: the means over seeds and rounds; None for a rule that judges nobody.
    """

    recipe: str
    start: str
    share: float
    attack: str
    rule: str
    runs: int
    planned: int
    score: float | None
    interval: float | None
    accuracy: float | None
    attack_success: float | None
    fpr: float | None
    fnr: float | None


@dataclass(frozen=True)
class RuleLine:
    """One rule against all attacks of one share.

    Attributes:
        score: that of the worst attack; None if any attack's score is missing, since the missing
            one may be the worst.
        interval: half of the worst attack's 95% interval.
        worst_attack: its label.
        unattacked, unattacked_interval: the accuracy of the same rule without attack.
        unattacked_fpr: the share of clients that it rejects then.
        fpr, fnr: the means over all attacks; None without a score.
        runs, planned: the number of runs that have ended, and how many there will be, those
            without attack included.
    """

    recipe: str
    start: str
    share: float
    rule: str
    score: float | None
    interval: float | None
    worst_attack: str | None
    unattacked: float | None
    unattacked_interval: float | None
    unattacked_fpr: float | None
    fpr: float | None
    fnr: float | None
    runs: int
    planned: int


@dataclass(frozen=True)
class Cost:
    """What a rule costs in a recipe, over all its runs that have ended.

    Attributes:
        seconds: the mean of the runs' median times of one aggregation.
        training_seconds: the same for the local training of all clients.
        gigabytes: the most memory that the process of a run held, in 10^9 bytes; None if unknown.
    """

    recipe: str
    rule: str
    seconds: float | None
    training_seconds: float | None
    gigabytes: float | None


def ended(arena: Arena, folder: Path) -> dict[Key, FinishedRun]:
    """The runs of the arena that were played to their end.

    Raises:
        ValueError: a file of a run is damaged.
    """
    runs = {}
    for key in arena.cells():
        where = cell_folder(folder, arena.run_of(key, folder))
        if (where / CONFIG).exists():
            run = load_run(where)
            if run.records and run.is_complete:
                runs[key] = run
    return runs


def score(run: FinishedRun) -> float:
    """The final accuracy, minus the success rate of a backdoor."""
    accuracy, success = run.last("accuracy"), run.last("attack_success_rate")
    assert accuracy is not None, "the last round is always tested"
    return accuracy - (success or 0.0)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of a mean, by Student's t distribution; None for a single value.

    Example:
        >>> round(half_width([0.5, 0.6, 0.7]), 3)
        0.248
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def attack_lines(keys: Iterable[Key], runs: Runs) -> list[AttackLine]:
    """A line per recipe, start, share, attack and rule, in the order of the keys.

    Args:
        keys: the runs that there will be.
        runs: those that have ended.
    """
    groups: dict[tuple[str, str, float, str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault((key.recipe, key.start, key.share, key.attack, key.rule), []).append(key)
    return [_attack_line(group, [runs[key] for key in seeds if key in runs], len(seeds)) for group, seeds in groups.items()]


def _attack_line(group: tuple[str, str, float, str, str], done: list[FinishedRun], planned: int) -> AttackLine:
    if len(done) < planned:
        return AttackLine(*group, len(done), planned, *[None] * 6)
    scores = [score(run) for run in done]
    return AttackLine(
        *group,
        len(done),
        planned,
        statistics.fmean(scores),
        half_width(scores),
        _mean(run.last("accuracy") for run in done),
        _mean(run.last("attack_success_rate") for run in done),
        _mean(run.mean_rate(_FPR) for run in done),
        _mean(run.mean_rate(_FNR) for run in done),
    )


def rule_lines(lines: Sequence[AttackLine]) -> list[RuleLine]:
    """A line per recipe, start, share and rule."""
    unattacked = {(line.recipe, line.start, line.rule): line for line in lines if line.share == 0}
    groups: dict[tuple[str, str, float, str], list[AttackLine]] = {}
    for line in lines:
        if line.share:
            groups.setdefault((line.recipe, line.start, line.share, line.rule), []).append(line)
    found = []
    for (recipe, start, share, rule), attacked in groups.items():
        without = unattacked[recipe, start, rule]
        # An attack whose score is missing may be the worst one, so there is no score yet.
        scored = [(line.score, line) for line in attacked if line.score is not None]
        worst = min(scored, key=lambda one: one[0])[1] if len(scored) == len(attacked) else None
        found.append(
            RuleLine(
                recipe,
                start,
                share,
                rule,
                score=worst.score if worst else None,
                interval=worst.interval if worst else None,
                worst_attack=worst.attack if worst else None,
                unattacked=without.accuracy,
                unattacked_interval=without.interval,
                unattacked_fpr=without.fpr,
                fpr=_mean(line.fpr for line in attacked) if worst else None,
                fnr=_mean(line.fnr for line in attacked) if worst else None,
                runs=without.runs + sum(line.runs for line in attacked),
                planned=without.planned + sum(line.planned for line in attacked),
            )
        )
    return found


def costs(runs: Runs) -> list[Cost]:
    """A line per recipe and rule."""
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for key, run in runs.items():
        groups.setdefault((key.recipe, key.rule), []).append(run)
    return [
        Cost(
            recipe,
            rule,
            _mean(run.median_seconds("aggregation") for run in own),
            _mean(run.median_seconds("local_training") for run in own),
            max((held / 1e9 for run in own if (held := most_held(run.folder)) is not None), default=None),
        )
        for (recipe, rule), own in groups.items()
    ]


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
