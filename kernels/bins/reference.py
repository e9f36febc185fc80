"""Plain twins of the bins, in PyTorch: what the compiled versions are compared with."""

import torch
from torch import Tensor

__all__ = [
    "GUARD",
    "MOST_MOVED",
    "WIDEST_GAP",
    "bin_edges_reference",
    "bin_rows_reference",
    "bin_step_reference",
    "bin_weights_reference",
]

# A gap between two sampled values counts as at most this many interquartile ranges. Without a limit
# a column with outliers would spend its bins on the empty space before them.
WIDEST_GAP = 2.0
# The two bins for outliers begin this many interquartile ranges beyond the sampled range.
GUARD = 1.0
# At most this share of a bin's weight moves to its neighbours. More would be right only for rows
# that lie further from their mean than the neighbours do, whose gates no neighbour can tell.
MOST_MOVED = 0.5


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


def bin_rows_reference(
    rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, ends_2P: Tensor
) -> None:
    """Plain twin of :func:`bin_rows`."""
    rows_RP = rows_RP.to(sums_BP.dtype)
    bin_RP = sum((rows_RP >= edge_P).long() for edge_P in edges_EP)
    counts = counts_BP.long().scatter_add_(0, bin_RP, torch.ones_like(bin_RP))
    counts_BP.copy_(counts)
    sums_BP.scatter_add_(0, bin_RP, rows_RP)
    squares_BP.scatter_add_(0, bin_RP, (rows_RP - edges_EP[len(edges_EP) // 2]).square())
    ends_2P[0] = torch.minimum(ends_2P[0], rows_RP.min(0).values)
    ends_2P[1] = torch.maximum(ends_2P[1], rows_RP.max(0).values)


def bin_weights_reference(counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, edges_EP: Tensor, ends_2P: Tensor) -> None:
    """Plain twin of :func:`bin_weights`."""
    rows_BP = counts_BP.to(sums_BP.dtype)
    mean_BP = sums_BP / rows_BP.clamp_min(1)
    variance_BP = squares_BP / rows_BP.clamp_min(1) - (mean_BP - edges_EP[len(edges_EP) // 2]).square()
    empty_BP = torch.cat([ends_2P[:1], edges_EP[:-1] / 2 + edges_EP[1:] / 2, ends_2P[1:]])
    sums_BP.copy_(torch.where(rows_BP > 0, mean_BP, empty_BP))
    # The neighbours get as much as keeps the column's sum, and adds the bin's variance to it.
    below_IP, above_IP = sums_BP.diff(dim=0)[:-1], sums_BP.diff(dim=0)[1:]
    share_IP = (variance_BP[1:-1] / (below_IP * above_IP)).clamp_max(MOST_MOVED)
    apart_IP = (below_IP > 0) & (above_IP > 0) & (share_IP > 0)
    moved_IP = torch.where(apart_IP, share_IP * rows_BP[1:-1], 0)
    to_above_IP = torch.where(apart_IP, moved_IP * (below_IP / (below_IP + above_IP)), 0)
    squares_BP.copy_(rows_BP)
    squares_BP[1:-1] -= moved_IP
    squares_BP[:-2] += moved_IP - to_above_IP
    squares_BP[2:] += to_above_IP


def bin_step_reference(
    logits_BP: Tensor, centres_BP: Tensor, weights_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`bin_step`."""
    gates_BP = torch.sigmoid(logits_BP)
    gradient_BP = slope_P * (gates_BP * (1 - gates_BP)) * (centres_BP - mean_P)
    logits_BP -= gradient_BP.clamp(-1, 1) * full_step
    weighted_BP = torch.sigmoid(logits_BP) * weights_BP
    return weighted_BP.sum(0), (weighted_BP * centres_BP).sum(0)
