"""Mask training on bins of a column's updates instead of on all rows, and the cuts that give every row its bits back.

Within a column, rows differ only by their update, and the logit after training is a smooth function of it. So rows are put into
B bins a column, masks are trained on the bins' means (weighted by their counts), and the history (slope, mean) of each step is
kept: replaying it on any value gives that value's final logit. Read off in the order of the updates, a column's bits change
at most once almost everywhere, so a cut and a direction a column replace the replay of every row:
``bit = (update < cut) == left``.

Shapes: R rows, S sampled rows, P parameters, B bins, T steps. Devices: CUDA through Triton, CPU through Numba; the plain twins
stand beside the public functions. Rows: float32 or bfloat16, any row stride, unit column stride. All else: contiguous float32,
counts uint16.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels._backends import compiled
from skymask_gpu.kernels._checks import REALS, check_number, check_tensor

__all__ = [
    "bin_edges",
    "bin_edges_reference",
    "bin_rows",
    "bin_rows_reference",
    "bin_step",
    "bin_step_reference",
    "cut_bits",
    "cut_bits_reference",
    "find_cuts",
    "find_cuts_reference",
    "replay",
    "replay_reference",
]

# A gap between two sampled values counts as at most so many interquartile ranges: where a column has outliers, bins
# are not spent on the emptiness before them.
WIDEST_GAP = 2.0
# Beyond the sampled range by this many interquartile ranges lie the two bins for outliers.
GUARD = 1.0
# Bins count in uint16.
MOST_ROWS = 2**16 - 1
# Halvings of the interval between two probes in which a column's bits change.
BISECTIONS = 10


# --- plain twins --------------------------------------------------------------------------------------------------------


def bin_edges_reference(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    """Plain twin of :func:`bin_edges`."""
    sorted_SP = rows_RP[sampled_S].float().sort(0).values
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


def replay_reference(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    """Plain twin of :func:`replay`."""
    values_VP = values_VP.to(slopes_TP.dtype)
    logits_VP = torch.full_like(values_VP, init)
    for slope_P, mean_P in zip(slopes_TP, means_TP, strict=True):
        gates_VP = torch.sigmoid(logits_VP)
        logits_VP -= (slope_P * (gates_VP * (1 - gates_VP)) * (values_VP - mean_P)).clamp(-1, 1) * full_step
    return logits_VP


def find_cuts_reference(
    logits_BP: Tensor,
    centres_BP: Tensor,
    counts_BP: Tensor,
    ends_2P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain twin of :func:`find_cuts`."""

    def bit(values_VP: Tensor) -> Tensor:
        return replay_reference(values_VP, slopes_TP, means_TP, init=init, full_step=full_step) > threshold

    left_P, right_P = bit(ends_2P)
    before_P, last_P = left_P.clone(), ends_2P[0].clone()
    below_P, above_P = torch.zeros_like(last_P), torch.zeros_like(last_P)
    crossings_P = torch.zeros_like(left_P, dtype=torch.int32)
    everywhere_P = torch.ones_like(left_P)
    probes = [(c, logit > threshold, n.int() > 0) for c, logit, n in zip(centres_BP, logits_BP, counts_BP, strict=True)]
    for probe_P, bit_P, filled_P in [*probes, (ends_2P[1], right_P, everywhere_P)]:
        changed_P = filled_P & (bit_P != before_P)
        first_P = changed_P & (crossings_P == 0)
        below_P = torch.where(first_P, last_P, below_P)
        above_P = torch.where(first_P, probe_P, above_P)
        crossings_P += changed_P
        before_P = torch.where(filled_P, bit_P, before_P)
        last_P = torch.where(filled_P, probe_P, last_P)
    for _ in range(BISECTIONS):
        middle_P = below_P + (above_P - below_P) / 2
        still_left_P = bit(middle_P[None])[0] == left_P
        below_P = torch.where(still_left_P, middle_P, below_P)
        above_P = torch.where(still_left_P, above_P, middle_P)
    return torch.where(crossings_P == 0, torch.inf, above_P), left_P, crossings_P


