"""Sums of squares and products per group of columns, in one pass over stacked updates.

    sums[0, i, g] = sum over k in g of rows[i, k] ** 2
    sums[1 + v, i, g] = sum over k in g of rows[i, k] * vectors[v, k]     for v = 0, 1

A group is a range of adjacent columns, and the groups follow each other. From these sums come the
norms of updates, their inner products with two vectors, and the cosines of single neurons.

All is added in float64. The order of the additions depends on the CPU; on a GPU it depends on how
the rows are aligned. Shapes: K rows, L columns, G groups. Rows are float32 or bfloat16, with any
row stride and unit column stride. Devices: CUDA through Triton, CPU through Numba.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.shared.checks import REALS, check_tensor
from skymask_gpu.kernels.sums.reference import group_sums_reference

__all__ = ["group_sums", "group_sums_reference"]


def group_sums(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> Tensor:
    """Sums of squares and products of each row in each group of columns, ``(3, K, G)`` float64.

    Args:
        rows_KL: ``(K, L)`` float32 or bfloat16, unit column stride.
        vectors_2L: ``(2, L)`` float32, contiguous.
        edges: where each group begins, and L at the end: G + 1 ascending numbers, the first 0.

    Raises:
        ValueError: a shape, a dtype, a device, a stride or an edge does not fit, or no kernel
            exists for the device.

    Example:
        >>> vectors_2L = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 5.0]])
        >>> group_sums(torch.tensor([[3.0, 4.0, 2.0]]), vectors_2L, [0, 2, 3]).tolist()
        [[[25.0, 4.0]], [[7.0, 2.0]], [[0.0, 10.0]]]
    """
    check_tensor("rows", rows_KL, ("K", "L"), REALS, "unit column stride")
    check_tensor("vectors", vectors_2L, (2, rows_KL.shape[1]), (torch.float32,), device=rows_KL.device)
    begins = np.asarray(edges, dtype=np.int64)
    if begins.ndim != 1 or len(begins) < 2 or begins[0] != 0 or begins[-1] != rows_KL.shape[1] or (np.diff(begins) <= 0).any():
        raise ValueError(f"edges must be ascending numbers from 0 to {rows_KL.shape[1]}, got {list(edges)[:8]}")
    sums_3KG: Tensor = compiled(__name__, "rows", rows_KL).group_sums(rows_KL, vectors_2L, begins)
    return sums_3KG
