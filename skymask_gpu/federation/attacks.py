"""Model poisoning: what malicious clients send instead of their honest updates, all at once on the (N, P) matrix.

The attacker controls the malicious clients and knows the updates of all others (full knowledge, the strongest threat model).
"""

import torch
from torch import Tensor

__all__ = ["ATTACKS", "attack"]


def attack(name: str, updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """A new ``(N, P)`` matrix in which the malicious rows are replaced.

    Args:
        name: one of ``ATTACKS``.
        updates_NP: what every client would send if it were honest.
        malicious_N: ``(N,)`` bool.

    Raises:
        ValueError: unknown name.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack.name must be one of {', '.join(ATTACKS)}, got {name!r}")
    if not malicious_N.any():
        return updates_NP
    poisoned_NP = updates_NP.clone()
    poisoned_NP[malicious_N] = ATTACKS[name](updates_NP, malicious_N)
    return poisoned_NP


def _none(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    return updates_NP[malicious_N]


def _sign_flip(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """Each malicious client sends the negative of its own honest update."""
    return -updates_NP[malicious_N]


def _min_max(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """Min-Max (Shejwalkar & Houmansadr, NDSS 2021, section IV-B), direction "inverse standard deviation".

    All send mean - gamma * std of the honest updates, with the largest gamma for which no honest update is further away than
    two honest updates are from each other.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P = honest_HP.mean(0)
    direction_P = -honest_HP.std(0)
    offset_HP = mean_P - honest_HP
    widest = torch.cdist(offset_HP, offset_HP, compute_mode="use_mm_for_euclid_dist").max().double().square()
    # |offset + gamma direction|^2 <= widest for every honest client: the smallest positive root of the quadratics
    a = direction_P.double().square().sum()
    if a == 0:
        return mean_P.expand(int(malicious_N.sum()), -1)
    b_H = (offset_HP @ direction_P).double()
    c_H = offset_HP.double().square().sum(1) - widest
    gamma = ((-b_H + (b_H.square() - a * c_H).clamp_min(0).sqrt()) / a).min()
    return (mean_P + gamma.to(mean_P.dtype) * direction_P).expand(int(malicious_N.sum()), -1)


ATTACKS = {"none": _none, "min-max": _min_max, "sign-flip": _sign_flip}
