"""Sums by group of columns on a CPU, in Numba: every row is read once."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, flat, widen
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import LINE, fetch

# The number of columns of the two vectors that stay in the L1 cache, in float64, for all rows.
TILE = 512
# The order of the additions is free, so that each sum is made of as many partial sums as the CPU's
# vectors hold. In float64 this changes nothing that float32 shows.
FREE_ORDER = {**JIT, "fastmath": {"contract", "reassoc", "nsz"}}


@njit(**FREE_ORDER)
def _sums(row, one, two):
    """The sum of the squares of a part of a row, and its products with parts of two vectors.

    The vectors are float64: converting them anew for each row would take as long as the products.
    """
    squares = products_one = products_two = 0.0
    for k in range(row.size):
        value = np.float64(widen(row[k]))
        squares += value * value
        products_one += value * one[k]
        products_two += value * two[k]
    return squares, products_one, products_two


@njit(**JIT)
def _sums_pass(rows, stride, one, two, edges, sums_3KG, begin, end):
    """The sums of the rows from ``begin`` to ``end``; ``rows`` is flat."""
    one_T, two_T = np.empty(TILE), np.empty(TILE)
    for group in range(edges.size - 1):
        for first in range(edges[group], edges[group + 1], TILE):
            width = min(TILE, edges[group + 1] - first)
            for k in range(width):
                one_T[k], two_T[k] = one[first + k], two[first + k]
            for row in range(begin, end):
                at = row * stride + first
                # The next row's part lies far away in memory, where the CPU does not foresee it.
                for line in range(0, width, LINE // rows.itemsize):
                    fetch(rows, at + stride + line)
                squares, products_one, products_two = _sums(rows[at : at + width], one_T[:width], two_T[:width])
                sums_3KG[0, row, group] += squares
                sums_3KG[1, row, group] += products_one
                sums_3KG[2, row, group] += products_two


def group_sums(rows_KL: Tensor, vectors_2L: Tensor, edges: np.ndarray) -> Tensor:
    sums_3KG = np.zeros((3, len(rows_KL), edges.size - 1))
    rows, stride = flat(rows_KL)
    one, two = vectors_2L.detach().numpy()
    run_on_column_shares(lambda begin, end: _sums_pass(rows, stride, one, two, edges, sums_3KG, begin, end), len(rows_KL), 1)
    return torch.from_numpy(sums_3KG)
