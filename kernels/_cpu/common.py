"""What the Numba kernels share: vectorisable scalar functions, tiles shared among threads, and flat views of tensors.

Numba's cache on disk notices a change of the file a kernel stands in, not of this one: after changing it, `make clean`.
"""

import ctypes
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.ir as llvm
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

JIT = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": {"contract"}, "cache": True}

MINUS_LOG2_E = np.float32(-1.4426950408889634)
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer and leaves that in the low bits
LARGEST = np.float32(87.0)  # exp(87) is still a normal float32
# 2**f on |f| <= 1/2, highest power first: the polynomial through the Chebyshev nodes, error below 1e-8 relative
POWER_OF_2 = tuple(
    np.float32(c)
    for c in (1.545316295e-04, 1.339086336e-03, 9.618082557e-03, 5.550357114e-02, 2.402265076e-01, 6.931471880e-01, 1.0)
)
_C6, _C5, _C4, _C3, _C2, _C1, _ = POWER_OF_2
_ONE = np.float32(1.0)

# Shares of the columns a thread: a thread that is late, because something else runs on its core, takes fewer.
SHARES_PER_THREAD = 4
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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
def widen(typingctx: Any, value: Any) -> Any:
    """A stored update as a float: bfloat16 arrives as uint16 and is the upper half of a float32."""

    def widen_bfloat16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], llvm.IntType(32)), llvm.Constant(llvm.IntType(32), 16))
        return builder.bitcast(wide, llvm.FloatType())

    if value == types.uint16:
        return types.float32(types.uint16), widen_bfloat16
    return value(value), lambda context, builder, sig, args: args[0]


@intrinsic
def clamp(typingctx: Any, value: Any, limit: Any) -> Any:
    """min(max(value, -limit), limit) as two selects, which vectorise; numba's own min and max test for NaN."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, limit = args
        low = builder.fneg(limit)
        value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
        return builder.select(builder.fcmp_ordered("<", value, limit), value, limit)

    return value(value, value), code


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) in the type of ``x``; for jitted code only."""
    raise NotImplementedError


@overload(sigmoid, inline="always")
def _sigmoid_of_type(x: Any) -> Any:
    if x == types.float64:

        def sigmoid_float64(x: Any) -> Any:
            return 1.0 / (1.0 + math.exp(-x))

        return sigmoid_float64

    def sigmoid_float32(x: Any) -> Any:
        y = clamp(x, LARGEST)
        exponent = y * MINUS_LOG2_E
        rounded = exponent + ROUND
        f = exponent - (rounded - ROUND)
        p = (((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _ONE
        # multiply by 2**power: add it to the exponent field
        e = _as_float(np.int32(_as_bits(p) + np.int32(_as_bits(rounded) << np.int32(23))))
        return _ONE / (_ONE + e)

    return sigmoid_float32


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch itself runs on, if it is GNU's; None elsewhere."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="skymask-kernel")


def run_on_column_shares(run: Callable[[int, int], object], num_params: int, tile: int) -> None:
    """Call ``run(begin, end)`` on whole tiles, shared among torch's threads; columns never meet, so shares change nothing."""
    num_threads = torch.get_num_threads()
    tiles = -(-num_params // tile)
    num_shares = min(tiles, num_threads * SHARES_PER_THREAD) if num_threads > 1 else 1
    edges = [min(tiles * i // num_shares * tile, num_params) for i in range(num_shares + 1)]
    shares = list(itertools.pairwise(edges))
    if len(shares) == 1:
        run(*shares[0])
        return
    openmp = _openmp()
    if openmp is None:
        list(_pool(num_threads).map(lambda share: run(*share), shares))
        return
    # After each operation torch's threads wait by spinning for milliseconds, on the cores that threads of our own would need
    left, errors = iter(shares), []

    @_CALLBACK
    def work(_: Any) -> None:
        try:
            for share in left:
                run(*share)
        except BaseException as error:  # would be lost: it cannot cross the C stack
            errors.append(error)

    openmp.GOMP_parallel(work, None, num_threads, 0)
    if errors:
        raise errors[0]


def flat(rows_RP: Tensor) -> tuple[np.ndarray, int]:
    """The memory from the first to the last element as one contiguous array (a view), and the row stride in it.

    A strided 2-D array would hide from the compiler that columns are adjacent. bfloat16, which numpy has not, comes as uint16.
    """
    num_rows, num_params = rows_RP.shape
    memory = rows_RP.detach().as_strided(((num_rows - 1) * rows_RP.stride(0) + num_params,), (1,))
    return (memory.view(torch.uint16) if memory.dtype == torch.bfloat16 else memory).numpy(), rows_RP.stride(0)
