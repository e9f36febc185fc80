"""How many ones each mask has among the columns in which the masks differ.

With V the columns in which not all rows of the 0/1 matrix M agree,

    ones[i] = sum over k in V of M[i, k]

A trained bit of 1 says that the root data want this row's value in this parameter. Columns in which
all rows agree say nothing about any row, and are left out. Counts are integers, so every way of
computing them gives the same result.

Shapes: R rows of packed bits, ``(R, bytes)`` uint8. Devices: CUDA by Triton, CPU by Numba.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.ones.reference import varying_ones_reference
from skymask_gpu.kernels.shared.checks import check_tensor

__all__ = ["varying_ones", "varying_ones_reference"]


def varying_ones(bits: Tensor) -> Tensor:
    """Count each row's ones among the columns in which rows differ.

    The last count is the number of these columns. It takes two passes over the bits, on their
    device, without waiting for it.

    Args:
        bits: ``(R, bytes)`` uint8, of any strides; padding bits are equal in all rows.

    Returns:
        ``(R + 1,)`` int64.

    Raises:
        ValueError: the shape or the dtype does not fit, or no kernel exists for the device.

    Example:
        >>> # the two rows differ in columns 1 and 2
        >>> bits = torch.tensor([[0b0111], [0b0001]], dtype=torch.uint8)
        >>> varying_ones(bits).tolist()
        [2, 0, 2]
    """
    check_tensor("bits", bits, ("R", "bytes"), (torch.uint8,), "any strides")
    ones_S: Tensor = _backend("bits", bits).varying_ones(bits)
    return ones_S


_backend = partial(compiled, __name__)
