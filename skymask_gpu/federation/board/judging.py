"""Turns stored mask sets into the table, which has a line per recipe, attack and rule.

SkyMask's rules judge the stored masks anew each time. The other rules saw the updates when the set
was made, and their verdict is stored with it.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.engine import Clustering
from skymask_gpu.engine.clustering.verdict import cluster
from skymask_gpu.engine.distances import Distances
from skymask_gpu.federation.board.config import CLUSTERINGS, Board, SetKey, name_of
from skymask_gpu.federation.board.mask_set import MaskSet, check_settings, set_settings

__all__ = ["ALL", "HONEST", "ONE_POINT", "Judged", "Line", "auc", "judge_sets", "lines", "mean_of_known", "verdict"]

# Every set knows the accuracy after these steps, besides those of the rules.
ALL, HONEST = "mean of all", "mean of the honest"
# One model is worse than another if its test accuracy is lower by more than this.
ONE_POINT = 0.01


def verdict(made: MaskSet, clustering: str) -> Tensor:
    """The clients that one of SkyMask's rules keeps, ``(N,)`` bool; all others are rejected."""
    benign_K = cluster(
        Distances(made.counts(), 1 / made.num_params),
        made.alignments,
        Clustering(rule=clustering),  # type: ignore[arg-type]  # the board's file was checked
        keep_share=made.keep_share,
        norms=made.norms,
    ).benign
    kept_N = torch.zeros_like(made.malicious)
    kept_N[made.clients[benign_K]] = True
    return kept_N


def auc(attackers: Tensor, honest: Tensor) -> float | None:
    """The probability that an attacker's value lies below an honest client's; ties count one half.

    None where there is nobody on one side.

    Example:
        >>> auc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
        0.75
    """
    if not len(attackers) or not len(honest):
        return None
    below = (attackers[:, None] < honest).double() + (attackers[:, None] == honest).double() / 2
    return float(below.mean())


@dataclass(frozen=True)
class Judged:
    """One rule's verdict on one set; a number is None where it does not exist or is not known.

    Attributes:
        fpr, fnr: the share of the honest clients that are rejected, and the share of the attackers
            that are kept.
        wrong_side: whether both of these shares are above one half.
        accuracy: the test accuracy after the rule's step.
        accuracy_fedavg, accuracy_honest: the test accuracy after the mean of all clients, and after
            the mean of the honest ones.
        auc_keep_share, auc_agreement, auc_root: how well each witness orders the clients; 1 is
            perfect.
        failed: why the rule could not judge; empty if it could.
    """

    key: SetKey
    rule: str
    fpr: float | None
    fnr: float | None
    wrong_side: bool | None
    accuracy: float | None
    accuracy_fedavg: float
    accuracy_honest: float
    auc_keep_share: float | None
    auc_agreement: float | None
    auc_root: float | None
    failed: str = ""

    @property
    def worse_than_fedavg(self) -> bool | None:
        return None if self.accuracy is None else self.accuracy < self.accuracy_fedavg - ONE_POINT


def judge_sets(board: Board, folder: Path) -> list[Judged]:
    """Judge every set of the board that is stored in ``folder``, by every rule.

    Raises:
        ValueError: a set is damaged, or was made with other settings.
    """
    judged: list[Judged] = []
    for key in board.set_keys():
        path = folder / key.file_name
        if not path.exists():
            continue
        made = MaskSet.read(path)
        check_settings(path, made.settings, set_settings(board.run_of(key)))
        for clustering in board.clusterings:
            kept_N = verdict(made, clustering)
            judged.append(_judged(key, name_of(clustering), made, kept_N, _accuracy_of_mean(made, kept_N)))
        for rule in board.rules:
            judged.append(_judged(key, rule.rule, made, made.kept.get(rule.rule), made.accuracy.get(rule.rule)))
    return judged


def _accuracy_of_mean(made: MaskSet, kept_N: Tensor) -> float | None:
    """The accuracy after the mean of these clients, if it was measured when the set was made."""
    means = (ALL, HONEST, *map(name_of, CLUSTERINGS))
    return next((made.accuracy[name] for name in means if name in made.kept and torch.equal(made.kept[name], kept_N)), None)


def _judged(key: SetKey, rule: str, made: MaskSet, kept_N: Tensor | None, accuracy: float | None) -> Judged:
    malicious_N = made.malicious
    malicious_K = malicious_N[made.clients]
    agreement_K = torch.where(made.norms > 0, made.alignments / made.norms, 0.0)
    to_root_K = made.counts()[-1, :-1]
    fpr = None if kept_N is None else float((~kept_N)[~malicious_N].double().mean())
    fnr = None if kept_N is None or not malicious_N.any() else float(kept_N[malicious_N].double().mean())
    wrong_side = None if fpr is None or fnr is None else fpr > 0.5 and fnr > 0.5

    def order(witness_K: Tensor) -> float | None:
        return auc(witness_K[malicious_K], witness_K[~malicious_K])

    return Judged(
        key=key,
        rule=rule,
        fpr=fpr,
        fnr=fnr,
        wrong_side=wrong_side,
        accuracy=accuracy,
        accuracy_fedavg=made.accuracy[ALL],
        accuracy_honest=made.accuracy[HONEST],
        auc_keep_share=order(made.keep_share[:-1]),
        auc_agreement=order(agreement_K),
        # The sign is turned because attackers lie farther from the root than honest clients do.
        auc_root=order(-to_root_K),
        failed=made.failed.get(rule, ""),
    )


@dataclass(frozen=True)
class Line:
    """One line of the table: a rule under one attack and recipe, over all rounds and seeds.

    Attributes:
        sets: the number of mask sets.
        fpr, fnr: the means of :class:`Judged`'s numbers; None if no set has one.
        wrong_side, worse_than_fedavg: the number of sets in which this is so; None if it is not
            known for any set.
        accuracy, accuracy_fedavg, accuracy_honest: the mean test accuracies after one step.
        auc_keep_share, auc_agreement, auc_root: the means over the sets.
    """

    recipe: str
    attack: str
    rule: str
    sets: int
    fpr: float | None
    fnr: float | None
    wrong_side: int | None
    worse_than_fedavg: int | None
    accuracy: float | None
    accuracy_fedavg: float | None
    accuracy_honest: float | None
    auc_keep_share: float | None
    auc_agreement: float | None
    auc_root: float | None


def lines(judged: list[Judged]) -> list[Line]:
    """One line per recipe, attack and rule, in the order of the board."""
    groups: dict[tuple[str, str, str], list[Judged]] = {}
    for one in judged:
        groups.setdefault((one.key.recipe, one.key.attack, one.rule), []).append(one)
    means = ("accuracy", "accuracy_fedavg", "accuracy_honest", "auc_keep_share", "auc_agreement", "auc_root")
    found = []
    for names, group in groups.items():

        def over(summary: Callable[[Any], Any], name: str, group: list[Judged] = group) -> Any:
            return _known(summary, (getattr(one, name) for one in group))

        found.append(
            Line(
                *names,
                sets=len(group),
                fpr=over(statistics.fmean, "fpr"),
                fnr=over(statistics.fmean, "fnr"),
                wrong_side=over(sum, "wrong_side"),
                worse_than_fedavg=over(sum, "worse_than_fedavg"),
                **{name: over(statistics.fmean, name) for name in means},
            )
        )
    return found


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None if none is."""
    return _known(statistics.fmean, values)


def _known(summary: Callable[[Any], Any], values: Iterable[Any]) -> Any:
    """The summary of those values that are known; None if none is known."""
    known = [value for value in values if value is not None]
    return summary(known) if known else None
