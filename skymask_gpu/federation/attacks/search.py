"""Attackers who try the server's own rule: the strength of A Little Is Enough or IPM by a search.

All malicious clients send the same, unless a jitter parts them. They know the honest updates and
the rule, with everything that the rule knows in this round. Where an attack needs more honest
updates than there are (two for ``opt-alie``, one for ``opt-ipm``), they send their own updates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.interface import ATTACKS, Threat
from skymask_gpu.federation.attacks.shifts import Jitter, sent_by_all

__all__ = ["opt_alie", "opt_ipm"]

# First these strengths, a factor of 2 apart, then as many in equal steps between the best one's
# neighbours.
_FIRST = tuple(2.0**power for power in range(-3, 7))
_CALLS = 2 * len(_FIRST)


@ATTACKS.register("opt-alie", settings=Jitter)
def opt_alie(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Jitter) -> Tensor:
    """A Little Is Enough with the strength that hurts the rule most (ByzFL's Optimal ALIE).

    All send m - z s, with the honest mean m and standard deviation s. Here z maximises
    |rule(all rows) - m| among 20 tried strengths; without a jitter, all attackers send the same.
    The search is this project's own; see González et al., arXiv 2505.24802, for the attack.

    Raises:
        ValueError: there is no rule to try, as on a board and outside of a run.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P, deviation_P = honest_HP.mean(0), honest_HP.std(0)
    return _strongest(lambda z: mean_P - z * deviation_P, updates_NP, malicious_N, threat, settings.jitter)


@ATTACKS.register("opt-ipm", settings=Jitter)
def opt_ipm(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Jitter) -> Tensor:
    """Inner product manipulation with the strength that hurts the rule most (ByzFL's Optimal IPM).

    All send -z m, with the honest mean m. The strength is searched for as in :func:`opt_alie`.

    Raises:
        ValueError: there is no rule to try, as on a board and outside of a run.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    mean_P = honest_HP.mean(0)
    return _strongest(lambda z: -z * mean_P, updates_NP, malicious_N, threat, settings.jitter)


def _strongest(
    row: Callable[[float], Tensor], updates_NP: Tensor, malicious_N: Tensor, threat: Threat, jitter: float
) -> Tensor:
    """What the malicious clients send, ``(F, P)``, with the strength that moves the rule most."""
    rule = threat.rule
    if rule is None:
        raise ValueError(
            f"attack.name {threat.config.name!r} tries the rule of a run, and there is none on a board or outside of a run; "
            "use 'lie' or 'ipm' there"
        )
    mean_P = updates_NP[~malicious_N].mean(0)
    # The same noise at every strength: the search must compare strengths and nothing else.
    noise_FP = sent_by_all(torch.zeros_like(mean_P), updates_NP, malicious_N, threat, jitter)
    rows_NP = updates_NP.clone()

    def damage(strength: float) -> float:
        rows_NP[malicious_N] = row(strength) + noise_FP
        moved = float(torch.linalg.vector_norm((rule(rows_NP) - mean_P).double()))
        return moved if moved < float("inf") else -1.0

    tried = {strength: damage(strength) for strength in _FIRST}
    best = max(tried, key=tried.__getitem__)
    lower, upper = best / 2, best * 2
    for number in range(1, _CALLS - len(_FIRST) + 1):
        strength = lower + (upper - lower) * number / (_CALLS - len(_FIRST) + 1)
        tried[strength] = damage(strength)
    return row(max(tried, key=tried.__getitem__)) + noise_FP