def cut_bits_reference(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    """Plain twin of :func:`cut_bits`."""
    flags_RP = (rows_RP.float() < cut_P) == left_P
    bits.zero_()
    for j in range(8):
        flags = flags_RP[:, j::8].to(torch.uint8)
        bits[:, : flags.shape[1]] |= flags << j


# --- public -------------------------------------------------------------------------------------------------------------


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    """Edges, ``(num_bins - 1, P)`` float32 ascending, between bins that follow the data.

    The inner bins divide the sampled range so that each holds as much of the sum of the roots of the gaps between neighbours:
    a density between equal counts and equal widths, with gaps clamped to ``WIDEST_GAP``. The two outermost bins lie beyond the
    sample and hold outliers that it missed, so that one scaled client cannot move a bin that others are in.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16.
        sampled_S: ``(S,)`` int64, the rows to look at, S >= 1, from 0 to R - 1. A CPU checks that; a GPU, which would have to
            wait for it, takes the first or the last row instead of one beyond them.
        num_bins: B >= 4.

    Raises:
        ValueError: a shape, a dtype, a device, a stride or a number does not fit, or no kernel exists for the device. So do
            the functions below.
    """
    _check_rows(rows_RP)
    check_tensor("sampled", sampled_S, ("S",), (torch.int64,), device=rows_RP.device)
    check_number("num_bins", num_bins, 4)
    if rows_RP.device.type == "cpu":
        lowest, highest = (int(row) for row in sampled_S.aminmax())
        if lowest < 0 or highest >= len(rows_RP):
            raise ValueError(f"sampled must be rows from 0 to {len(rows_RP) - 1}, got {lowest} to {highest}")
    return _backend("rows", rows_RP).bin_edges(rows_RP, sampled_S, num_bins)


def bin_rows(rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, ends_2P: Tensor) -> None:
    """Add rows, at most 65,535 in all, to bins: ``counts_BP`` (uint16), ``sums_BP``, each column's smallest and largest value.

    A value that equals an edge is in the bin above it. Rows are added one after the other: blocks of rows in turn give the same
    sums, to the bit, as all rows at once. The caller sees to it that they are 65,535 at most, which is what uint16 holds.
    """
    _check_rows(rows_RP)
    if len(rows_RP) > MOST_ROWS:
        raise ValueError(f"rows must be at most {MOST_ROWS:,}, which counts in uint16 can hold, got {len(rows_RP):,}")
    num_params, device = rows_RP.shape[1], rows_RP.device
    num_bins = _check_bins(num_params, device, counts=counts_BP, sums=sums_BP)
    check_tensor("edges", edges_EP, (num_bins - 1, num_params), (torch.float32,), device=device)
    check_tensor("ends", ends_2P, (2, num_params), (torch.float32,), device=device)
    _backend("rows", rows_RP).bin_rows(rows_RP, edges_EP, counts_BP, sums_BP, ends_2P)


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, counts_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """The step of :mod:`skymask_gpu.kernels.mask_step` on bins: overwrites the logits, returns the weighted sums ``(P,)``."""
    check_tensor("logits", logits_BP, ("B", "P"), (torch.float32,))
    num_params, device = logits_BP.shape[1], logits_BP.device
    _check_bins(num_params, device, logits=logits_BP, centres=centres_BP, counts=counts_BP)
    check_tensor("slope", slope_P, (num_params,), (torch.float32,), device=device)
    check_tensor("mean", mean_P, (num_params,), (torch.float32,), device=device)
    return _backend("logits", logits_BP).bin_step(logits_BP, centres_BP, counts_BP, slope_P, mean_P, full_step=full_step)


def replay(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    """The final logits, ``(V, P)`` float32, of rows with these updates, from the history of T >= 1 steps."""
    check_tensor("values", values_VP, ("V", "P"), REALS, "unit column stride")
    _check_history(slopes_TP, means_TP, values_VP.shape[1], values_VP.device)
    return _backend("values", values_VP).replay(values_VP, slopes_TP, means_TP, init=init, full_step=full_step)


def find_cuts(
    logits_BP: Tensor,
    centres_BP: Tensor,
    counts_BP: Tensor,
    ends_2P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each column's bits change: between which two probes, then by bisection, each a replay of one value a column.

    The probes are the smallest value, the means of the bins that hold any row (their final logits are there already) and the
    largest value, ``ends_2P``.

    Returns:
        The position of the first change (inf: none), float32, the bit to the left of it, bool, and the number of changes,
        int32; all ``(P,)``.
    """
    check_tensor("logits", logits_BP, ("B", "P"), (torch.float32,))
    num_params, device = logits_BP.shape[1], logits_BP.device
    _check_bins(num_params, device, logits=logits_BP, centres=centres_BP, counts=counts_BP)
    check_tensor("ends", ends_2P, (2, num_params), (torch.float32,), device=device)
    _check_history(slopes_TP, means_TP, num_params, device)
    return _backend("logits", logits_BP).find_cuts(
        logits_BP,
        centres_BP,
        counts_BP,
        ends_2P,
        slopes_TP,
        means_TP,
        init=init,
        full_step=full_step,
        threshold=threshold,
    )


def cut_bits(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    """Write the packed bits ``(update < cut) == left``, ``(R, ceil(P / 8))`` uint8, one compare an element."""
    _check_rows(rows_RP)
    num_rows, num_params = rows_RP.shape
    check_tensor("cut", cut_P, (num_params,), (torch.float32,), device=rows_RP.device)
    check_tensor("left", left_P, (num_params,), (torch.bool,), device=rows_RP.device)
    check_tensor("bits", bits, (num_rows, -(-num_params // 8)), (torch.uint8,), device=rows_RP.device)
    _backend("rows", rows_RP).cut_bits(rows_RP, cut_P, left_P, bits)


_backend = partial(compiled, "collapse")


def _check_rows(rows_RP: Tensor) -> None:
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")


def _check_bins(num_params: int, device: torch.device, **bins: Tensor) -> int:
    """The number of bins of tensors ``(B, P)`` under their names: uint16 counts, all else float32; at least 2 bins."""
    num_bins = 0
    for name, tensor in bins.items():
        dtypes = (torch.uint16,) if name == "counts" else (torch.float32,)
        check_tensor(name, tensor, (num_bins or "B", num_params), dtypes, device=device)
        num_bins = len(tensor)
    if num_bins < 2:
        raise ValueError(f"{next(iter(bins))} must be of at least 2 bins, got {num_bins}")
    return num_bins


def _check_history(slopes_TP: Tensor, means_TP: Tensor, num_params: int, device: torch.device) -> None:
    check_tensor("slopes", slopes_TP, ("T", num_params), (torch.float32,), device=device)
    check_tensor("means", means_TP, (len(slopes_TP), num_params), (torch.float32,), device=device)
