"""The bits of all rows after the bins are trained: the history is replayed, and cuts are found.

The logit of a row after training depends on its update alone, once the history (slope and mean of
each step and column) is known: ``replay`` computes it. In almost every column,
the bits change at most once when rows are ordered by their updates. One cut and one direction per
column therefore replace the replay of every row:

    bit = (update < cut) == left

In the few other columns, ``replay_bits`` replays every row.

Shapes: R rows, V values per column, P parameters, B bins, T steps. Devices: CUDA through Triton,
CPU through Numba. Rows and values are float32 or bfloat16, with any row stride and unit column
stride. All else is contiguous float32, counts are uint16 or int32.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.cuts.reference import (
    BISECTIONS,
    cut_bits_reference,
    find_cuts_reference,
    replay_bits_reference,
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
    "replay_bits",
    "replay_bits_reference",
    "replay_reference",
]


def replay(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    """The final logits, ``(V, P)`` float32, of rows with these updates.

    Args:
        values_VP: ``(V, P)`` float32 or bfloat16, unit column stride.
        slopes_TP: ``(T, P)`` float32, the slope of each of T >= 1 steps.
        means_TP: ``(T, P)`` float32, the masked mean before each step.
        init: the logit before the first step.
        full_step: by how much a clipped gradient moves a logit (lr * clip).

    Raises:
        ValueError: a shape, a dtype, a device or a stride does not fit, or no kernel exists for the
            device. The functions below raise it too.

    Example:
        >>> values_VP = torch.tensor([[-1.0], [1.0]])
        >>> slopes_TP, means_TP = torch.tensor([[1e30]]), torch.zeros(1, 1)
        >>> replay(values_VP, slopes_TP, means_TP, init=1.0, full_step=1.0).flatten().tolist()
        [2.0, 0.0]
    """
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
    """Where each column's bits change first.

    The probes of a column are its smallest value, the means of the bins that hold any row (whose
    final logits are there already), and its largest value. Between the first two neighbouring
    probes with different bits, the cut is found by bisection; each of its steps replays one value
    per column.

    Args:
        logits_BP: ``(B, P)`` float32, the bins' logits after training.
        centres_BP: ``(B, P)`` float32, the means of the bins.
        counts_BP: ``(B, P)`` uint16 or int32.
        ends_2P: ``(2, P)`` float32, each column's smallest and largest value.
        slopes_TP, means_TP, init, full_step: the history, as in :func:`replay`.
        threshold: a logit; a logit equal to it gives bit 0.

    Returns:
        The position of the first change (float32, inf where there is none), the bit to the left of
        it (bool), and the number of changes (int32), all ``(P,)``.

    Example:
        >>> centres_BP = torch.tensor([[-1.0], [1.0]])
        >>> counts_BP = torch.ones(2, 1, dtype=torch.uint16)
        >>> slopes_TP, means_TP = torch.tensor([[1e30]]), torch.zeros(1, 1)
        >>> logits_BP = replay(centres_BP, slopes_TP, means_TP, init=1.0, full_step=1.0)
        >>> position_P, left_P, crossings_P = find_cuts(
        ...     logits_BP, centres_BP, counts_BP, centres_BP, slopes_TP, means_TP,
        ...     init=1.0, full_step=1.0, threshold=0.5
        ... )
        >>> 0 < position_P.item() <= 2 / 2**BISECTIONS, left_P.item(), crossings_P.item()
        (True, True, 1)
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
    """Write the packed bits ``(update < cut) == left``: one comparison per element.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16, unit column stride.
        cut_P: ``(P,)`` float32; inf where all bits are ``left``.
        left_P: ``(P,)`` bool, the bit of an update below the cut.
        bits: ``(R, ceil(P / 8))`` uint8, overwritten, as :func:`~skymask_gpu.kernels.last_step`
            packs them.

    Example:
        >>> bits = torch.empty(2, 1, dtype=torch.uint8)
        >>> rows_RP = torch.tensor([[1.0, 5.0], [4.0, 5.0]])
        >>> cut_bits(rows_RP, torch.tensor([2.0, torch.inf]), torch.tensor([True, True]), bits)
        >>> bits.flatten().tolist()
        [3, 2]
    """
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    num_rows, num_params = rows_RP.shape
    check_tensor("cut", cut_P, (num_params,), (torch.float32,), device=rows_RP.device)
    check_tensor("left", left_P, (num_params,), (torch.bool,), device=rows_RP.device)
    check_tensor("bits", bits, (num_rows, -(-num_params // 8)), (torch.uint8,), device=rows_RP.device)
    _backend("rows", rows_RP).cut_bits(rows_RP, cut_P, left_P, bits)


def replay_bits(
    rows_RP: Tensor,
    chosen_P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    bits: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> None:
    """Overwrite the bits of some columns by those of every row's logit after the history.

    On a GPU, the host does not learn which columns these are.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16, unit column stride.
        chosen_P: ``(P,)`` bool, which columns; the bits of all others stay.
        slopes_TP, means_TP, init, full_step: the history, as in :func:`replay`.
        bits: ``(R, ceil(P / 8))`` uint8, as in :func:`cut_bits`.
        threshold: a logit; a logit equal to it gives bit 0.

    Example:
        >>> bits = torch.zeros(2, 1, dtype=torch.uint8)
        >>> rows_RP = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
        >>> chosen_P = torch.tensor([False, True])
        >>> history = torch.full((1, 2), 1e30), torch.zeros(1, 2)
        >>> replay_bits(rows_RP, chosen_P, *history, bits, init=1.0, full_step=1.0, threshold=0.0)
        >>> bits.flatten().tolist()
        [2, 0]
    """
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    num_rows, num_params = rows_RP.shape
    check_tensor("chosen", chosen_P, (num_params,), (torch.bool,), device=rows_RP.device)
    _check_history(slopes_TP, means_TP, num_params, rows_RP.device)
    check_tensor("bits", bits, (num_rows, -(-num_params // 8)), (torch.uint8,), device=rows_RP.device)
    _backend("rows", rows_RP).replay_bits(
        rows_RP, chosen_P, slopes_TP, means_TP, bits, init=init, full_step=full_step, threshold=threshold
    )


_backend = partial(compiled, __name__)


def _check_history(slopes_TP: Tensor, means_TP: Tensor, num_params: int, device: torch.device) -> None:
    check_tensor("slopes", slopes_TP, ("T", num_params), (torch.float32,), device=device)
    check_tensor("means", means_TP, (len(slopes_TP), num_params), (torch.float32,), device=device)
