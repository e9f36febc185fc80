"""The fused mask step on a CPU: one Numba loop over column tiles that stay in the L2 cache, columns shared among threads.

Eager torch needs nine passes over a tile for the same work. LLVM turns the inner loops into vector code only if it sees few
arrays, written in place, and no library call: hence the packed (2, tile) buffers and the polynomial exponential below.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels._cpu.common import JIT, clamp, flat, run_on_column_shares, sigmoid, widen

# Columns a tile: updates, logits and sums of 64 rows fit in 1 MB of L2.
TILE = 1024
# Rows that are added up before they join the total: keeps float32 rounding from growing with the number of clients.
ROWS_A_BATCH = 64

# --- the passes -------------------------------------------------------------------------------------------------------


# Matrices come flat, row i at i * stride; vectors_2P holds slope and mean.


@njit(**JIT)
def _step_row(update_T: Any, logits_T: Any, vectors_2T: Any, full_step: Any, one: Any) -> None:
    for k in range(update_T.shape[0]):
        logit = logits_T[k]
        gate = sigmoid(logit)
        gradient = vectors_2T[0, k] * (gate - gate * gate) * (widen(update_T[k]) - vectors_2T[1, k])
        logits_T[k] = logit - clamp(gradient, one) * full_step


@njit(**JIT)
def _add_row(update_T: Any, logits_T: Any, sums_2T: Any) -> None:
    for k in range(update_T.shape[0]):
        gate = sigmoid(logits_T[k])
        sums_2T[0, k] += gate
        sums_2T[1, k] += gate * widen(update_T[k])


@njit(**JIT)
def _sums_pass(
    num_rows: Any,
    updates: Any,
    updates_stride: Any,
    logits: Any,
    logits_stride: Any,
    from_init: Any,
    init: Any,
    vectors_2P: Any,
    full_step: Any,
    sums_2P: Any,
    begin: Any,
    end: Any,
) -> None:
    vectors_2T = np.empty((2, TILE), vectors_2P.dtype)
    batch_2T = np.empty((2, TILE), vectors_2P.dtype)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        vectors_2T[:, :width] = vectors_2P[:, a : a + width]
        sums_2P[:, a : a + width] = 0
        batch_2T[:] = 0
        for i in range(num_rows):
            update_T = updates[i * updates_stride + a : i * updates_stride + a + width]
            logits_T = logits[i * logits_stride + a : i * logits_stride + a + width]
            if from_init:
                logits_T[:] = init
            _step_row(update_T, logits_T, vectors_2T, full_step, vectors_2P.dtype.type(1))
            _add_row(update_T, logits_T, batch_2T)
            if (i + 1) % ROWS_A_BATCH == 0 or i + 1 == num_rows:
                sums_2P[:, a : a + width] += batch_2T[:, :width]
                batch_2T[:] = 0


@njit(**JIT)
def _bits_pass(
    num_rows: Any,
    updates: Any,
    updates_stride: Any,
    logits: Any,
    logits_stride: Any,
    from_init: Any,
    init: Any,
    keep: Any,
    vectors_2P: Any,
    full_step: Any,
    threshold: Any,
    bits: Any,
    begin: Any,
    end: Any,
) -> None:
    vectors_2T = np.empty((2, TILE), vectors_2P.dtype)
    out_T = np.empty(TILE, vectors_2P.dtype)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        vectors_2T[:, :width] = vectors_2P[:, a : a + width]
        out_T[width:] = threshold
        for i in range(num_rows):
            update_T = updates[i * updates_stride + a : i * updates_stride + a + width]
            logits_T = logits[i * logits_stride + a : i * logits_stride + a + width]
            if from_init:
                out_T[:width] = init
            else:
                out_T[:width] = logits_T
            _step_row(update_T, out_T[:width], vectors_2T, full_step, vectors_2P.dtype.type(1))
            if keep:
                logits_T[:] = out_T[:width]
            for byte in range((width + 7) // 8):
                packed = 0
                for j in range(8):
                    packed |= np.int64(out_T[8 * byte + j] > threshold) << j
                bits[i, a // 8 + byte] = packed


# --- called with checked arguments from kernels/mask_step.py ------------------------------------------------------------


def first_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, init: float, full_step: float
) -> tuple[Tensor, Tensor]:
    return _sums(updates_RP, logits_RP, slope_P, mean_P, init, full_step)


def next_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    return _sums(updates_RP, logits_RP, slope_P, mean_P, None, full_step)


def _sums(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, init: float | None, full_step: float
) -> tuple[Tensor, Tensor]:
    vectors_2P = torch.stack([slope_P, mean_P]).numpy()
    real = vectors_2P.dtype.type
    sums_2P = torch.empty(2, slope_P.numel(), dtype=slope_P.dtype)
    arguments = (
        len(updates_RP),
        *flat(updates_RP),
        *flat(logits_RP),
        init is not None,
        real(init or 0.0),
        vectors_2P,
        real(full_step),
        sums_2P.numpy(),
    )
    run_on_column_shares(lambda begin, end: _sums_pass(*arguments, begin, end), slope_P.numel(), TILE)
    return sums_2P[0], sums_2P[1]


def last_step(
    updates_RP: Tensor,
    logits_RP: Tensor | None,
    slope_P: Tensor,
    mean_P: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
    logits_out_RP: Tensor | None = None,
) -> Tensor:
    num_rows, num_params = updates_RP.shape
    vectors_2P = torch.stack([slope_P, mean_P]).numpy()
    real = vectors_2P.dtype.type
    if logits_out_RP is not None and logits_RP is not None and logits_out_RP.data_ptr() != logits_RP.data_ptr():
        logits_out_RP.copy_(logits_RP)
    stored_RP = logits_RP if logits_out_RP is None else logits_out_RP
    logits, logits_stride = (np.empty(num_params, real), 0) if stored_RP is None else flat(stored_RP)
    bits = torch.empty(num_rows, -(-num_params // 8), dtype=torch.uint8)
    arguments = (
        num_rows,
        *flat(updates_RP),
        logits,
        logits_stride,
        logits_RP is None,
        real(init),
        logits_out_RP is not None,
        vectors_2P,
        real(full_step),
        real(threshold),
        bits.numpy(),
    )
    run_on_column_shares(lambda begin, end: _bits_pass(*arguments, begin, end), num_params, TILE)
    return bits
