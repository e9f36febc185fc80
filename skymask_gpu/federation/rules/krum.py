"""Krum and what is built on it: Multi-Krum and Bulyan.

f is the number of rows that are assumed malicious, n that of all rows.
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
    to it. The paper wants n >= 2f + 3; with more malicious rows the rule goes on, with at least one
    neighbour.
    """
    best = krum_scores(updates_MP, info.num_malicious).argmin()
    return RuleResult(updates_MP[best].clone(), torch.arange(len(updates_MP), device=updates_MP.device) == best)


@RULES.register("multi-krum")
@needs_clients(2)
def multi_krum(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """Multi-Krum (Blanchard et al., NeurIPS 2017): the mean of the m = n - f updates with the
    smallest Krum scores.

    All rows are scored once, as in the paper; some libraries choose one row at a time and score the
    others anew. At least one row is kept.
    """
    num_kept = max(1, len(updates_MP) - info.num_malicious)
    kept_M = torch.zeros(len(updates_MP), dtype=torch.bool, device=updates_MP.device)
    kept_M[krum_scores(updates_MP, info.num_malicious).argsort(stable=True)[:num_kept]] = True
    return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)


@RULES.register("bulyan")
@needs_clients(4)
def bulyan(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """Bulyan on Krum (El Mhamdi et al., ICML 2018).

    Krum chooses theta = n - 2f rows one after the other, each time among those not yet chosen, r of
    them, with r - f - 2 neighbours (at least one). Of each coordinate the beta = theta - 2f chosen
    values nearest their median are averaged.

    Raises:
        ValueError: f > 0 and n < 4f + 3.
    """
    num_rows, num_malicious = len(updates_MP), info.num_malicious
    # without malicious rows everyone is chosen, and there is nothing to protect
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
    """``(M,)`` float64."""
    num_neighbours = _num_neighbours(len(updates_MP), num_malicious)
    # the first of each row is its distance to itself
    return squared_distances(updates_MP).sort(1).values[:, 1 : num_neighbours + 1].sum(1)


def _num_neighbours(num_rows: int, num_malicious: int) -> int:
    return min(max(num_rows - num_malicious - 2, 1), num_rows - 1)


def _chosen_by_krum(distances_MM: Tensor, num_malicious: int, num_chosen: int) -> Tensor:
    """``(num_chosen,)`` row numbers. Distances are sorted once; a chosen row is then taken out of
    the others' lists.
    """
    left_R = torch.arange(len(distances_MM), device=distances_MM.device)
    # rows that are equal have distance 0, too: -1 puts a row itself first in its list
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
    """``(p,)`` mean of the values of each column that are nearest the column's median; of two as
    near the smaller one first.
    """
    sorted_Tp = values_Tp.sort(0).values
    median_p = (sorted_Tp[(len(sorted_Tp) - 1) // 2] + sorted_Tp[len(sorted_Tp) // 2]) / 2
    nearest = (sorted_Tp - median_p).abs().sort(dim=0, stable=True).indices[:num_averaged]
    return sorted_Tp.gather(0, nearest).mean(0)
