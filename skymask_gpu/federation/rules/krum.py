"""Krum, and the two rules that are built on it: Multi-Krum and Bulyan.

There are n rows, and f of them are assumed to be malicious.
"""

import torch
from torch import Tensor

from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult, needs_clients
from skymask_gpu.federation.rules.rows import column_blocks, mean_of_kept, squared_distances

__all__ = ["bulyan", "krum", "multi_krum"]


@RULES.register("krum")
@needs_clients(2)
def krum(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """Krum (Blanchard et al., NeurIPS 2017): the one update with the smallest score.

    A row's score is the sum of the squared distances to the n - f - 2 other rows that are nearest
    to it. The paper requires n >= 2f + 3. With more malicious rows the rule still works here, and
    it uses at least one neighbour.
    """
    best = krum_scores(updates_MP, info.num_malicious).argmin()
    return RuleResult(updates_MP[best].clone(), torch.arange(len(updates_MP), device=updates_MP.device) == best)


@RULES.register("multi-krum")
@needs_clients(2)
def multi_krum(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """Multi-Krum (Blanchard et al., NeurIPS 2017): the mean of several updates that Krum prefers.

    These are the m = n - f updates with the smallest Krum scores; at least one is kept. All rows
    are scored once, as in the paper. Some libraries choose one row at a time and score the others
    again after each choice.
    """
    num_kept = max(1, len(updates_MP) - info.num_malicious)
    kept_M = torch.zeros(len(updates_MP), dtype=torch.bool, device=updates_MP.device)
    kept_M[krum_scores(updates_MP, info.num_malicious).argsort(stable=True)[:num_kept]] = True
    return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)


@RULES.register("bulyan")
@needs_clients(4)
def bulyan(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """Bulyan on Krum (El Mhamdi et al., ICML 2018).

    Krum chooses theta = n - 2f rows one after the other. While r rows are not yet chosen, it scores
    them among themselves with r - f - 2 neighbours (at least one). In each coordinate, the
    beta = theta - 2f chosen values that are nearest to their median are then averaged.

    Raises:
        ValueError: f > 0 and n < 4f + 3.
    """
    num_rows, num_malicious = len(updates_MP), info.num_malicious
    # Without malicious rows, all rows are chosen and there is nothing to protect, so the bound on n
    # does not apply.
    if num_malicious > 0 and num_rows < 4 * num_malicious + 3:
        raise ValueError(
            f"defence.rule 'bulyan' needs at least 4 f + 3 = {4 * num_malicious + 3} clients a round for f = {num_malicious} "
            f"malicious ones, got {num_rows}; use at most f = {max(0, (num_rows - 3) // 4)}, or another rule"
        )
    chosen = _chosen_by_krum(squared_distances(updates_MP), num_malicious, num_rows - 2 * num_malicious)
    num_averaged = num_rows - 4 * num_malicious
    parts = [_mean_around_median(block, num_averaged) for block in column_blocks(updates_MP[chosen])]
    kept_M = torch.zeros(num_rows, dtype=torch.bool, device=updates_MP.device)
    kept_M[chosen] = True
    return RuleResult(torch.cat(parts).to(updates_MP.dtype), kept_M)


def krum_scores(updates_MP: Tensor, num_malicious: int) -> Tensor:
    """The Krum score of each row, ``(M,)`` float64."""
    num_neighbours = _num_neighbours(len(updates_MP), num_malicious)
    # The smallest distance of each row is the one to itself, which does not belong to the score.
    return squared_distances(updates_MP).sort(1).values[:, 1 : num_neighbours + 1].sum(1)


def _num_neighbours(num_rows: int, num_malicious: int) -> int:
    return min(max(num_rows - num_malicious - 2, 1), num_rows - 1)


def _chosen_by_krum(distances_MM: Tensor, num_malicious: int, num_chosen: int) -> Tensor:
    """The numbers of the chosen rows, ``(num_chosen,)`` int64.

    The distances are sorted only once. A row that was chosen is then removed from the sorted lists
    of the other rows.
    """
    left_R = torch.arange(len(distances_MM), device=distances_MM.device)
    # A row has distance 0 to itself, but also to each row that equals it. The distance -1 puts the
    # row itself first in its own list, from where it is removed.
    sorted_RR, order_RR = distances_MM.clone().fill_diagonal_(-1).sort(1)
    sorted_RR, order_RR = sorted_RR[:, 1:], order_RR[:, 1:]
    chosen = []
    for num_left in range(len(left_R), len(left_R) - num_chosen, -1):
        scores_R = sorted_RR[:, : _num_neighbours(num_left, num_malicious)].sum(1)
        best = left_R[scores_R.argmin()]
        chosen.append(best)
        stays_R = left_R != best
        left_R, sorted_RR, order_RR = left_R[stays_R], sorted_RR[stays_R], order_RR[stays_R]
        stays_RR = order_RR != best
        shape = (num_left - 1, max(0, num_left - 2))
        sorted_RR, order_RR = sorted_RR[stays_RR].view(shape), order_RR[stays_RR].view(shape)
    return torch.stack(chosen)


def _mean_around_median(values_Tp: Tensor, num_averaged: int) -> Tensor:
    """The mean of the values of each column that are nearest to the column's median, ``(p,)``.

    If two values are equally near, the smaller one comes first.
    """
    sorted_Tp = values_Tp.sort(0).values
    median_p = (sorted_Tp[(len(sorted_Tp) - 1) // 2] + sorted_Tp[len(sorted_Tp) // 2]) / 2
    nearest = (sorted_Tp - median_p).abs().sort(dim=0, stable=True).indices[:num_averaged]
    return sorted_Tp.gather(0, nearest).mean(0)
