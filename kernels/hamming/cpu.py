"""Differing bits on a CPU, in Numba: exclusive or, population count and sum, in tiles.

The tiles of rows and bytes stay in the cache. With many rows, the columns in which all rows agree
are taken out first, and the others packed anew.
"""

from functools import cache

import llvmlite.ir as llvm
import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from skymask_gpu.kernels.shared.cpu import JIT, varying_pass
from skymask_gpu.kernels.shared.threads import run_on_column_shares
from skymask_gpu.kernels.shared.vectors import INDEX, address, call, repeat, vector_code

# The rows of the two tiles that are compared, one in the L2 cache and one in the L1 cache, and the
# bytes of each row that are compared before the next ones are.
TILE, OTHER_TILE, CHUNK = 64, 16, 1024
# The number of rows of the second tile that are compared at once with a row of the first.
GROUP = 4
# From this number of rows on, packing costs less than it saves. With 500 rows of a CNN on MNIST,
# this depends on how many columns vary: it pays with a quarter of them, not with three quarters.
MANY_ROWS = 1024
# The number of bytes of a row that a thread reads before it goes to the next row.
_BYTES_AT_ONCE = 4096
_VECTOR = llvm.VectorType(llvm.IntType(64), 8)


@vector_code(types.void)
def add_differing(builder, bits, a, b, stride, last, vectors, sums, to):
    """Count the bits in which ``bits[a:]`` and ``bits[b + n * stride:]`` differ, for n < GROUP.

    The counts are added to ``sums[to + n]``. If ``b + n * stride`` lies beyond ``last``, ``last``
    takes its place.

    Args:
        vectors: how many times 64 bytes are compared, at least 1.
    """
    starts = [b]
    for _ in range(GROUP - 1):
        start = builder.add(starts[-1], stride)
        starts.append(builder.select(builder.icmp_signed("<", start, last), start, last))

    def load(position):
        return builder.load(address(builder, bits, position, _VECTOR), align=1)

    def next_vector(at, *totals):
        ours = load(builder.add(a, at))
        differing = [builder.xor(ours, load(builder.add(start, at))) for start in starts]
        counted = [call(builder, "llvm.ctpop.v8i64", _VECTOR, flags) for flags in differing]
        totals = [builder.add(total, count) for total, count in zip(totals, counted, strict=True)]
        at = builder.add(at, INDEX(64))
        return (at, *totals), builder.icmp_signed("<", at, builder.mul(vectors, INDEX(64)))

    none = [llvm.Constant(_VECTOR, [0] * 8)] * GROUP
    _, *totals = repeat(builder, (INDEX(0), *none), next_vector)
    for n, total in enumerate(totals):
        place = builder.gep(sums.pointer, [builder.add(to, INDEX(n))])
        differing = builder.trunc(call(builder, "llvm.vector.reduce.add.v8i64", INDEX, total), llvm.IntType(32))
        builder.store(builder.add(builder.load(place), differing), place)


def add_differing_reference(bits, a, b, stride, last, vectors, sums, to):
    for n in range(GROUP):
        other = min(b + n * stride, last)
        differing = bits[a : a + 64 * vectors] ^ bits[other : other + 64 * vectors]
        sums[to + n] += np.unpackbits(differing).sum()


@vector_code(types.uint8)
def _count_bits(builder, value):
    return builder.ctpop(value)


