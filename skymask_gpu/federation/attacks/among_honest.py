"""Attackers who stay among the honest updates: Mimic, STRIKE, ROP and the hybrid sparse attack.

All malicious clients send the same, unless a jitter parts them. They know the honest updates. Where
an attack needs more of them than there are (one for ``rop`` and ``mimic``, else two), malicious
clients send their own updates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat
from skymask_gpu.federation.attacks.shifts import Jitter, largest_z, reach_within, sent_by_all
from skymask_gpu.federation.choices import above_zero, positive_share

__all__ = ["HybridSparse", "Mimic", "Rop", "Strike", "hybrid_sparse", "rop", "strike"]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class Mimic(Jitter):
    """Settings of ``mimic``.

    Attributes:
        warmup: the number of rounds in which the direction of the largest spread is learnt.
        jitter: see :class:`Jitter`.
    """

    warmup: int = 20

    def __post_init__(self) -> None:
        Jitter.__post_init__(self)
        if self.warmup < 1:
            raise ValueError(f"attack.warmup must be at least 1, got {self.warmup!r}")


@ATTACKS.register("mimic", settings=Mimic)
class CopyOneHonest(Attack):
    """Mimic (Karimireddy, He & Jaggi, ICLR 2022, section 4 and appendix B).

    All send the update of the honest client i with the largest |<z, u_i - m>|. There is no
    deviation to detect, but one client counts F + 1 times, and clients unlike it are starved. In
    the t-th of the warm-up rounds, counted from 1, Oja's rule updates

        m <- (t - 1)/t m + 1/t mean_i u_i,
        z <- (t - 1)/t z + 1/t sum_i <u_i - m, z> (u_i - m),  scaled to length 1,

    from m = 0 and a random z. Later, m and z stay. The client is chosen anew in each round.
    """

    def __init__(self, context: AttackContext, settings: Mimic) -> None:
        self._settings = settings
        self._state: dict[str, Tensor] = {}

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        honest_HP = updates_NP[~malicious_N]
        if len(honest_HP) == 0:
            return updates_NP[malicious_N]
        state = self._state
        if not state:
            axis_P = torch.randn(honest_HP.shape[1], generator=threat.generator).to(honest_HP)
            state = {
                "axis": axis_P / torch.linalg.vector_norm(axis_P),
                "mean": torch.zeros_like(axis_P),
                "rounds": torch.zeros((), dtype=torch.long, device=axis_P.device),
            }
        if int(state["rounds"]) < self._settings.warmup:
            state = _one_round_of_oja(state, honest_HP)
        self._state = state
        chosen = ((honest_HP - state["mean"]) @ state["axis"]).abs().argmax()
        return sent_by_all(honest_HP[chosen], updates_NP, malicious_N, threat, self._settings.jitter)

    def state(self) -> dict[str, Tensor]:
        return self._state

    def restore(self, state: dict[str, Tensor]) -> None:
        self._state = state


def _one_round_of_oja(state: dict[str, Tensor], honest_HP: Tensor) -> dict[str, Tensor]:
    rounds = state["rounds"] + 1
    new = 1 / float(rounds)
    mean_P = (1 - new) * state["mean"] + new * honest_HP.mean(0)
    centred_HP = honest_HP - mean_P
    axis_P = (1 - new) * state["axis"] + new * ((centred_HP @ state["axis"]) @ centred_HP)
    return {"axis": axis_P / torch.linalg.vector_norm(axis_P).clamp_min(_TINY), "mean": mean_P, "rounds": rounds}


@dataclass(frozen=True, kw_only=True)
class Strike(Jitter):
    """Settings of ``strike``.

    Attributes:
        strength: the share of the largest allowed step that is taken, nu in the paper.
        jitter: see :class:`Jitter`.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        Jitter.__post_init__(self)
        above_zero("attack.strength", self.strength)


