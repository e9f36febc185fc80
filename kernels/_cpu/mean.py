"""The mean of chosen rows on a CPU: only they are read, once, and added up in float64."""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels._cpu.common import JIT, flat, run_on_column_shares, widen

# Columns whose sums stay in the cache.
TILE = 1024


@njit(**JIT)
def _add_row(update_T: Any, sum_T: Any) -> None:
    for k in range(update_T.size):
        sum_T[k] += widen(update_T[k])


@njit(**JIT)
def _sum_pass(chosen: Any, rows: Any, stride: Any, sum_P: Any, begin: Any, end: Any) -> None:
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
