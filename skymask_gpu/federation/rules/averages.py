"""Rules that judge nobody: the mean, the medians and the trimmed mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult, takes_any_row
from skymask_gpu.federation.rules.rows import column_blocks, squared_distances_to, weighted_sum

__all__ = ["SkipZeros", "fedavg", "geometric_median", "median", "trimmed_mean"]

_SMOOTHING = 1e-6
_MOST_STEPS = 100
_TOLERANCE = 1e-7


@dataclass(frozen=True, kw_only=True)
class SkipZeros:
    """Settings of ``fedavg`` and ``median``.

    Attributes:
        skip_zeros: each coordinate is averaged over the rows that are not exactly 0 there, and is 0
            if there are none. Clients that mask or prune their updates send zeros that say nothing
            about the coordinate.
    """

    skip_zeros: bool = False


@RULES.register("fedavg", settings=SkipZeros)
@takes_any_row
def fedavg(updates_MP: Tensor, info: RoundInfo, settings: SkipZeros) -> RuleResult:
    """The mean with equal weights (McMahan et al., AISTATS 2017).

    NaN and Inf in an update are not removed, so they reach the mean.
    """
    mean_P = _mean_without_zeros(updates_MP) if settings.skip_zeros else updates_MP.mean(0)
    return RuleResult(mean_P.to(updates_MP.dtype), updates_MP.new_ones(len(updates_MP)).bool())


@RULES.register("median", settings=SkipZeros)
def median(updates_MP: Tensor, info: RoundInfo, settings: SkipZeros) -> RuleResult:
    """The coordinate-wise median (Yin et al., ICML 2018).

    If the number of values is even, it is the mean of the two in the middle.
    """
    median_P = _median_without_zeros(updates_MP) if settings.skip_zeros else _coordinate_median(updates_MP)
    return RuleResult(median_P.to(updates_MP.dtype), None)


@RULES.register("trimmed-mean")
def trimmed_mean(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """The coordinate-wise trimmed mean (Yin et al., ICML 2018).

    In each coordinate, the f smallest and the f largest of the n values are left out, and the
    others are averaged. At most (n - 1) // 2 values are left out at each end.
    """
    num_rows = len(updates_MP)
    trim = min(info.num_malicious, (num_rows - 1) // 2)
    parts = [block.sort(0).values[trim : num_rows - trim].mean(0) for block in column_blocks(updates_MP)]
    return RuleResult(torch.cat(parts).to(updates_MP.dtype), None)


@RULES.register("geometric-median")
def geometric_median(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """The geometric median, computed by the smoothed Weiszfeld algorithm.

    This is the rule RFA (Pillutla et al., IEEE Trans. Signal Processing 2022). Each step takes a
    weighted mean of the updates as the next point. An update's weight is 1 / max(nu, d), where d is
    its distance to the present point and nu = 1e-6. The first point is the coordinate-wise median.
    The algorithm ends after 100 steps, or when the length of a step is at most 1e-7 of the length
    of the point.
    """
    point_P = _coordinate_median(updates_MP)
    for _ in range(_MOST_STEPS):
        weights_M = 1 / squared_distances_to(updates_MP, point_P).sqrt().clamp_min(_SMOOTHING)
        before_P, point_P = point_P, weighted_sum(updates_MP, weights_M / weights_M.sum())
        if torch.linalg.vector_norm(point_P - before_P) <= _TOLERANCE * torch.linalg.vector_norm(point_P):
            break
    return RuleResult(point_P.to(updates_MP.dtype), None)


def _coordinate_median(updates_MP: Tensor) -> Tensor:
    """The median of each coordinate, ``(P,)`` float64."""
    lower, upper = (len(updates_MP) - 1) // 2, len(updates_MP) // 2
    parts = []
    for block in column_blocks(updates_MP):
        sorted_Mp = block.sort(0).values
        parts.append((sorted_Mp[lower] + sorted_Mp[upper]) / 2)
    return torch.cat(parts)


def _mean_without_zeros(updates_MP: Tensor) -> Tensor:
    """The mean of the values of each coordinate that are not 0, ``(P,)`` float64; 0 without any."""
    return torch.cat([block.sum(0) / (block != 0).sum(0).clamp_min(1) for block in column_blocks(updates_MP)])


def _median_without_zeros(updates_MP: Tensor) -> Tensor:
    """The median of the values of each coordinate that are not 0, ``(P,)`` float64; 0 without any.

    The rows are finite.
    """
    parts = []
    for block in column_blocks(updates_MP):
        count_1p = (block != 0).sum(0, keepdim=True)
        # Infinity sorts behind all other values, so the first count_1p ones are those that are
        # not 0.
        sorted_Mp = block.masked_fill(block == 0, torch.inf).sort(0).values
        lower_1p, upper_1p = (count_1p - 1).clamp_min(0) // 2, (count_1p // 2).clamp_max(len(block) - 1)
        middle_1p = (sorted_Mp.gather(0, lower_1p) + sorted_Mp.gather(0, upper_1p)) / 2
        parts.append(middle_1p.masked_fill(count_1p == 0, 0)[0])
    return torch.cat(parts)
