"""Products with a matrix of counts on a CPU, in Numba: the counts are read once, as they are."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import LINE, fetch

# Columns per tile: their sums of four vectors stay in the L1 cache.
TILE = 512
# The number of vectors that are multiplied at once, so that a count is converted once for them.
GROUP = 4
# The CPU is told this number of rows ahead which lines come next.
AHEAD = 8


@njit(**JIT)
def _add_rows(one, two, a, b, c, d, a2, b2, c2, d2, sum_a, sum_b, sum_c, sum_d):
    """Add two rows of counts, times the entries of four vectors, to the sums."""
    for k in range(one.size):
        first, second = np.float64(one[k]), np.float64(two[k])
        sum_a[k] += a * first + a2 * second
        sum_b[k] += b * first + b2 * second
        sum_c[k] += c * first + c2 * second
        sum_d[k] += d * first + d2 * second


@njit(inline="always", **JIT)
def _fetch_rows(counts, row, num_rows, at, width):
    for line in range(0, width, LINE // counts.itemsize):
        fetch(counts, max(row, 0) * num_rows + at + line)
        fetch(counts, (max(row, 0) + 1) * num_rows + at + line)


@njit(**JIT)
def _product_pass(counts, vectors, products, begin, end):
    """``counts`` is flat; of ``vectors`` and ``products``, ``(K, R)``, K is a multiple of GROUP.

    The matrix is symmetric, so the sum over the rows of each column is the product.
    """
    num_vectors, num_rows = vectors.shape
    sum_a, sum_b = np.empty(TILE), np.empty(TILE)
    sum_c, sum_d = np.empty(TILE), np.empty(TILE)
    for at in range(begin, end, TILE):
        width = min(TILE, end - at)
        for k in range(0, num_vectors, GROUP):
            sum_a[:], sum_b[:], sum_c[:], sum_d[:] = 0, 0, 0, 0
            a, b, c, d = vectors[k], vectors[k + 1], vectors[k + 2], vectors[k + 3]
            for i in range(0, num_rows, 2):
                j = min(i + 1, num_rows - 1)
                _fetch_rows(counts, min(i + AHEAD, num_rows - 2), num_rows, at, width)
                one = counts[i * num_rows + at : i * num_rows + at + width]
                two = counts[j * num_rows + at : j * num_rows + at + width]
                # The last of an odd number of rows is taken with itself, times 0.
                seconds = (a[j], b[j], c[j], d[j]) if j > i else (0.0, 0.0, 0.0, 0.0)
                _add_rows(one, two, a[i], b[i], c[i], d[i], *seconds, sum_a, sum_b, sum_c, sum_d)
            for n, sums in enumerate((sum_a, sum_b, sum_c, sum_d)):
                products[k + n, at : at + width] = sums[:width]


def count_products(counts_RR: Tensor, vectors_RK: Tensor) -> Tensor:
    num_rows, num_vectors = vectors_RK.shape
    vectors_KR = np.zeros((-(-num_vectors // GROUP) * GROUP, num_rows))
    vectors_KR[:num_vectors] = vectors_RK.detach().T
    products_KR = np.empty_like(vectors_KR)
    counts = counts_RR.view(-1).numpy()
    run_on_column_shares(lambda begin, end: _product_pass(counts, vectors_KR, products_KR, begin, end), num_rows, TILE)
    return torch.from_numpy(products_KR[:num_vectors]).T
