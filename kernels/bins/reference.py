"""Plain twins of the bins, in PyTorch: what the compiled versions are compared with."""

import torch
from torch import Tensor

__all__ = ["GUARD", "WIDEST_GAP", "bin_edges_reference", "bin_rows_reference", "bin_step_reference"]

# A gap between two sampled values counts as at most this many interquartile ranges. Without a limit
# a column with outliers would spend its bins on the empty space before them.
WIDEST_GAP = 2.0
# The two bins for outliers begin this many interquartile ranges beyond the sampled range.
GUARD = 1.0


def bin_edges_reference(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    """Plain twin of :func:`bin_edges`; in float64 if the rows are."""
    sorted_SP = rows_RP[sampled_S].to(torch.promote_types(rows_RP.dtype, torch.float32)).sort(0).values
    num_sampled = len(sorted_SP)
    lowest_P, highest_P = sorted_SP[0], sorted_SP[-1]
    spread_P = sorted_SP[3 * (num_sampled - 1) // 4] - sorted_SP[(num_sampled - 1) // 4]
    spread_P = torch.where(spread_P > 0, spread_P, highest_P - lowest_P)
    reached_SP = torch.zeros_like(sorted_SP)
    reached_SP[1:] = torch.minimum(sorted_SP.diff(dim=0), WIDEST_GAP * spread_P).sqrt().cumsum(0)
    edges = [lowest_P - GUARD * spread_P]
    for inner in range(1, num_bins - 2):
        target_P = reached_SP[-1] * (inner / (num_bins - 2))
        after_P = (reached_SP < target_P).sum(0).clamp(1 if num_sampled > 1 else 0, num_sampled - 1)
        around_2P = torch.stack([(after_P - 1).clamp_min(0), after_P])
        lower_P, upper_P = sorted_SP.gather(0, around_2P)
        before_P, reached_P = reached_SP.gather(0, around_2P)
        share_P = torch.where(reached_P > before_P, (reached_P - target_P) / (reached_P - before_P), 0.0)
        edge_P = upper_P - (upper_P - lower_P) * share_P
        edges.append(torch.where(edge_P > edges[-1], edge_P, edges[-1]))
    edges.append(highest_P + GUARD * spread_P)
    return torch.stack(edges)


def bin_rows_reference(rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, ends_2P: Tensor) -> None:
    """Plain twin of :func:`bin_rows`."""
    rows_RP = rows_RP.to(sums_BP.dtype)
    bin_RP = sum((rows_RP >= edge_P).long() for edge_P in edges_EP)
    counts = counts_BP.long().scatter_add_(0, bin_RP, torch.ones_like(bin_RP))
    counts_BP.copy_(counts)
    sums_BP.scatter_add_(0, bin_RP, rows_RP)
    ends_2P[0] = torch.minimum(ends_2P[0], rows_RP.min(0).values)
    ends_2P[1] = torch.maximum(ends_2P[1], rows_RP.max(0).values)


def bin_step_reference(
    logits_BP: Tensor, centres_BP: Tensor, counts_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`bin_step`."""
    gates_BP = torch.sigmoid(logits_BP)
    gradient_BP = slope_P * (gates_BP * (1 - gates_BP)) * (centres_BP - mean_P)
    logits_BP -= gradient_BP.clamp(-1, 1) * full_step
    weighted_BP = torch.sigmoid(logits_BP) * counts_BP.to(logits_BP.dtype)
    return weighted_BP.sum(0), (weighted_BP * centres_BP).sum(0)
