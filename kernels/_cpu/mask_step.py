"""The fused mask step on a CPU: one Numba loop over column tiles that stay in the L2 cache, columns shared among threads.

Eager torch needs nine passes over a tile for the same work. LLVM turns the inner loops into vector code only if it sees few
arrays, written in place, and no library call: hence the packed (2, tile) buffers and the polynomial exponential below.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import llvmlite.ir as llvm
import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

# Columns a tile: updates, logits and sums of 64 rows fit in 1 MB of L2.
TILE = 1024
# Rows that are added up before they join the total: keeps float32 rounding from growing with the number of clients.
ROWS_A_BATCH = 64

_JIT = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": {"contract"}, "cache": True}

_MINUS_LOG2_E = np.float32(-1.4426950408889634)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer and leaves that in the low bits
_LARGEST = np.float32(87.0)  # exp(87) is still a normal float32
# 2**f on |f| <= 1/2: the polynomial through the Chebyshev nodes, error below 1e-8 relative
_C6, _C5, _C4, _C3, _C2, _C1 = (
    np.float32(c)
    for c in (1.545316295e-04, 1.339086336e-03, 9.618082557e-03, 5.550357114e-02, 2.402265076e-01, 6.931471880e-01)
)
_ONE = np.float32(1.0)


# --- scalar building blocks (inlined, vectorised by LLVM) --------------------------------------------------------------


@intrinsic
def _as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits these 32 are."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], llvm.FloatType())


@intrinsic
def _as_bits(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], llvm.IntType(32))


@intrinsic
def _widen(typingctx: Any, value: Any) -> Any:
    """A stored update as a float: bfloat16 arrives as uint16 and is the upper half of a float32."""

    def widen_bfloat16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], llvm.IntType(32)), llvm.Constant(llvm.IntType(32), 16))
        return builder.bitcast(wide, llvm.FloatType())

    if value == types.uint16:
        return types.float32(types.uint16), widen_bfloat16
    return value(value), lambda context, builder, sig, args: args[0]


@intrinsic
def _clamp(typingctx: Any, value: Any, limit: Any) -> Any:
    """min(max(value, -limit), limit) as two selects, which vectorise; numba's own min and max test for NaN."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, limit = args
        low = builder.fneg(limit)
        value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
        return builder.select(builder.fcmp_ordered("<", value, limit), value, limit)

    return value(value, value), code


def _sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) in the type of ``x``; for jitted code only."""
    raise NotImplementedError


@overload(_sigmoid, inline="always")
def _sigmoid_of_type(x: Any) -> Any:
    if x == types.float64:

        def sigmoid_float64(x: Any) -> Any:
            return 1.0 / (1.0 + math.exp(-x))

        return sigmoid_float64

    def sigmoid_float32(x: Any) -> Any:
        y = _clamp(x, _LARGEST)
        rounded = y * _MINUS_LOG2_E + _ROUND
        power = rounded - _ROUND
        f = y * _MINUS_LOG2_E - power  # one fused multiply-add
        p = (((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _ONE
        # multiply by 2**power: add it to the exponent field
        e = _as_float(np.int32(_as_bits(p) + np.int32(_as_bits(rounded) << np.int32(23))))
        return _ONE / (_ONE + e)

    return sigmoid_float32


# --- the passes -------------------------------------------------------------------------------------------------------


# Matrices come flat, row i at i * stride; vectors_2P holds slope and mean.


@njit(**_JIT)
def _step_row(update_T: Any, logits_T: Any, vectors_2T: Any, full_step: Any, one: Any) -> None:
    for k in range(update_T.shape[0]):
        logit = logits_T[k]
        gate = _sigmoid(logit)
        gradient = vectors_2T[0, k] * (gate - gate * gate) * (_widen(update_T[k]) - vectors_2T[1, k])
        logits_T[k] = logit - _clamp(gradient, one) * full_step


@njit(**_JIT)
def _add_row(update_T: Any, logits_T: Any, sums_2T: Any) -> None:
    for k in range(update_T.shape[0]):
        gate = _sigmoid(logits_T[k])
        sums_2T[0, k] += gate
        sums_2T[1, k] += gate * _widen(update_T[k])


@njit(**_JIT)
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


@njit(**_JIT)
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


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mask-step")


def _run_on_column_shares(run: Any, num_params: int) -> None:
    """Call ``run(begin, end)`` on whole tiles, one share a torch thread; columns never meet, so the shares change nothing."""
    num_threads = torch.get_num_threads()
    tiles = -(-num_params // TILE)
    edges = sorted({min(tiles * i // num_threads * TILE, num_params) for i in range(num_threads + 1)})
    shares = list(itertools.pairwise(edges))
    if len(shares) == 1:
        run(*shares[0])
    else:
        list(_pool(num_threads).map(lambda share: run(*share), shares))


def _flat(rows_RP: Tensor) -> tuple[np.ndarray, int]:
    """The memory from the first to the last element as one contiguous array (a view), and the row stride in it.

    A strided 2-D array would hide from the compiler that columns are adjacent. bfloat16, which numpy has not, comes as uint16.
    """
    num_rows, num_params = rows_RP.shape
    flat = rows_RP.detach().as_strided(((num_rows - 1) * rows_RP.stride(0) + num_params,), (1,))
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy(), rows_RP.stride(0)


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
        *_flat(updates_RP),
        *_flat(logits_RP),
        init is not None,
        real(init or 0.0),
        vectors_2P,
        real(full_step),
        sums_2P.numpy(),
    )
    _run_on_column_shares(lambda begin, end: _sums_pass(*arguments, begin, end), slope_P.numel())
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
    logits, logits_stride = (np.empty(num_params, real), 0) if stored_RP is None else _flat(stored_RP)
    bits = torch.empty(num_rows, -(-num_params // 8), dtype=torch.uint8)
    arguments = (
        num_rows,
        *_flat(updates_RP),
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
    _run_on_column_shares(lambda begin, end: _bits_pass(*arguments, begin, end), num_params)
    return bits
