"""The mean of some rows of stacked updates, in one pass that reads no other row.

    mean[k] = sum over chosen i of rows[i, k] / number of chosen rows

A row that is not chosen is never read, so NaN or 1e30 in it leave no trace. This is also
why the mean is not gathered in an earlier pass over the updates. Who is benign is known only after
clustering, and if the rejected rows were subtracted from the sum of all rows, one large hostile row
would destroy the mean by cancellation.

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


def chosen_mean(rows_RP: Tensor, chosen_R: Tensor) -> Tensor:
    """The mean of the chosen rows, ``(P,)`` float64; NaN if none is chosen.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16, unit column stride.
        chosen_R: ``(R,)`` bool, with any stride.

    Raises:
        ValueError: a shape, a dtype, a device or a stride does not fit, or no kernel exists for the
            device.

    Example:
        >>> rows_RP = torch.tensor([[1.0], [torch.nan], [2.0]])
        >>> chosen_mean(rows_RP, torch.tensor([True, False, True])).tolist()
        [1.5]
    """
    check_tensor("rows", rows_RP, ("R", "P"), REALS, "unit column stride")
    check_tensor("chosen", chosen_R, (len(rows_RP),), (torch.bool,), "any strides", device=rows_RP.device)
    mean_P: Tensor = _backend("rows", rows_RP).chosen_mean(rows_RP, chosen_R)
    return mean_P


_backend = partial(compiled, __name__)
