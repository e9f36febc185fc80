"""The mean of chosen rows on a CPU: only they are read, once, and added up in float64."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, flat, widen
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import LINE, fetch

# The number of columns whose sums stay in the cache.
TILE = 1024


@njit(**JIT)
def _add_row(update_T, factor, sum_T):
    for k in range(update_T.size):
        sum_T[k] += factor * np.float64(widen(update_T[k]))


@njit(**JIT)
def _sum_pass(entering, factors, rows, stride, sum_P, begin, end):
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for number in range(entering.size):
            at = entering[number] * stride + a
            # What comes next lies far away in memory, where the CPU does not foresee it.
            next_at = entering[number + 1] * stride + a if number + 1 < entering.size else entering[0] * stride + a + TILE
            for line in range(0, width, LINE // rows.itemsize):
                fetch(rows, next_at + line)
            _add_row(rows[at : at + width], factors[entering[number]], sum_P[a : a + width])


def chosen_mean(rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor) -> Tensor:
    num_params = rows_RP.shape[1]
    factors = factors_R.numpy().astype(np.float64)
    entering = np.flatnonzero(chosen_R.numpy() & (factors != 0))
    sum_P = np.zeros(num_params)
    rows, stride = flat(rows_RP)
    run_on_column_shares(lambda begin, end: _sum_pass(entering, factors, rows, stride, sum_P, begin, end), num_params, TILE)
    return torch.from_numpy(sum_P) / chosen_R.sum()
