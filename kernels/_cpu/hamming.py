"""Differing bits on a CPU: exclusive or, population count and sum, in tiles of rows and bytes that stay in the cache.

Before, of many rows, the columns in which all rows agree are taken out and the others packed anew.
"""

from functools import cache
from typing import Any

import llvmlite.ir as llvm
import numpy as np
import torch
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from skymask_gpu.kernels._cpu.common import JIT, run_on_column_shares

# Rows of one tile (L2) and of the other (L1), and the bytes of each looked at before the next.
TILE, OTHER_TILE, CHUNK = 64, 16, 1024
# Rows of the other tile that are compared at once.
GROUP = 4
# From so many rows on, packing costs less than it saves; measured on masks of a CNN on MNIST: at 500 rows as much.
MANY_ROWS = 1024
# Bytes of a row that one thread looks at before the next row.
_BYTES_AT_ONCE = 4096
_VECTOR = llvm.VectorType(llvm.IntType(64), 8)
_INDEX = llvm.IntType(64)


@intrinsic
def _add_differing(typingctx: Any, bits: Any, a: Any, b: Any, stride: Any, last: Any, vectors: Any, sums: Any, to: Any) -> Any:
    """Add the number of bits in which ``bits[a:]`` and ``bits[b + n * stride:]`` differ to ``sums[to + n]``, for n < GROUP.

    Where ``b + n * stride`` lies beyond ``last``, ``last`` is looked at instead. ``vectors``, at least 1: how many times 64
    bytes are compared.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = context.make_array(sig.args[0])(context, builder, args[0]).data
        sums = context.make_array(sig.args[6])(context, builder, args[6]).data
        module = builder.module
        count_bits = get_or_insert_function(module, llvm.FunctionType(_VECTOR, [_VECTOR]), "llvm.ctpop.v8i64")
        add_up = get_or_insert_function(module, llvm.FunctionType(_INDEX, [_VECTOR]), "llvm.vector.reduce.add.v8i64")

        def load(position: Any) -> Any:
            return builder.load(builder.bitcast(builder.gep(bits, [position]), _VECTOR.as_pointer()), align=1)

        starts = [args[2]]
        for _ in range(GROUP - 1):
            start = builder.add(starts[-1], args[3])
            starts.append(builder.select(builder.icmp_signed("<", start, args[4]), start, args[4]))
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(_INDEX)
        at.add_incoming(_INDEX(0), before)
        totals = [builder.phi(_VECTOR) for _ in starts]
        ours = load(builder.add(args[1], at))
        differing = [builder.xor(ours, load(builder.add(start, at))) for start in starts]
        now = [builder.add(total, builder.call(count_bits, [bits])) for total, bits in zip(totals, differing, strict=True)]
        for total, value in zip(totals, now, strict=True):
            total.add_incoming(llvm.Constant(_VECTOR, [0] * 8), before)
            total.add_incoming(value, loop)
        next_at = builder.add(at, _INDEX(64))
        at.add_incoming(next_at, loop)
        builder.cbranch(builder.icmp_signed("<", next_at, builder.mul(args[5], _INDEX(64))), loop, after)
        builder.position_at_end(after)
        for n, value in enumerate(now):
            place = builder.gep(sums, [builder.add(args[7], _INDEX(n))])
            differing = builder.trunc(builder.call(add_up, [value]), llvm.IntType(32))
            builder.store(builder.add(builder.load(place), differing), place)
        return context.get_dummy_value()

    return types.void(bits, a, b, stride, last, vectors, sums, to), code


@intrinsic
def _count_bits(typingctx: Any, value: Any) -> Any:
    return types.uint8(types.uint8), lambda context, builder, sig, args: builder.ctpop(args[0])


@njit(**JIT)
def _count_pass(bits: Any, num_bytes: Any, unit: Any, counts_RR: Any, begin: Any, end: Any) -> None:
    num_rows = counts_RR.shape[0]
    whole = num_bytes // 64 * 64
    sums = np.empty(TILE * OTHER_TILE, np.int32)
    for first in range(begin, end, TILE):
        rows = min(TILE, end - first)
        for other in range(first // OTHER_TILE * OTHER_TILE, num_rows, OTHER_TILE):
            others = min(OTHER_TILE, num_rows - other)
            sums[:] = 0
            for at in range(0, whole, CHUNK):
                vectors = min(CHUNK, whole - at) // 64
                for i in range(rows):
                    ours = (first + i) * num_bytes + at
                    for j in range(0, others, GROUP):
                        theirs, last = (other + j) * num_bytes + at, (other + others - 1) * num_bytes + at
                        _add_differing(bits, ours, theirs, num_bytes, last, vectors, sums, i * OTHER_TILE + j)
            for i in range(rows):
                for j in range(others):
                    for byte in range(whole, num_bytes):
                        differing = bits[(first + i) * num_bytes + byte] ^ bits[(other + j) * num_bytes + byte]
                        sums[i * OTHER_TILE + j] += _count_bits(differing)
                    count = (sums[i * OTHER_TILE + j] + unit // 2) // unit
                    counts_RR[first + i, other + j] = count
                    counts_RR[other + j, first + i] = count


@njit(**JIT)
def _varying_pass(bits: Any, num_rows: Any, varying_B: Any, begin: Any, end: Any) -> None:
    num_bytes = varying_B.size
    for row in range(1, num_rows):
        for byte in range(begin, end):
            varying_B[byte] |= bits[row * num_bytes + byte] ^ bits[byte]


@njit(**JIT)
def _pack_pass(bits: Any, num_bytes: Any, at_V: Any, flags_V: Any, chosen: Any, packed_RC: Any, begin: Any, end: Any) -> None:
    for row in range(begin, end):
        waiting, number, to = np.uint64(0), np.uint64(0), 0
        for v in range(at_V.size):
            flags = flags_V[v]
            waiting |= np.uint64(chosen[flags, bits[row * num_bytes + at_V[v]]]) << number
            number += np.uint64(_count_bits(flags))
            if number >= 8:
                packed_RC[row, to] = waiting & np.uint64(255)
                waiting, number, to = waiting >> np.uint64(8), number - np.uint64(8), to + 1
        if number > 0:
            packed_RC[row, to] = waiting


@cache
def _chosen_bits() -> np.ndarray:
    """``[flags, byte]``: the bits of the byte where the flags are set, side by side from the lowest on."""
    chosen = np.zeros((256, 256), np.uint8)
    flags, byte = np.arange(256)[:, None], np.arange(256)[None]
    number = np.zeros((256, 1), np.int64)
    for bit in range(8):
        is_set = flags >> bit & 1
        chosen |= (is_set * (byte >> bit & 1) << number).astype(np.uint8)
        number += is_set
    return chosen


def without_constant_columns(bits: Tensor) -> Tensor:
    """The columns in which not all rows agree, packed anew, ``(R, bytes)``; at least one byte."""
    num_rows, num_bytes = bits.shape
    flat = bits.contiguous().view(-1).numpy()
    varying_B = np.zeros(num_bytes, np.uint8)
    run_on_column_shares(lambda begin, end: _varying_pass(flat, num_rows, varying_B, begin, end), num_bytes, _BYTES_AT_ONCE)
    at_V = np.flatnonzero(varying_B)
    num_columns = int(np.unpackbits(varying_B).sum())  # NumPy 1.26 has no bitwise_count
    packed_RC = torch.zeros(num_rows, max(1, -(-num_columns // 8)), dtype=torch.uint8)
    arguments = (flat, num_bytes, at_V, varying_B[at_V], _chosen_bits(), packed_RC.numpy())
    run_on_column_shares(lambda begin, end: _pack_pass(*arguments, begin, end), num_rows, TILE)
    return packed_RC


def hamming_counts(bits: Tensor, unit: int, dtype: torch.dtype) -> Tensor:
    if len(bits) >= MANY_ROWS:
        bits = without_constant_columns(bits)
    num_rows, num_bytes = bits.shape
    counts_RR = torch.empty(num_rows, num_rows, dtype=dtype)
    arguments = (bits.contiguous().view(-1).numpy(), num_bytes, unit, counts_RR.numpy())
    run_on_column_shares(lambda begin, end: _count_pass(*arguments, begin, end), num_rows, TILE)
    return counts_RR
