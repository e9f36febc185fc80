"""The mean of some rows of stacked updates, in one pass that reads no other row.

    mean[k] = sum over chosen i of factors[i] * rows[i, k] / number of chosen rows

Without factors it is the plain mean. With factors w[i] / (mean of w over the chosen rows) it is the
mean weighted by w; a row that is too long is shortened by a factor below 1.

A row that is not chosen never enters, whatever it holds: NaN and 1e30 leave no trace. The same is
true for a chosen row whose factor is 0, but this row counts in the number of chosen rows. This is
also why the mean is not gathered in an earlier pass over the updates. Who is benign is known only
after clustering, and if the rejected rows were subtracted from the sum of all rows, one large
hostile row would destroy the mean by cancellation.

Sums are float64 on a CPU. On a GPU they are float32 within a share of the rows and float64 over the
shares. Shapes: R rows, P columns. Rows are float32 or bfloat16, with any row stride and unit column
stride. Devices: CUDA through Triton, CPU through Numba.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.mean.reference import chosen_mean_reference
from skymask_gpu.kernels.shared.checks import REALS, check_tensor

__all__ = ["chosen_mean", "chosen_mean_reference"]


def chosen_mean(rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor | None = None) -> Tensor:
    """The mean of the chosen rows, each times its factor, ``(P,)`` float64; NaN if none is chosen.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16, unit column stride.
        chosen_R: ``(R,)`` bool, with any stride.
        factors_R: ``(R,)`` float32, with any stride; None stands for ones, with the same result.

    Raises:
        ValueError: a shape, a dtype, a device or a stride does not fit, or no kernel exists for the
            device.

    Example:
        >>> rows_RP = torch.tensor([[1.0], [torch.nan], [2.0]])
        >>> chosen_R = torch.tensor([True, False, True])
        >>> chosen_mean(rows_RP, chosen_R).tolist()
        [1.5]
        >>> chosen_mean(rows_RP, chosen_R, torch.tensor([0.5, 1.0, 1.5])).tolist()
        [1.75]
    """
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    check_tensor("chosen", chosen_R, (len(rows_RP),), (torch.bool,), "any strides", device=rows_RP.device)
    if factors_R is None:
        factors_R = chosen_R.float()
    else:
        check_tensor("factors", factors_R, (len(rows_RP),), (torch.float32,), "any strides", device=rows_RP.device)
    mean_P: Tensor = _backend("rows", rows_RP).chosen_mean(rows_RP, chosen_R, factors_R)
    return mean_P


_backend = partial(compiled, __name__)
