"""Mask training on bins of a column's updates, instead of on all rows.

Within a column, rows differ only by their update, and the logit after training is a smooth function
of it. So the rows of a column are put into B bins (``bin_edges``, ``bin_rows``), and masks are
trained on the means of the bins, with weights that keep the rows' number, sum and sum of squares
(``bin_weights``, ``bin_step``). ``cuts/`` gives all rows their bits back.

Shapes: R rows, S sampled rows, P parameters, B bins, E = B - 1 edges. Devices: CUDA through CUDA
C++ (edges and rows) and Triton, CPU through Numba. Rows are float32 or bfloat16, with any row
stride and unit column stride. All else is contiguous float32. Counts are uint16, or int32 for more
rows than uint16 can count.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.bins.reference import (
    GUARD,
    MOST_MOVED,
    WIDEST_GAP,
    bin_edges_reference,
    bin_rows_reference,
    bin_step_reference,
    bin_weights_reference,
)
from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.shared.checks import REALS, check_bins, check_number, check_tensor

__all__ = [
    "GUARD",
    "MOST_MOVED",
    "MOST_ROWS",
    "WIDEST_GAP",
    "bin_edges",
    "bin_edges_reference",
    "bin_rows",
    "bin_rows_reference",
    "bin_step",
    "bin_step_reference",
    "bin_weights",
    "bin_weights_reference",
    "counts_dtype",
]

# The most rows that counts can hold. Weights are made of counts in float32, which has every whole
# number up to 2**24. Counts in int32 therefore end there, although they could go on.
MOST_ROWS = 2**24
_MOST = {torch.uint16: 2**16 - 1, torch.int32: MOST_ROWS}


def counts_dtype(num_rows: int) -> torch.dtype:
    """The smallest dtype whose counts can hold this number of rows: uint16 or int32.

    Example:
        >>> counts_dtype(65_535), counts_dtype(65_536)
        (torch.uint16, torch.int32)
    """
    return torch.uint16 if num_rows <= _MOST[torch.uint16] else torch.int32


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    """Edges, ``(num_bins - 1, P)`` float32 ascending, between bins that follow the data.

    The inner edges divide the sampled range so that each bin gets the same share of one sum: that
    of the square roots of the gaps between neighbouring values. This is a compromise between bins
    of equal counts and bins of equal widths.
    A gap counts as at most ``WIDEST_GAP``. The two outermost bins begin beyond the sample and hold
    outliers that it missed, so one scaled client cannot move a bin that other clients are in.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16, unit column stride.
        sampled_S: ``(S,)`` int64, the rows to look at, S >= 1, from 0 to R - 1. A CPU checks the
            numbers. A GPU would have to wait for them; it takes the first or the last row instead
            of one beyond them.
        num_bins: B >= 4.

    Raises:
        ValueError: a shape, a dtype, a device, a stride or a number does not fit, or no kernel
            exists for the device. The functions below raise it too.

    Example:
        >>> rows_RP = torch.tensor([[0.0], [1], [2], [3], [103]])
        >>> bin_edges(rows_RP, torch.arange(5), 4).flatten().tolist()
        [-2.0, 2.5, 105.0]
    """
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    check_tensor("sampled", sampled_S, ("S",), (torch.int64,), device=rows_RP.device)
    check_number("num_bins", num_bins, 4)
    if rows_RP.device.type == "cpu":
        lowest, highest = (int(row) for row in sampled_S.aminmax())
        if lowest < 0 or highest >= len(rows_RP):
            raise ValueError(f"sampled must be rows from 0 to {len(rows_RP) - 1}, got {lowest} to {highest}")
    return _backend("rows", rows_RP).bin_edges(rows_RP, sampled_S, num_bins)


def bin_rows(
    rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, ends_2P: Tensor
) -> None:
    """Add rows to the bins: to all arguments but the rows and the edges, in place.

    A value that equals an edge is in the bin above it. Rows are added one after the other, so
    blocks of rows in turn give the same sums, to the bit, as all rows at once.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16. All calls together may add at most 65,535 rows to
            counts in uint16, and 2**24 to counts in int32; each call checks only its own.
        edges_EP: ``(B - 1, P)`` float32, ascending.
        counts_BP: ``(B, P)``, see :func:`counts_dtype`.
        sums_BP: ``(B, P)`` float32.
        squares_BP: ``(B, P)`` float32, the sums of the squared distances to the column's middle
            edge, ``edges_EP[(B - 1) // 2]``. Distances to 0 would lose their last digits in columns
            whose values are all far from it.
        ends_2P: ``(2, P)`` float32, each column's smallest and largest value; begin with inf and
            -inf.

    Example:
        >>> counts_BP = torch.zeros(2, 1, dtype=torch.uint16)
        >>> sums_BP, squares_BP = torch.zeros(2, 1), torch.zeros(2, 1)
        >>> ends_2P = torch.tensor([[torch.inf], [-torch.inf]])
        >>> rows_RP, edges_EP = torch.tensor([[1.0], [5.0], [7.0]]), torch.tensor([[5.0]])
        >>> bin_rows(rows_RP, edges_EP, counts_BP, sums_BP, squares_BP, ends_2P)
        >>> [x.flatten().tolist() for x in (counts_BP, sums_BP, squares_BP, ends_2P)]
        [[1, 2], [1.0, 12.0], [16.0, 4.0], [1.0, 7.0]]
    """
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    num_params, device = rows_RP.shape[1], rows_RP.device
    _check_contents(num_params, device, edges_EP, ends_2P, counts=counts_BP, sums=sums_BP, squares=squares_BP)
    most, held_in = _MOST[counts_BP.dtype], str(counts_BP.dtype).removeprefix("torch.")
    if len(rows_RP) > most:
        raise ValueError(f"rows must be at most {most:,}, which counts in {held_in} can hold, got {len(rows_RP):,}")
    _backend("rows", rows_RP).bin_rows(rows_RP, edges_EP, counts_BP, sums_BP, squares_BP, ends_2P)


def bin_weights(counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, edges_EP: Tensor, ends_2P: Tensor) -> None:
    """Turn sums into centres, and squares into weights, in place, once all rows are in the bins.

    A centre is the mean of the bin's rows, or the middle of an empty bin: of its edges, or the
    column's end if it is an outermost bin.

    A weight begins as the count. A weighted sum of a function over the bins would then miss how its
    curvature acts within a bin, which is proportional to the bin's variance. So each inner bin
    gives some weight to both neighbours, as much as keeps the column's sum and adds this variance.
    The sum is then exact for each parabola through three neighbouring centres. At most
    ``MOST_MOVED`` of the bin's count is given away, and nothing if centres coincide.

    Args:
        counts_BP, sums_BP, squares_BP, edges_EP, ends_2P: as :func:`bin_rows` takes and fills them.

    Example:
        >>> counts_BP = torch.tensor([[1], [2], [1]], dtype=torch.uint16)
        >>> edges_EP, ends_2P = torch.tensor([[2.0], [6.0]]), torch.tensor([[0.0], [8.0]])
        >>> sums_BP = torch.tensor([[0.0], [3 + 5], [8]])  # of the rows 0, 3, 5 and 8
        >>> squares_BP = torch.tensor([[36.0], [9 + 1], [4]])
        >>> bin_weights(counts_BP, sums_BP, squares_BP, edges_EP, ends_2P)
        >>> sums_BP.flatten().tolist(), squares_BP.flatten().tolist()
        ([0.0, 4.0, 8.0], [1.0625, 1.875, 1.0625])
    """
    check_tensor("counts", counts_BP, ("B", "P"), tuple(_MOST))
    num_params, device = counts_BP.shape[1], counts_BP.device
    _check_contents(num_params, device, edges_EP, ends_2P, counts=counts_BP, sums=sums_BP, squares=squares_BP)
    _backend("counts", counts_BP).bin_weights(counts_BP, sums_BP, squares_BP, edges_EP, ends_2P)


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, weights_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    """One training step of bins: that of :mod:`skymask_gpu.kernels.mask_step`, weighted.

    Args:
        logits_BP: ``(B, P)`` float32, overwritten.
        centres_BP: ``(B, P)`` float32, see :func:`bin_weights`.
        weights_BP: ``(B, P)`` float32.
        slope_P: ``(P,)`` float32, gradient over gate sum over clip, finite.
        mean_P: ``(P,)`` float32, the masked mean before the step.
        full_step: by how much a clipped gradient moves a logit (lr * clip).

    Returns:
        The sums over the rows in all bins, both ``(P,)``: of the gates, and of gate times centre.

    Example:
        >>> logits_BP, centres_BP = torch.zeros(2, 1), torch.tensor([[-1.0], [1.0]])
        >>> weights_BP = torch.tensor([[1.0], [3.0]])
        >>> slope_P, mean_P = torch.zeros(1), torch.zeros(1)
        >>> bin_step(logits_BP, centres_BP, weights_BP, slope_P, mean_P, full_step=1.0)
        (tensor([2.]), tensor([1.]))
    """
    check_tensor("logits", logits_BP, ("B", "P"), (torch.float32,))
    num_params, device = logits_BP.shape[1], logits_BP.device
    check_bins(num_params, device, logits=logits_BP, centres=centres_BP, weights=weights_BP)
    check_tensor("slope", slope_P, (num_params,), (torch.float32,), device=device)
    check_tensor("mean", mean_P, (num_params,), (torch.float32,), device=device)
    return _backend("logits", logits_BP).bin_step(logits_BP, centres_BP, weights_BP, slope_P, mean_P, full_step=full_step)


_backend = partial(compiled, __name__, on_cuda="cuda")


def _check_contents(num_params: int, device: torch.device, edges_EP: Tensor, ends_2P: Tensor, **bins: Tensor) -> None:
    num_bins = check_bins(num_params, device, **bins)
    check_tensor("edges", edges_EP, (num_bins - 1, num_params), (torch.float32,), device=device)
    check_tensor("ends", ends_2P, (2, num_params), (torch.float32,), device=device)
