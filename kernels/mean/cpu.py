"""The mean of chosen rows on a CPU: only they are read, once, and added up in float64."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, flat, widen
from skymask_gpu.kernels.shared.threads import run_on_column_shares

# The number of columns whose sums stay in the cache.
TILE = 1024


@njit(**JIT)
def _add_row(update_T, sum_T):
    for k in range(update_T.size):
        sum_T[k] += widen(update_T[k])


@njit(**JIT)
def _sum_pass(chosen, rows, stride, sum_P, begin, end):
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        for row in chosen:
            _add_row(rows[row * stride + a : row * stride + a + width], sum_P[a : a + width])


def chosen_mean(rows_RP: Tensor, chosen_R: Tensor) -> Tensor:
    num_params = rows_RP.shape[1]
    chosen = np.flatnonzero(chosen_R.numpy())
    sum_P = np.zeros(num_params)
    rows, stride = flat(rows_RP)
    run_on_column_shares(lambda begin, end: _sum_pass(chosen, rows, stride, sum_P, begin, end), num_params, TILE)
    return torch.from_numpy(sum_P) / len(chosen)