@ATTACKS.register("strike", settings=Strike)
def strike(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Strike) -> Tensor:
    """STRIKE (Liu et al., AAAI 2025, arXiv 2502.04890); made for clients with unlike data.

    Honest updates of unlike clients are skewed: a dense group of them lies to one side of the mean.
    Let u be their coordinate-wise median minus their mean, which points to this group, and S the
    n - 2 f honest clients (at least two) that are furthest along u. All send

        m_S + nu alpha sign(m_S) * s_S,

    with the mean and the standard deviation of S, and the largest alpha for which no client of S is
    further away than two of them are from each other.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    size = min(max(2, len(malicious_N) - 2 * int(malicious_N.sum())), len(honest_HP))
    sorted_HP = honest_HP.sort(0).values
    median_P = (sorted_HP[(len(honest_HP) - 1) // 2] + sorted_HP[len(honest_HP) // 2]) / 2
    along_H = honest_HP @ (median_P - honest_HP.mean(0))
    skewed_SP = honest_HP[along_H.argsort(descending=True, stable=True)[:size]]
    mean_P = skewed_SP.mean(0)
    direction_P = mean_P.sign() * skewed_SP.std(0)
    row_P = mean_P + settings.strength * reach_within(skewed_SP, direction_P) * direction_P
    return sent_by_all(row_P, updates_NP, malicious_N, threat, settings.jitter)


@dataclass(frozen=True, kw_only=True)
class Rop(Jitter):
    """Settings of ``rop``.

    Attributes:
        reach: how far from the reference they go; z in the paper.
        angle: the angle between the reference and the step from it, in degrees.
        memory: the weight of the last global step in the reference, lambda in the paper.
        jitter: see :class:`Jitter`.
    """

    reach: float = 1.0
    angle: float = 90.0
    memory: float = 0.9

    def __post_init__(self) -> None:
        Jitter.__post_init__(self)
        above_zero("attack.reach", self.reach)
        if not 0 <= self.angle <= 180:
            raise ValueError(f"attack.angle must be from 0 to 180 degrees, got {self.angle!r}")
        if not 0 <= self.memory <= 1:
            raise ValueError(f"attack.memory must be from 0 to 1, got {self.memory!r}")


@ATTACKS.register("rop", settings=Rop)
def rop(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Rop) -> Tensor:
    """Relocated orthogonal perturbation, ROP (Ozfatura et al., arXiv 2208.09894).

    The reference is r = lambda h + (1 - lambda) m, with the last global step h and the honest mean
    m; it is m where there was no step yet. All send r + z (cos t r' + sin t p'), with r' and p' of
    length 1 along r and along a random direction orthogonal to it. It is made against momentum and
    clipping around the last step. h is the model's change; with a ``server_lr`` other than 1, it is
    that multiple of the last aggregate.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    reference_P = honest_HP.mean(0)
    if threat.global_params is not None and threat.previous_params is not None:
        step_P = (threat.global_params - threat.previous_params).to(reference_P)
        reference_P = settings.memory * step_P + (1 - settings.memory) * reference_P
    along_P = reference_P / torch.linalg.vector_norm(reference_P).clamp_min(torch.finfo(reference_P.dtype).tiny)
    across_P = torch.randn(along_P.shape, generator=threat.generator).to(along_P)
    across_P = across_P - (across_P @ along_P) * along_P
    across_P = across_P / torch.linalg.vector_norm(across_P).clamp_min(torch.finfo(across_P.dtype).tiny)
    angle = math.radians(settings.angle)
    row_P = reference_P + settings.reach * (math.cos(angle) * along_P + math.sin(angle) * across_P)
    return sent_by_all(row_P, updates_NP, malicious_N, threat, settings.jitter)


@dataclass(frozen=True, kw_only=True)
class HybridSparse(Jitter):
    """Settings of ``hybrid-sparse``.

    Attributes:
        params_share: the share of the parameters, the most sensitive ones, that are hit hard.
        strong_z: how many standard deviations they are moved there.
        jitter: see :class:`Jitter`.
    """

    params_share: float = 0.01
    strong_z: float = 10.0

    def __post_init__(self) -> None:
        Jitter.__post_init__(self)
        positive_share("attack.params_share", self.params_share)
        above_zero("attack.strong_z", self.strong_z)


@ATTACKS.register("hybrid-sparse", settings=HybridSparse)
def hybrid_sparse(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: HybridSparse) -> Tensor:
    """Hybrid sparse attack (Ozfatura et al., arXiv 2404.06230): aggressive in few parameters.

    All send m - z s, with the honest mean m and standard deviation s, as in A Little Is Enough. In
    the parameters that a pruning score finds most sensitive, z is large; elsewhere it is the
    largest that hides among the honest clients. The paper prunes with FORCE on the attackers' own
    samples. Here the score is |w * m|, that of SNIP (Lee et al., ICLR 2019), which FORCE repeats,
    with the honest mean for the gradient; outside of a run, without a model, it is |m|.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P = honest_HP.mean(0)
    score_P = mean_P.abs() if threat.global_params is None else (threat.global_params * mean_P).abs()
    num_hit = max(1, round(settings.params_share * len(mean_P)))
    z_P = torch.full_like(mean_P, largest_z(malicious_N))
    z_P[score_P.argsort(descending=True, stable=True)[:num_hit]] = settings.strong_z
    return sent_by_all(mean_P - z_P * honest_HP.std(0), updates_NP, malicious_N, threat, settings.jitter)
