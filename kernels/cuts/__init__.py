"""Bits of all rows from the training of bins: the history is replayed, and a cut per column found.

The logit of a row after training depends on its update alone, once the history (slope and mean of
each step and column) is known: ``replay`` computes it. Read off in the order of the updates, a
column's bits change at most once almost everywhere. So a cut and a direction per column stand in
for the replay of every row:

    bit = (update < cut) == left

Shapes: R rows, V values per column, P parameters, B bins, T steps. Devices: CUDA through Triton, CPU
through Numba. Rows and values are float32 or bfloat16, with any row stride and unit column stride.
All else is contiguous float32, counts are uint16.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.cuts.reference import (
    BISECTIONS,
    cut_bits_reference,
    find_cuts_reference,
    replay_reference,
)
from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.shared.checks import REALS, check_bins, check_tensor

__all__ = [
    "BISECTIONS",
    "cut_bits",
    "cut_bits_reference",
    "find_cuts",
    "find_cuts_reference",
    "replay",
    "replay_reference",
]


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
    check_bins(num_params, device, logits=logits_BP, centres=centres_BP, counts=counts_BP)
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
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    num_rows, num_params = rows_RP.shape
    check_tensor("cut", cut_P, (num_params,), (torch.float32,), device=rows_RP.device)
    check_tensor("left", left_P, (num_params,), (torch.bool,), device=rows_RP.device)
    check_tensor("bits", bits, (num_rows, -(-num_params // 8)), (torch.uint8,), device=rows_RP.device)
    _backend("rows", rows_RP).cut_bits(rows_RP, cut_P, left_P, bits)


_backend = partial(compiled, __name__)


def _check_history(slopes_TP: Tensor, means_TP: Tensor, num_params: int, device: torch.device) -> None:
    check_tensor("slopes", slopes_TP, ("T", num_params), (torch.float32,), device=device)
    check_tensor("means", means_TP, (len(slopes_TP), num_params), (torch.float32,), device=device)
