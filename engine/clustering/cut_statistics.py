"""Statistics of cuts: how well a cut explains the witnesses, and how far apart its sides lie.

There are S cuts of N clients, and F witnesses. A cut is a set of clients, its far side. The share p
of the clients is on the far side and q = 1 - p on the near one. With T the covariance of the
witnesses and d the difference of the sides' means, the linear discriminant W^-1 d with
W = T - p q d d^T separates the sides best (Fisher 1936). With R^2 = p q d^T T^-1 d, the cut leaves
the share 1 - R^2 of the variance along this discriminant.

Shapes: N clients, R = N + 1 rows, F witnesses, S cuts. ``in_N`` is 1.0 for the clients that are
looked at and 0.0 for the others.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.ruling import mean_of
from skymask_gpu.engine.distances import Distances
from skymask_gpu.engine.step_loop import StepLoop

__all__ = ["apart", "effect", "em", "means_of_sides", "nats", "shares", "standard", "starts", "white"]

# The number of EM steps. The results on the stored sets are the same from 20 to 80.
STEPS = 40
# EM starts with each of these shares of the clients as the far side. They are the clients with the
# lowest values of a witness; 0 means a single client.
STARTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
# The variance that a witness must add to those before it, in units of its own variance. Rounding
# leaves about 1e-16.
LEAST_VARIANCE = 1e-8
# The share of the variance that a cut leaves counts as at least this, so that its logarithm is
# finite.
LEAST_LEFT = 1e-6
_TINY = 1e-12


def standard(values_N: Tensor, in_N: Tensor) -> Tensor:
    """The values with mean 0 and variance 1 among the clients looked at, ``(N,)``.

    They are all 0 where all values are equal.
    """
    centred_N = (values_N - mean_of(values_N, in_N)) * in_N
    return centred_N / (centred_N.square().sum() / in_N.sum()).sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def white(columns: list[Tensor], in_N: Tensor) -> Tensor:
    """The span of the columns with the unit matrix as covariance, ``(F, N)``.

    A row is 0 where its column adds nothing to those before it. This is the Gram-Schmidt process,
    so the first rows do not depend on the later columns. It is done twice, because rounding leaves
    the rows of a single pass slightly correlated.
    """
    done: list[Tensor] = []
    for column_N in columns:
        rest_N = standard(column_N, in_N)
        for _ in range(2):
            for white_N in done:
                rest_N = rest_N - mean_of(rest_N * white_N, in_N) * white_N
        variance = mean_of(rest_N.square(), in_N)
        done.append(torch.where(variance > LEAST_VARIANCE, rest_N / variance.clamp_min(LEAST_VARIANCE).sqrt(), 0.0))
    return torch.stack(done)


def starts(columns: list[Tensor], in_N: Tensor) -> Tensor:
    """The far sides that EM starts from, ``(S, N)`` float64: the lowest ``STARTS`` of a column."""
    num_lowest = torch.stack([share * in_N.sum() for share in STARTS]).clamp_min(1.0)
    found = []
    for column_N in columns:
        order_N = column_N.masked_fill(in_N == 0, torch.inf).argsort(stable=True)
        rank_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(1, len(order_N) + 1, device=order_N.device))
        found.append(rank_N <= num_lowest[:, None])
    return torch.cat(found) * in_N


def em(white_FN: Tensor, used_SF: Tensor, far_SN: Tensor, in_N: Tensor) -> Tensor:
    """Two normals with a common covariance: which clients more likely belong to the far one.

    The result is ``(S, N)`` bool. Each cut uses only those witnesses that ``used_SF``, bool, names
    for it. This is the EM algorithm of McLachlan & Peel, Finite Mixture Models, 3.3, with a fixed
    number of steps. The witnesses are white, so T is the unit matrix and
    W^-1 d = d / (1 - p q |d|^2).
    """
    far_SN = far_SN.clone()
    # With the clients looked at as one more row, one product gives the moments and the shares, and
    # another one gives the log odds with their constant part.
    rows_GN, num = torch.cat([white_FN * in_N, in_N[None]]), in_N.sum()

    def step() -> None:
        means_SG = far_SN @ rows_GN.T / num
        p_S = means_SG[:, -1].clamp(_TINY, 1 - _TINY)
        q_S = 1 - p_S
        # This is p times the far side's mean, and also -q times the near side's.
        moment_SF = used_SF * means_SG[:, :-1]
        difference_SF = moment_SF / (p_S * q_S)[:, None]
        between_S = (moment_SF * difference_SF).sum(1)
        left_S = (1 - between_S).clamp_min(LEAST_LEFT)
        constant_S = (p_S / q_S).log() - between_S * (1 / p_S - 1 / q_S) / 2 / left_S
        log_odds_SG = torch.cat([difference_SF / left_S[:, None], constant_S[:, None]], 1)
        torch.mm(log_odds_SG, rows_GN, out=far_SN)
        far_SN.sigmoid_()

    # On a GPU, a step is over twenty small launches, and they are replayed from a graph.
    StepLoop(step, far_SN.device).run(STEPS)
    return far_SN > 0.5


def shares(far_SN: Tensor, in_N: Tensor) -> Tensor:
    """The share p of each far side, ``(S,)``."""
    return (far_SN * in_N).sum(1) / in_N.sum()


def nats(far_SN: Tensor, white_FN: Tensor, used_SF: Tensor, in_N: Tensor) -> Tensor:
    """How unlikely each cut is by chance, given the witnesses that it uses: in nats, ``(S,)``.

    It is 0 where a side is empty, and otherwise -log of a probability, the sum of two parts. The
    log-probability that a given cut of n normal clients leaves as little as 1 - R^2 is
    (n - F - 1) / 2 log(1 - R^2), which is exact for F = 2 and close to it otherwise (the F test of
    Hotelling's T^2). To it, log(n over np) is added for the number of cuts of that size, because
    any of them might have been found.
    """
    num = in_N.sum()
    p_S = shares(far_SN, in_N)
    moment_SF = used_SF * ((far_SN * in_N) @ white_FN.T) / num
    left_S = (1 - moment_SF.square().sum(1) / (p_S * (1 - p_S)).clamp_min(_TINY)).clamp_min(LEAST_LEFT)
    freedom_S = (num - used_SF.sum(1) - 1).clamp_min(0.0)
    num_cuts_S = torch.lgamma(num + 1) - torch.lgamma(num * p_S + 1) - torch.lgamma(num * (1 - p_S) + 1)
    return (-freedom_S / 2 * left_S.log() - num_cuts_S).masked_fill((p_S <= 0) | (p_S >= 1), 0.0)


def effect(values_N: Tensor, far_SN: Tensor, in_N: Tensor) -> Tensor:
    """z, ``(S,)``: how much higher a witness is on the far side than on the near one.

    The unit is the spread of the witness within the sides.
    """
    standard_N = standard(values_N, in_N)
    p_S = shares(far_SN, in_N)
    pq_S = (p_S * (1 - p_S)).clamp_min(_TINY)
    moment_S = (far_SN * in_N) @ standard_N / in_N.sum()
    return moment_S / pq_S / (1 - moment_S.square() / pq_S).clamp_min(LEAST_LEFT).sqrt()


def means_of_sides(values_N: Tensor, far_SN: Tensor, in_N: Tensor) -> tuple[Tensor, Tensor]:
    """The means on the far side and on the near side, ``(S,)`` each.

    The mean of an empty side is NaN, for which neither < nor > holds.
    """
    near_SN = in_N * ~far_SN
    return (far_SN * values_N).sum(1) / far_SN.sum(1), (near_SN * values_N).sum(1) / near_SN.sum(1)


def apart(distances: Distances, far_SN: Tensor, in_N: Tensor) -> Tensor:
    """Squared distance of the sides' centroids over the variance within the sides, ``(S,)``.

    It is 0 on average where the sides do not differ.
    """
    near_SN, far_SN = in_N * ~far_SN, in_N * far_SN
    root_S = in_N.new_zeros(len(far_SN), 1)
    near_SR, far_SR = torch.cat([near_SN, root_S], 1), torch.cat([far_SN, root_S], 1)
    # The matrix of all pairs is read once, and multiplied with as few columns as possible, since
    # nothing else costs as much with many thousands of clients.
    to_all_and_far = distances.times(torch.cat([far_SR, (near_SR + far_SR)[:1]]).T.contiguous()).T
    to_far_SR = to_all_and_far[:-1]
    to_near_SR = to_all_and_far[-1] - to_far_SR
    num_near_S, num_far_S = near_SN.sum(1), far_SN.sum(1)
    # the sums of squares around the centroids
    squares_near_S = (near_SR * to_near_SR).sum(1) / (2 * num_near_S)
    squares_far_S = (far_SR * to_far_SR).sum(1) / (2 * num_far_S)
    between_S = (near_SR * to_far_SR).sum(1) / (num_near_S * num_far_S)
    between_S = between_S - squares_near_S / num_near_S - squares_far_S / num_far_S
    variance_S = (squares_near_S + squares_far_S) / (in_N.sum() - 2)
    return between_S / variance_S - 1 / num_near_S - 1 / num_far_S
