"""What all Numba kernels share: compiler options, and updates as flat arrays of floats.

The kernels' arguments are not annotated, here and in all files that only Numba or Triton compile:
they have no Python types, ``Any`` on each would say nothing, and mypy leaves these files out.
"""

import llvmlite.ir as llvm
import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

# Without bounds checks, and with a division by zero as in NumPy, loops become vectors. "contract"
# allows a fused multiply-add, and no other change of the order of rounding.
JIT = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": {"contract"}, "cache": True}


@intrinsic
def widen(typingctx, value):
    """The stored update as a float. A bfloat16 arrives as uint16, the upper half of a float32."""

    def widen_bfloat16(context, builder, sig, args):
        wide = builder.shl(builder.zext(args[0], llvm.IntType(32)), llvm.Constant(llvm.IntType(32), 16))
        return builder.bitcast(wide, llvm.FloatType())

    if value == types.uint16:
        return types.float32(types.uint16), widen_bfloat16
    return value(value), lambda context, builder, sig, args: args[0]


@njit(**JIT)
def widen_row(update_T, value_T):
    for k in range(update_T.size):
        value_T[k] = widen(update_T[k])


@njit(**JIT)
def copy(to_T, from_T):
    for k in range(to_T.size):
        to_T[k] = from_T[k]


@njit(**JIT)
def _add_differing(one_T, other_T, differing_T):
    for k in range(differing_T.size):
        differing_T[k] |= one_T[k] ^ other_T[k]


@njit(**JIT)
def varying_pass(flat_bits, num_rows, varying_W, begin, end):
    """Set, in words (or bytes) from ``begin`` to ``end``, the bits in which not all rows agree."""
    num_words = varying_W.size
    for row in range(1, num_rows):
        at = row * num_words
        _add_differing(flat_bits[begin:end], flat_bits[at + begin : at + end], varying_W[begin:end])


def flat(rows_RP: Tensor) -> tuple[np.ndarray, int]:
    """The memory from the first to the last element as one flat array (a view), and the row stride.

    A strided 2-D array would hide from the compiler that columns are adjacent. NumPy has no
    bfloat16; it is viewed as uint16.
    """
    num_rows, num_params = rows_RP.shape
    memory = rows_RP.detach().as_strided(((num_rows - 1) * rows_RP.stride(0) + num_params,), (1,))
    return (memory.view(torch.uint16) if memory.dtype == torch.bfloat16 else memory).numpy(), rows_RP.stride(0)
