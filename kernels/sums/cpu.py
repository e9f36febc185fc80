"""Sums by group of columns on a CPU, in Numba: every row is read once."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, flat, widen
from skymask_gpu.kernels.shared.threads import run_on_column_shares

# The number of rows for which a group's part of the vectors stays in the cache.
TILE = 16
# The order of the additions is free, so that each sum is made of as many partial sums as the CPU's
# vectors hold. In float64 this changes nothing that float32 shows.
FREE_ORDER = {**JIT, "fastmath": {"contract", "reassoc", "nsz"}}


@njit(**FREE_ORDER)
def _sums(row, one, two):
    """The sum of the squares of a part of a row, and its products with parts of two vectors."""
    squares = products_one = products_two = 0.0
    for k in range(row.size):
        value = np.float64(widen(row[k]))
        squares += value * value
        products_one += value * np.float64(one[k])
        products_two += value * np.float64(two[k])
    return squares, products_one, products_two


@njit(**JIT)
def _sums_pass(rows, stride, one, two, edges, sums_3KG, begin, end):
    """The sums of the rows from ``begin`` to ``end``; ``rows`` is flat."""
    for top in range(begin, end, TILE):
        for group in range(edges.size - 1):
            first, last = edges[group], edges[group + 1]
            for row in range(top, min(top + TILE, end)):
                part = rows[row * stride + first : row * stride + last]
                found = _sums(part, one[first:last], two[first:last])
                sums_3KG[0, row, group], sums_3KG[1, row, group], sums_3KG[2, row, group] = found


def group_sums(rows_KL: Tensor, vectors_2L: Tensor, edges: np.ndarray) -> Tensor:
    sums_3KG = np.empty((3, len(rows_KL), edges.size - 1))
    rows, stride = flat(rows_KL)
    one, two = vectors_2L.detach().numpy()
    run_on_column_shares(lambda begin, end: _sums_pass(rows, stride, one, two, edges, sums_3KG, begin, end), len(rows_KL), TILE)
    return torch.from_numpy(sums_3KG)
