"""Model poisoning: what malicious clients send instead of their honest updates, all at once on the (N, P) matrix.

The attacker controls the malicious clients and knows the updates of all others (full knowledge, the strongest threat model).
"""

from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["ATTACKS", "attack"]

_LARGEST_Z = 3.0
_TRIM_B = 2.0


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


def _min_sum(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """Min-Sum (Shejwalkar & Houmansadr, NDSS 2021, section IV-B), direction "inverse standard deviation".

    All send mean - gamma * std of the honest updates, with the largest gamma for which the sum of the squared distances to the
    honest updates is no larger than that of any honest update. With H honest updates u and their mean m, the sum from a point x
    is H |x - m|^2 + sum |u - m|^2, so that gamma * |std| is the largest distance of an honest update from the mean.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    mean_P, direction_P = honest_HP.mean(0), -honest_HP.std(0)
    length = torch.linalg.vector_norm(direction_P.double())
    furthest = torch.linalg.vector_norm((honest_HP - mean_P).double(), dim=1).max()
    gamma = furthest / length if length > 0 else torch.zeros_like(length)
    return (mean_P + gamma.to(mean_P.dtype) * direction_P).expand(int(malicious_N.sum()), -1)


def _lie(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """A Little Is Enough (Baruch et al., NeurIPS 2019, algorithm 3), the form that prevents convergence.

    All send mean - z * std of the honest updates. z is such that, for each parameter, as many honest clients are expected
    beyond it as the attackers need to be a majority together: Phi(z) = (N - f - s) / (N - f) with s = floor(N / 2 + 1) - f,
    of N clients, f of them malicious. From a majority of attackers on z has no bound; it is 3 then.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) < 2:
        return updates_NP[malicious_N]
    num_clients, num_malicious = len(malicious_N), int(malicious_N.sum())
    supporters = num_clients // 2 + 1 - num_malicious
    share = (num_clients - num_malicious - supporters) / (num_clients - num_malicious)
    z = min(NormalDist().inv_cdf(share), _LARGEST_Z) if 0 < share < 1 else _LARGEST_Z
    return (honest_HP.mean(0) - z * honest_HP.std(0)).expand(num_malicious, -1)


def _trim(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """The trimmed-mean attack (Fang et al., USENIX Security 2020, section 4.2.2, full knowledge), b = 2.

    Each parameter is drawn beyond the honest extreme that lies against the sign of the honest mean, up to b times as far from
    zero, or b times as near where the extreme has the other sign. The draws are the same each time.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    rises_P = honest_HP.mean(0) > 0
    extreme_P = torch.where(rises_P, honest_HP.min(0).values, honest_HP.max(0).values)
    # away from the other honest values: below a minimum, above a maximum
    outwards_P = torch.where(extreme_P * torch.where(rises_P, -1, 1) > 0, _TRIM_B, 1 / _TRIM_B)
    generator = torch.Generator().manual_seed(0)
    share_FP = torch.rand(int(malicious_N.sum()), updates_NP.shape[1], generator=generator).to(updates_NP)
    return extreme_P + share_FP * (outwards_P - 1) * extreme_P


def _scaling(updates_NP: Tensor, malicious_N: Tensor) -> Tensor:
    """Model replacement's scaling (Bagdasaryan et al., AISTATS 2020, section 4.2): its own update times N / f.

    N clients, f of them malicious: in the mean of all, the malicious updates then count as if nobody else had sent any.
    """
    return updates_NP[malicious_N] * (len(malicious_N) / int(malicious_N.sum()))


ATTACKS = {
    "none": _none,
    "lie": _lie,
    "min-max": _min_max,
    "min-sum": _min_sum,
    "scaling": _scaling,
    "sign-flip": _sign_flip,
    "trim": _trim,
}