@njit(**JIT)
def _count_pass(bits, num_bytes, unit, first_other, counts, begin, end):
    """Compare rows ``begin`` to ``end`` with those from ``first_other`` on.

    ``counts`` has a column for each of the latter. If ``first_other`` is 0, all pairs are compared:
    each pair once, and its count is stored twice.
    """
    num_rows = first_other + counts.shape[1]
    whole = num_bytes // 64 * 64
    sums = np.empty(TILE * OTHER_TILE, np.int32)
    for first in range(begin, end, TILE):
        rows = min(TILE, end - first)
        for other in range(first_other if first_other > 0 else first // OTHER_TILE * OTHER_TILE, num_rows, OTHER_TILE):
            others = min(OTHER_TILE, num_rows - other)
            sums[:] = 0
            for at in range(0, whole, CHUNK):
                vectors = min(CHUNK, whole - at) // 64
                for i in range(rows):
                    ours = (first + i) * num_bytes + at
                    for j in range(0, others, GROUP):
                        theirs, last = (other + j) * num_bytes + at, (other + others - 1) * num_bytes + at
                        add_differing(bits, ours, theirs, num_bytes, last, vectors, sums, i * OTHER_TILE + j)
            for i in range(rows):
                for j in range(others):
                    for byte in range(whole, num_bytes):
                        differing = bits[(first + i) * num_bytes + byte] ^ bits[(other + j) * num_bytes + byte]
                        sums[i * OTHER_TILE + j] += _count_bits(differing)
                    count = (sums[i * OTHER_TILE + j] + unit // 2) // unit
                    counts[first + i, other + j - first_other] = count
                    if first_other == 0:
                        counts[other + j, first + i] = count


@njit(**JIT)
def _pack_pass(bits, num_bytes, at_V, flags_V, chosen, packed_RC, begin, end):
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
    """A table, ``[flags, byte]``: the byte's bits whose flags are set, moved to the low end."""
    chosen = np.zeros((256, 256), np.uint8)
    flags, byte = np.arange(256)[:, None], np.arange(256)[None]
    number = np.zeros((256, 1), np.int64)
    for bit in range(8):
        is_set = flags >> bit & 1
        chosen |= (is_set * (byte >> bit & 1) << number).astype(np.uint8)
        number += is_set
    return chosen


def without_constant_columns(bits: Tensor) -> Tensor:
    """Pack only the columns in which rows differ, into ``(R, bytes)``.

    The bytes are a multiple of 64, the last ones 0: the few bytes behind whole vectors are compared
    one by one, which for small models takes longer than all vectors.
    """
    num_rows, num_bytes = bits.shape
    flat = bits.contiguous().view(-1).numpy()
    varying_B = np.zeros(num_bytes, np.uint8)
    run_on_column_shares(lambda begin, end: varying_pass(flat, num_rows, varying_B, begin, end), num_bytes, _BYTES_AT_ONCE)
    at_V = np.flatnonzero(varying_B)
    # NumPy 1.26 has no bitwise_count.
    num_columns = int(np.unpackbits(varying_B).sum())
    packed_RC = torch.zeros(num_rows, 64 * max(1, -(-num_columns // 512)), dtype=torch.uint8)
    arguments = (flat, num_bytes, at_V, varying_B[at_V], _chosen_bits(), packed_RC.numpy())
    run_on_column_shares(lambda begin, end: _pack_pass(*arguments, begin, end), num_rows, TILE)
    return packed_RC


def hamming_counts(bits: Tensor, unit: int, dtype: torch.dtype) -> Tensor:
    if len(bits) >= MANY_ROWS:
        bits = without_constant_columns(bits)
    num_rows, num_bytes = bits.shape
    counts_RR = torch.empty(num_rows, num_rows, dtype=dtype)
    arguments = (bits.contiguous().view(-1).numpy(), num_bytes, unit, 0, counts_RR.numpy())
    run_on_column_shares(lambda begin, end: _count_pass(*arguments, begin, end), num_rows, TILE)
    return counts_RR


def hamming_counts_between(bits: Tensor, others: Tensor) -> Tensor:
    """Both sets of rows are put one below the other, so that they are packed alike."""
    both = torch.cat([bits, others])
    if len(both) >= MANY_ROWS:
        both = without_constant_columns(both)
    counts_RS = torch.empty(len(bits), len(others), dtype=torch.int32)
    arguments = (both.view(-1).numpy(), both.shape[1], 1, len(bits), counts_RS.numpy())
    run_on_column_shares(lambda begin, end: _count_pass(*arguments, begin, end), len(bits), TILE)
    return counts_RS
