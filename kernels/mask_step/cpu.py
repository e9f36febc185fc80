"""The mask step on a CPU, in Numba: one loop over tiles of columns that stay in the L2 cache.

Threads share the columns. Eager PyTorch needs nine passes over a tile for the same work.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, flat
from skymask_gpu.kernels.shared.cpu_step import move, move_and_add
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import WIDE, pack_above

# Columns per tile. Slopes, means and both sums fit in a part of L2 while the rows are read, and a
# row's part of a tile is long enough for the processor to fetch ahead.
TILE = 8192
# The number of rows that are added up by themselves before their sum joins the total. This way the
# rounding of float32 does not grow with the number of clients.
ROWS_A_BATCH = 64
assert TILE % WIDE == 0

# --- the passes ---


# Matrices arrive as flat arrays, in which row i begins at i * stride. vectors_2P holds the slope
# and the mean. The last columns, if they are fewer than 64, are copied to where there is room for
# 64.


@njit(**JIT)
def _sums_pass(
    num_rows,
    updates,
    updates_stride,
    logits,
    logits_stride,
    from_init,
    init,
    vectors_2P,
    full_step,
    sums_2P,
    begin,
    end,
):
    slope_T, mean_T = np.zeros(TILE, vectors_2P.dtype), np.zeros(TILE, vectors_2P.dtype)
    gate_sum_T, weighted_sum_T = np.zeros(TILE, vectors_2P.dtype), np.zeros(TILE, vectors_2P.dtype)
    update_W, logit_W = np.zeros(WIDE, updates.dtype), np.zeros(WIDE, vectors_2P.dtype)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        whole = width // WIDE * WIDE
        slope_T[:width], mean_T[:width] = vectors_2P[0, a : a + width], vectors_2P[1, a : a + width]
        sums_2P[:, a : a + width] = 0
        for i in range(num_rows):
            at, to = i * updates_stride + a, i * logits_stride + a
            if from_init:
                logits[to : to + width] = init
            for k in range(0, whole, WIDE):
                move_and_add(updates, at + k, None, logits, to + k, slope_T, mean_T, gate_sum_T, weighted_sum_T, k, full_step)
            if whole < width:
                rest, columns = width - whole, slice(to + whole, to + width)
                update_W[:rest], logit_W[:rest] = updates[at + whole : at + width], logits[columns]
                vectors = slope_T[whole:], mean_T[whole:], gate_sum_T[whole:], weighted_sum_T[whole:]
                move_and_add(update_W, 0, None, logit_W, 0, *vectors, 0, full_step)
                logits[columns] = logit_W[:rest]
            if (i + 1) % ROWS_A_BATCH == 0 or i + 1 == num_rows:
                sums_2P[0, a : a + width] += gate_sum_T[:width]
                sums_2P[1, a : a + width] += weighted_sum_T[:width]
                gate_sum_T[:], weighted_sum_T[:] = 0, 0


@njit(**JIT)
def _bits_pass(
    num_rows,
    updates,
    updates_stride,
    logits,
    logits_stride,
    from_init,
    init,
    keep,
    vectors_2P,
    full_step,
    threshold,
    bits,
    begin,
    end,
):
    num_bytes = -(-vectors_2P.shape[1] // 8)
    slope_T, mean_T = np.zeros(TILE, vectors_2P.dtype), np.zeros(TILE, vectors_2P.dtype)
    init_T, moved_T = np.full(TILE, init, vectors_2P.dtype), np.zeros(TILE, vectors_2P.dtype)
    update_W, logit_W = np.zeros(WIDE, updates.dtype), np.full(WIDE, init, vectors_2P.dtype)
    packed_W = np.zeros(WIDE // 8, np.uint8)
    for a in range(begin, end, TILE):
        width = min(TILE, end - a)
        whole = width // WIDE * WIDE
        rest = width - whole
        slope_T[:width], mean_T[:width] = vectors_2P[0, a : a + width], vectors_2P[1, a : a + width]
        for i in range(num_rows):
            at, to, byte = i * updates_stride + a, i * logits_stride + a, i * num_bytes + a // 8
            before, start = (init_T, 0) if from_init else (logits, to)
            for k in range(0, whole, WIDE):
                move(updates, at + k, before, start + k, slope_T, mean_T, k, full_step, moved_T, k)
                pack_above(moved_T, k, threshold, bits, byte + k // 8)
            if rest > 0:
                update_W[:rest], logit_W[:rest] = updates[at + whole : at + width], before[start + whole : start + width]
                move(update_W, 0, logit_W, 0, slope_T[whole:], mean_T[whole:], 0, full_step, moved_T, whole)
                # No bit is set beyond the last column.
                moved_T[width:] = threshold
                pack_above(moved_T, whole, threshold, packed_W, 0)
                bits[byte + whole // 8 : byte + (width + 7) // 8] = packed_W[: (rest + 7) // 8]
            if keep:
                logits[to : to + width] = moved_T[:width]


# --- called with checked arguments ---


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
    run_on_column_shares(lambda begin, end: _sums_pass(*arguments, begin, end), slope_P.numel(), WIDE)
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
        bits.view(-1).numpy(),
    )
    run_on_column_shares(lambda begin, end: _bits_pass(*arguments, begin, end), num_params, WIDE)
    return bits
