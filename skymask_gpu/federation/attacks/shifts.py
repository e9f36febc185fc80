"""Attacks that shift away from the honest mean: IPM, A Little Is Enough, Min-Max and Min-Sum.

All malicious clients send the same, unless a jitter parts them. Where an attack needs more honest
updates than there are (two for a standard deviation, else one), malicious clients send their own
updates.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks.interface import ATTACKS, Threat
from skymask_gpu.federation.choices import above_zero

__all__ = [
    "DIRECTIONS",
    "IPM",
    "Direction",
    "Jitter",
    "check_jitter",
    "clipped_to_band",
    "largest_z",
    "reach_within",
    "sent_by_all",
]

DIRECTIONS = ("std", "unit", "sign")

_LARGEST_Z = 3.0


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Settings of ``lie``.

    Attributes:
        jitter: the standard deviation of Gaussian noise that each malicious client adds to what all
            send, in units of the honest updates' standard deviation in each parameter. With 0, all
            send the same. With a jitter, they are no copies of each other, and a search for copies
            finds none.
    """

    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_jitter(self.jitter)


def check_jitter(jitter: float) -> None:
    if not (math.isfinite(jitter) and jitter >= 0):
        raise ValueError(f"attack.jitter must be finite and at least 0 (0: all send the same), got {jitter!r}")


def sent_by_all(row_P: Tensor, updates_NP: Tensor, malicious_N: Tensor, threat: Threat, jitter: float) -> Tensor:
    """The row, once per malicious client, ``(F, P)``; with jitter if two clients are honest."""
    row_FP = row_P.expand(int(malicious_N.sum()), -1)
    honest_HP = updates_NP[~malicious_N]
    if jitter == 0 or len(honest_HP) < 2:
        return row_FP
    # One number is drawn, as the seed of a second generator. What the round draws later then does
    # not depend on the number of attackers or parameters.
    nested = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=threat.generator)))
    return row_FP + jitter * honest_HP.std(0) * torch.randn(row_FP.shape, generator=nested).to(row_P)


@dataclass(frozen=True, kw_only=True)
class IPM:
    """Settings of ``ipm``.

    Attributes:
        epsilon: minus this multiple of the honest mean is sent.
        jitter: see :class:`Jitter`.
    """

    epsilon: float = 0.5
    jitter: float = 0.0

    def __post_init__(self) -> None:
        above_zero("attack.epsilon", self.epsilon)
        check_jitter(self.jitter)


@ATTACKS.register("ipm", settings=IPM)
def ipm(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: IPM) -> Tensor:
    """Inner product manipulation (Xie et al., "Fall of Empires", UAI 2019).

    All send -epsilon times the honest mean. The mean of all N then points against the honest mean
    if epsilon is above H / F.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    return sent_by_all(-settings.epsilon * honest_HP.mean(0), updates_NP, malicious_N, threat, settings.jitter)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """Settings of ``min-max`` and ``min-sum``.

    Attributes:
        direction: they move against the honest updates' standard deviation (``"std"``), their unit
            mean (``"unit"``) or the sign of their mean (``"sign"``).
        jitter: see :class:`Jitter`.
    """

    direction: str = "std"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        one_of("attack.direction", self.direction, DIRECTIONS)
        check_jitter(self.jitter)


@ATTACKS.register("min-max", settings=Direction)
def min_max(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Direction) -> Tensor:
    """Min-Max (Shejwalkar & Houmansadr, NDSS 2021, section IV-B).

    All send mean + gamma * direction, with the largest gamma for which no honest update is further
    away than two honest updates are from each other. The paper searches for gamma; here it is
    solved for.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P, direction_P = honest_HP.mean(0), _direction(honest_HP, settings.direction)
    row_P = mean_P + reach_within(honest_HP, direction_P) * direction_P
    return sent_by_all(row_P, updates_NP, malicious_N, threat, settings.jitter)


def reach_within(rows_HP: Tensor, direction_P: Tensor) -> Tensor:
    """The largest g, ``()``, for which mean + g * direction is as near to all rows as any two are.

    A direction of zeros gives 0.
    """
    offset_HP = rows_HP.mean(0) - rows_HP
    widest = torch.cdist(offset_HP, offset_HP, compute_mode="use_mm_for_euclid_dist").max().double().square()
    # |offset + gamma direction|^2 <= widest holds for every row up to the smallest positive root of
    # the quadratics
    a = direction_P.double().square().sum()
    if a == 0:
        return direction_P.new_zeros(())
    b_H = (offset_HP @ direction_P).double()
    c_H = offset_HP.double().square().sum(1) - widest
    return ((-b_H + (b_H.square() - a * c_H).clamp_min(0).sqrt()) / a).min().to(direction_P.dtype)


@ATTACKS.register("min-sum", settings=Direction)
def min_sum(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Direction) -> Tensor:
    """Min-Sum (Shejwalkar & Houmansadr, NDSS 2021, section IV-B).

    All send mean + gamma * direction, with the largest gamma for which the sum of squared distances
    to the honest updates is no larger than that of any honest update. With H honest updates u and
    their mean m, the sum from a point x is H |x - m|^2 + sum |u - m|^2, so that gamma * |direction|
    is the largest distance of an honest update from the mean.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P, direction_P = honest_HP.mean(0), _direction(honest_HP, settings.direction)
    length = torch.linalg.vector_norm(direction_P.double())
    furthest = torch.linalg.vector_norm((honest_HP - mean_P).double(), dim=1).max()
    gamma = furthest / length if length > 0 else torch.zeros_like(length)
    row_P = mean_P + gamma.to(mean_P.dtype) * direction_P
    return sent_by_all(row_P, updates_NP, malicious_N, threat, settings.jitter)


def _direction(honest_HP: Tensor, kind: str) -> Tensor:
    """The perturbations of Shejwalkar & Houmansadr: minus the deviation, the mean or its sign."""
    if kind == "std":
        return -honest_HP.std(0)
    mean_P = honest_HP.mean(0)
    return -mean_P.sign() if kind == "sign" else -F.normalize(mean_P, dim=0)


@ATTACKS.register("lie", settings=Jitter)
def lie(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Jitter) -> Tensor:
    """A Little Is Enough (Baruch et al., NeurIPS 2019, algorithm 3), against convergence.

    All send mean - z * std of the honest updates.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    row_P = honest_HP.mean(0) - largest_z(malicious_N) * honest_HP.std(0)
    return sent_by_all(row_P, updates_NP, malicious_N, threat, settings.jitter)


def clipped_to_band(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """The malicious clients' own updates, ``(F, P)``, clipped to the honest mean +- z * std."""
    own_FP, honest_HP = updates_NP[malicious_N], updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return own_FP
    mean_P, reach_P = honest_HP.mean(0), max(largest_z(malicious_N), 0.0) * honest_HP.std(0)
    return own_FP.clamp(mean_P - reach_P, mean_P + reach_P)


def largest_z(malicious_N: Tensor) -> float:
    """Baruch et al.'s z: in each parameter, enough honest clients are expected beyond the
    attackers.

    The attackers need s = floor(N / 2 + 1) - F honest clients to be a majority with them, hence
    Phi(z) = (N - F - s) / (N - F). If the attackers are a majority, z has no bound, and 3 is taken.
    For a single attacker the formula gives a z of 0 or just below.
    """
    num_clients, num_malicious = len(malicious_N), int(malicious_N.sum())
    num_honest = num_clients - num_malicious
    share = (num_honest - (num_clients // 2 + 1 - num_malicious)) / num_honest
    return min(NormalDist().inv_cdf(share), _LARGEST_Z) if 0 < share < 1 else _LARGEST_Z
