"""What the Numba kernels share: stored updates as floats, tiles shared among threads, and flat views of tensors.

Numba's cache on disk notices a change of the file a kernel stands in, not of this one: after changing it, `make clean`.
"""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.ir as llvm
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

JIT = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": {"contract"}, "cache": True}

# Shares of the columns a thread: a thread that is late, because something else runs on its core, takes fewer.
SHARES_PER_THREAD = 4
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """A stored update as a float: bfloat16 arrives as uint16 and is the upper half of a float32."""

    def widen_bfloat16(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], llvm.IntType(32)), llvm.Constant(llvm.IntType(32), 16))
        return builder.bitcast(wide, llvm.FloatType())

    if value == types.uint16:
        return types.float32(types.uint16), widen_bfloat16
    return value(value), lambda context, builder, sig, args: args[0]


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
