"""Fang's attacks on the trimmed mean and on Krum (Fang et al., USENIX Security 2020).

Without an honest update, malicious clients send their own updates.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.federation.attacks.interface import ATTACKS, Threat

__all__ = ["krum", "trim"]

_TRIM_B = 2.0
_KRUM_SMALLEST_STEP = 1e-5
_KRUM_RADIUS = 0.01
_COLUMNS_AT_ONCE = 2**14


@ATTACKS.register("trim")
def trim(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """The trimmed-mean attack (Fang et al., section 4.2.2, full knowledge, b = 2).

    In each parameter, malicious clients send random values beyond an honest extreme: beyond the
    smallest honest value where the honest mean is positive, and beyond the largest where it is
    negative. If that leads away from zero, the values lie up to b times as far from zero as the
    extreme; if it leads towards zero, they lie down to one b-th as far.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    rises_P = honest_HP.mean(0) > 0
    extreme_P = torch.where(rises_P, honest_HP.min(0).values, honest_HP.max(0).values)
    # The values lie on the side without honest values: below the minimum, or above the maximum.
    outwards_P = torch.where(extreme_P * torch.where(rises_P, -1, 1) > 0, _TRIM_B, 1 / _TRIM_B)
    share_FP = torch.rand(int(malicious_N.sum()), updates_NP.shape[1], generator=threat.generator).to(updates_NP)
    return extreme_P + share_FP * (outwards_P - 1) * extreme_P


@ATTACKS.register("krum")
def krum(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """The Krum attack (Fang et al., USENIX Security 2020, section 4.2.1, full knowledge).

    Let s be the sign of the honest mean (0 where that is 0). One malicious client sends
    -lambda * s. The others send the same plus a random vector of length 0.01 each, so that they are
    each other's nearest neighbours.
    Lambda starts at the bound of theorem 1 and is halved until Krum picks one of them, or until it
    is below 1e-5.

    All candidates are sums of the same vectors, so that their distances follow from one float64
    Gram matrix, and the cost of a halving does not depend on P.
    """
    honest_HP = updates_NP[~malicious_N]
    if len(honest_HP) == 0:
        return updates_NP[malicious_N]
    num_malicious = int(malicious_N.sum())
    sign_P = honest_HP.mean(0).sign()
    noise_FP = torch.randn(num_malicious, len(sign_P), generator=threat.generator).to(updates_NP)
    nearby_FP = _KRUM_RADIUS * F.normalize(noise_FP, dim=1)
    nearby_FP[0] = 0
    gram = _gram([honest_HP, nearby_FP, sign_P[None]])
    step = _krum_bound(gram, len(honest_HP), num_malicious)
    while math.isfinite(step) and step >= _KRUM_SMALLEST_STEP and not _krum_picks_malicious(gram, num_malicious, step):
        step /= 2
    return nearby_FP - step * sign_P


def _gram(blocks: list[Tensor]) -> Tensor:
    """The inner products of all V rows of the ``(_, P)`` blocks, ``(V, V)`` float64."""
    num_rows = sum(len(block) for block in blocks)
    gram_VV = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=blocks[0].device)
    for columns in zip(*(block.split(_COLUMNS_AT_ONCE, dim=1) for block in blocks), strict=True):
        rows = torch.cat(columns).double()
        gram_VV.addmm_(rows, rows.T)
    return gram_VV


def _krum_bound(gram_VV: Tensor, num_honest: int, num_malicious: int) -> float:
    """The bound on lambda (Fang et al., theorem 1).

    If all malicious updates are alike, Krum picks none of them beyond this bound. If there are
    enough malicious clients that Krum looks only at distances among them, the theorem gives no
    bound. One honest neighbour is counted then.
    """
    neighbours = max(num_honest - 2, 1)
    distances_HH = _squared_distances(gram_VV[:num_honest, :num_honest])
    smallest_score = distances_HH.sort(1).values[:, :neighbours].nan_to_num(posinf=0).sum(1).min()
    num_signs = gram_VV[-1, -1].clamp_min(1)
    honest_neighbours = max(num_honest - num_malicious - 1, 1)
    furthest = gram_VV.diagonal()[:num_honest].max().sqrt()
    return float((smallest_score / (honest_neighbours * num_signs)).sqrt() + furthest / num_signs.sqrt())


def _krum_picks_malicious(gram_VV: Tensor, num_malicious: int, step: float) -> bool:
    """Whether Krum picks a malicious client if all of them move by ``step`` against the sign.

    Krum (Blanchard et al., NeurIPS 2017) picks the client with the smallest sum of squared
    distances to its N - F - 2 nearest.
    """
    num_clients = len(gram_VV) - 1
    # This matrix maps the rows of V, the last of which is s, to what the clients send.
    mixing_NV = torch.eye(num_clients, num_clients + 1, dtype=gram_VV.dtype, device=gram_VV.device)
    mixing_NV[-num_malicious:, -1] = -step
    distances_NN = _squared_distances(mixing_NV @ gram_VV @ mixing_NV.T)
    neighbours = max(num_clients - num_malicious - 2, 1)
    scores_N = distances_NN.topk(neighbours, largest=False).values.sum(1)
    return int(scores_N.argmin()) >= num_clients - num_malicious


def _squared_distances(gram_NN: Tensor) -> Tensor:
    """The squared distance of each two rows, from inner products; inf from a row to itself."""
    squares_N = gram_NN.diagonal()
    return (squares_N[:, None] + squares_N - 2 * gram_NN).clamp_min(0).fill_diagonal_(math.inf)
