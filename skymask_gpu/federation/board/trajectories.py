"""Defended trajectories: whole runs under each attack, each with one rule from the first round on.

One round's verdict on honest updates says little about a run, because what a rule lets pass in one
round changes the model, and with it all later updates. A trajectory is therefore played like a cell
of a sweep, and two runs are played beside it: FedAvg without attack, and FedAvg under the same
attack.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.board.config import Board, SetKey, Trajectories
from skymask_gpu.federation.board.judging import ONE_POINT, mean_of_known
from skymask_gpu.federation.config import DefenceConfig, RunConfig
from skymask_gpu.federation.run_folder import METRICS
from skymask_gpu.federation.sweep import cell_folder
from skymask_gpu.io.files import read_lines

__all__ = ["Ended", "ended", "trajectory_runs"]

_FEDAVG = "fedavg"


@dataclass(frozen=True)
class Ended:
    """A trajectory that was played to its end, beside the two runs that it is compared with.

    Attributes:
        rule: the label of its rule.
        fpr, fnr: the means over all rounds; None for a rule that judges nobody. ``fnr`` is also
            None without an attacker.
        accuracy: the test accuracy of the final model.
        accuracy_fedavg: that of FedAvg under the same attack; None if that run is not done.
        accuracy_unattacked: that of FedAvg without attack; None if that run is not done.
        attack_success: the success rate of a backdoor in the final model; None for other attacks.
    """

    recipe: str
    seed: int
    attack: str
    rule: str
    fpr: float | None
    fnr: float | None
    accuracy: float
    accuracy_fedavg: float | None
    accuracy_unattacked: float | None
    attack_success: float | None

    @property
    def within(self) -> bool | None:
        """Whether it ends within one point of the run without attack."""
        return None if self.accuracy_unattacked is None else self.accuracy >= self.accuracy_unattacked - ONE_POINT

    @property
    def worse_than_fedavg(self) -> bool | None:
        """Whether it ends more than one point below FedAvg under the same attack."""
        return None if self.accuracy_fedavg is None else self.accuracy < self.accuracy_fedavg - ONE_POINT


def trajectory_runs(board: Board) -> list[RunConfig]:
    """The runs of the board's trajectories, and those with FedAvg; empty if none is asked for."""
    asked = board.trajectories
    return [] if asked is None else [_run(board, asked, key, rule) for key, rule in _cells(asked, board)]


def ended(board: Board, folder: Path) -> list[Ended]:
    """Every trajectory of the board that was played to its end in ``folder``, without FedAvg's.

    Raises:
        ValueError: a line of a run's metrics is damaged.
    """
    asked = board.trajectories
    if asked is None:
        return []
    records = {}
    for key, rule in _cells(asked, board):
        played = read_lines(cell_folder(folder, _run(board, asked, key, rule)) / METRICS)
        if played and (played[-1]["diverged"] or len(played) == asked.rounds):
            records[key, rule] = played

    def accuracy(key: SetKey, rule: str) -> float | None:
        played = records.get((key, rule))
        return None if played is None else float(played[-1]["accuracy"])

    return [
        Ended(
            key.recipe,
            key.seed,
            key.attack,
            rule,
            mean_of_known(record["false_positive_rate"] for record in played),
            mean_of_known(record["false_negative_rate"] for record in played),
            float(played[-1]["accuracy"]),
            accuracy(key, _FEDAVG),
            accuracy(replace(key, attack=_unattacked(board)), _FEDAVG),
            played[-1]["attack_success_rate"],
        )
        for (key, rule), played in records.items()
        if rule != _FEDAVG
    ]


def _cells(asked: Trajectories, board: Board) -> Iterator[tuple[SetKey, str]]:
    """Recipe, seed, attack and rule of each run; the key's round is the last one."""
    for recipe in asked.recipes:
        for seed in board.seeds:
            for attack in dict.fromkeys((_unattacked(board), *asked.attacks)):
                for rule in dict.fromkeys((_FEDAVG, *asked.rules)):
                    yield SetKey(recipe, seed, attack, asked.rounds - 1), rule


def _unattacked(board: Board) -> str:
    """The label of the run without attackers, which is played also if the file does not name it."""
    return next((label for label, attack in board.attacks.items() if attack.name == "none"), "no attack")


def _run(board: Board, asked: Trajectories, key: SetKey, rule: str) -> RunConfig:
    return replace(
        board.recipes[key.recipe],
        name=f"{key.recipe}.{key.seed}.{key.attack}.{rule}",
        seed=key.seed,
        rounds=asked.rounds,
        evaluate_every=asked.rounds,
        attack=board.attacks.get(key.attack, AttackConfig()),
        defence=asked.rules.get(rule, DefenceConfig(rule=_FEDAVG)),
    )
