"""In how many bits the rows of packed bit matrices differ, pair by pair.

With G the Gram matrix of the 0/1 matrix, rows i and j differ in

    G[i, i] + G[j, j] - 2 G[i, j]

bits, which is also the population count of their exclusive or. Counts are integers, so every way of
computing them gives the same result. Columns in which all rows agree add nothing, so with many rows
only the other columns are looked at. In masks of 500 clients (a CNN on MNIST) 19 to 30% of the
columns vary, and 48 to 67% of the bytes hold one of these. If attackers send noise, 72% of the
columns vary, and 94% of the bytes hold one.

Shapes: R rows of packed bits, ``(R, bytes)`` uint8, and S rows of another matrix. Devices: CUDA
through Triton, CPU through Numba.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.hamming.reference import hamming_counts_between_reference, hamming_counts_reference
from skymask_gpu.kernels.shared.checks import check_number, check_tensor

__all__ = [
    "hamming_counts",
    "hamming_counts_between",
    "hamming_counts_between_reference",
    "hamming_counts_reference",
]

# The largest number that a result of each dtype can hold.
_MOST = {torch.int32: 2**31 - 1, torch.uint16: 2**16 - 1}


def hamming_counts(bits: Tensor, unit: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """The number of bits in which each two rows differ, ``(R, R)``, in units of ``unit``, rounded.

    Args:
        bits: ``(R, bytes)`` uint8, with any strides. Padding bits, at most 7, are equal in all
            rows.
        unit: at least 1.
        dtype: that of the result, int32 or uint16. A count of all bits must fit into it.

    Raises:
        ValueError: a shape or a dtype does not fit, or no kernel exists for the device.

    Example:
        >>> hamming_counts(torch.tensor([[0b0011], [0b0101], [0b1100]], dtype=torch.uint8)).tolist()
        [[0, 2, 4], [2, 0, 2], [4, 2, 0]]
    """
    check_tensor("bits", bits, ("R", "bytes"), (torch.uint8,), "any strides")
    check_number("unit", unit, 1)
    if dtype not in _MOST:
        raise ValueError(f"dtype must be torch.int32 or torch.uint16, got {dtype}")
    # The last byte has at least one bit that is not padding. Counts are int32 before they are
    # divided by the unit.
    most = 8 * bits.shape[1] - 7
    if most > _MOST[torch.int32] or (most + unit // 2) // unit > _MOST[dtype]:
        raise ValueError(f"dtype must hold counts of {most:,} bits in units of {unit}, got {dtype}; use a larger unit")
    counts_RR: Tensor = _backend("bits", bits).hamming_counts(bits, unit, dtype)
    return counts_RR


def hamming_counts_between(bits: Tensor, others: Tensor) -> Tensor:
    """In how many bits each row differs from each row of another matrix, ``(R, S)`` int32.

    Args:
        bits: ``(R, bytes)`` uint8, with any strides. Padding bits, at most 7, are equal in all rows
            of both matrices.
        others: ``(S, bytes)`` uint8, with any strides, on the same device.

    Raises:
        ValueError: a shape or a dtype does not fit, or no kernel exists for the device.

    Example:
        >>> rows = torch.tensor([[0b0011], [0b0101]], dtype=torch.uint8)
        >>> hamming_counts_between(rows, torch.tensor([[0b0001]], dtype=torch.uint8)).tolist()
        [[1], [1]]
    """
    check_tensor("bits", bits, ("R", "bytes"), (torch.uint8,), "any strides")
    check_tensor("others", others, ("S", bits.shape[1]), (torch.uint8,), "any strides", device=bits.device)
    most = 8 * bits.shape[1] - 7
    if most > _MOST[torch.int32]:
        raise ValueError(f"bits must have counts that fit into int32, got {most:,} columns")
    counts_RS: Tensor = _backend("bits", bits).hamming_counts_between(bits, others)
    return counts_RS


_backend = partial(compiled, __name__)
