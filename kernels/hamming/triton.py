"""Differing bits, pair by pair, in Triton. There are two kernels, chosen by the number of rows.

* popcount: exclusive or and population count of 32 columns at a time. A multiprocessor counts the
  bits of 16 words per clock (sm_80 to 100), so it compares 512 pairs of bits.
* tensor core: bits are spread to bytes, and int8 products of tiles make the Gram matrix of the 0/1
  matrix, from which the counts follow. On sm_90 a warp issues 294 instructions for 256 columns of a
  64 x 64 tile, and four warps take turns. That makes 3,600 pairs of bits per clock, near the tensor
  cores' own limit of 4,096.

A program owns a tile of pairs on or above the diagonal and a share of the columns. Shares are added
up by atomics, which are exact for integers in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.shared.triton import Variant, count_ones, kernel, launch_options, on_device_of

# Words of 32 columns that a program looks at together; rows are padded to a multiple of them.
UNIT_WORDS = 8
POPCOUNT_BLOCK_R = 16
POPCOUNT_WARPS = 1
GRAM_BLOCK_R = 64
GRAM_WARPS = 4
# Up to this number of rows, one tile by population count (256 pairs at 512 per clock) is faster
# than one by tensor cores (4,096 at 3,600). With more rows, three tiles of the first kind already
# take longer. This follows from counted instructions; it is not measured on a GPU.
POPCOUNT_ROWS = 16
# From this number of rows on, only bytes that vary are looked at. The product grows with the square
# of the rows, finding and copying the bytes with their number. This follows from bytes and
# operations; it is not measured on a GPU.
MANY_ROWS = 2048
# This number of programs fills any current GPU (an H200 has 132 multiprocessors), and needs few
# atomics.
ENOUGH_PROGRAMS = 512


@triton.jit
def _share_of_units(units_ptr):
    """The first unit of this program, and the first one after its last."""
    num_units = tl.load(units_ptr)
    share = tl.cdiv(num_units, tl.num_programs(2))
    begin = tl.program_id(2) * share
    return begin, tl.minimum(begin + share, num_units)


@triton.jit
def _spread(words, bit, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Bit ``bit`` of every byte, as a byte 0 or 1: ``[ROWS, 4 * WORDS]`` int8, packed in fours."""
    flags = (words >> bit) & 0x01010101
    flags = tl.join(flags, flags >> 16)
    flags = tl.join(flags, flags >> 8)
    return tl.reshape(flags, [ROWS, 4 * WORDS]).to(tl.int8)


@kernel
def hamming_popcount_kernel(
    # pointers
    words_ptr,  # (R, W) uint32
    units_ptr,  # (1,) int32, how many units to look at
    sums_ptr,  # (R, R) int32, on and above the diagonal added to
    # sizes
    num_rows,
    row_units,
    # meta-parameters
    UNIT_WORDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if tl.program_id(1) < tl.program_id(0):
        return
    offs_i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Rows beyond the last are the last one again, and are not stored.
    row_i = words_ptr + tl.minimum(offs_i, num_rows - 1).to(tl.int64) * row_units * UNIT_WORDS
    row_j = words_ptr + tl.minimum(offs_j, num_rows - 1).to(tl.int64) * row_units * UNIT_WORDS
    differing = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.int32)
    begin, end = _share_of_units(units_ptr)
    for unit in range(begin, end):
        for k in tl.static_range(UNIT_WORDS):
            word_i = tl.load(row_i + unit * UNIT_WORDS + k)  # [BLOCK_R]
            word_j = tl.load(row_j + unit * UNIT_WORDS + k)  # [BLOCK_R]
            differing += count_ones(word_i[:, None] ^ word_j[None, :])
    at = offs_i.to(tl.int64)[:, None] * num_rows + offs_j[None, :]
    tl.atomic_add(sums_ptr + at, differing, mask=(offs_i < num_rows)[:, None] & (offs_j < num_rows)[None, :], sem="relaxed")


@kernel
def hamming_gram_kernel(
    # pointers
    words_ptr,  # (R, W) uint32
    units_ptr,  # (1,) int32, how many units to look at
    sums_ptr,  # (R, R) int32, on and above the diagonal added to
    # sizes
    num_rows,
    row_units,
    # meta-parameters
    UNIT_WORDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if tl.program_id(1) < tl.program_id(0):
        return
    offs_i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_i = words_ptr + tl.minimum(offs_i, num_rows - 1).to(tl.int64) * row_units * UNIT_WORDS
    row_j = words_ptr + tl.minimum(offs_j, num_rows - 1).to(tl.int64) * row_units * UNIT_WORDS
    gram = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.int32)
    begin, end = _share_of_units(units_ptr)
    for unit in range(begin, end):
        offs_w = unit * UNIT_WORDS + tl.arange(0, UNIT_WORDS)
        words_i = tl.load(row_i[:, None] + offs_w[None, :])  # [BLOCK_R, UNIT_WORDS]
        words_j = tl.load(row_j[:, None] + offs_w[None, :])  # [BLOCK_R, UNIT_WORDS]
        for bit in tl.static_range(8):
            ones_i = _spread(words_i, bit, BLOCK_R, UNIT_WORDS)
            ones_j = _spread(words_j, bit, BLOCK_R, UNIT_WORDS)
            # Up to Triton 3.7 the result would be float32 without out_dtype.
            gram = tl.dot(ones_i, tl.trans(ones_j), gram, out_dtype=tl.int32)
    at = offs_i.to(tl.int64)[:, None] * num_rows + offs_j[None, :]
    tl.atomic_add(sums_ptr + at, gram, mask=(offs_i < num_rows)[:, None] & (offs_j < num_rows)[None, :], sem="relaxed")


# --- called with checked arguments ---


def hamming_counts(bits: Tensor, unit: int, dtype: torch.dtype) -> Tensor:
    count = popcount_counts if len(bits) <= POPCOUNT_ROWS else gram_counts
    counts_RR = count(bits, varying_bytes(bits) if len(bits) >= MANY_ROWS else None)
    if unit > 1:
        counts_RR.add_(unit // 2).div_(unit, rounding_mode="floor")
    return counts_RR.to(dtype)


def varying_bytes(bits: Tensor) -> Tensor:
    """The bytes in which not all rows are equal, ``(bytes,)`` bool. The bits are read once."""
    lowest, highest = bits.aminmax(dim=0)
    return lowest != highest


def popcount_counts(bits: Tensor, columns: Tensor | None = None) -> Tensor:
    """Count the differing bits by population counts, ``(R, R)`` int32."""
    return _sum_over_units(hamming_popcount_kernel, bits, columns, POPCOUNT_BLOCK_R, POPCOUNT_WARPS)


def gram_counts(bits: Tensor, columns: Tensor | None = None) -> Tensor:
    """``(R, R)`` int32, by tensor cores: rows i and j differ in G[i,i] + G[j,j] - 2 G[i,j] bits."""
    gram_RR = _sum_over_units(hamming_gram_kernel, bits, columns, GRAM_BLOCK_R, GRAM_WARPS)
    ones_R = gram_RR.diagonal().clone()
    return gram_RR.mul_(-2).add_(ones_R[:, None]).add_(ones_R)


def _sum_over_units(counting_kernel: object, bits: Tensor, columns: Tensor | None, block_r: int, num_warps: int) -> Tensor:
    num_rows = len(bits)
    words_RW, units_1 = _words(bits, columns)
    row_units = words_RW.shape[1] // UNIT_WORDS
    num_tiles = triton.cdiv(num_rows, block_r)
    num_splits = max(1, min(row_units, ENOUGH_PROGRAMS // (num_tiles * (num_tiles + 1) // 2)))
    sums_RR = torch.zeros(num_rows, num_rows, dtype=torch.int32, device=bits.device)
    with on_device_of(bits):
        counting_kernel[(num_tiles, num_tiles, num_splits)](
            words_RW,
            units_1,
            sums_RR,
            num_rows,
            row_units,
            UNIT_WORDS=UNIT_WORDS,
            BLOCK_R=block_r,
            **launch_options(num_warps),
        )
    sums_RR.triu_()
    return sums_RR.add_(sums_RR.triu(1).T)


def _words(bits: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows as whole units of words, ``(R, W)`` uint32, and how many units to look at.

    That number is ``(1,)`` int32, and the host does not wait for it.


    Bytes of ``columns`` come first, then zeros, in which no rows differ.
    """
    unit_bytes = 4 * UNIT_WORDS
    if columns is None:
        units_1 = torch.full((1,), triton.cdiv(bits.shape[1], unit_bytes), dtype=torch.int32, device=bits.device)
    else:
        order = columns.argsort(descending=True, stable=True)
        bits = bits.index_select(1, order).mul_(columns[order])
        units_1 = (columns.sum(dtype=torch.int32).view(1) + unit_bytes - 1) // unit_bytes
    # If the rows' length is no multiple of a unit, they are copied and padded. This moves fewer
    # bytes than one tile of rows has to read.
    padding = -bits.shape[1] % unit_bytes
    padded = torch.nn.functional.pad(bits, (0, padding)) if padding else bits.contiguous()
    return padded.view(torch.uint32), units_1


# The offline compile builds these.
VARIANTS = tuple(
    Variant(
        name,
        counting_kernel,
        num_warps,
        {"words_ptr": "u32", "units_ptr": "i32", "sums_ptr": "i32"},
        {"UNIT_WORDS": UNIT_WORDS, "BLOCK_R": block_r},
    )
    for name, counting_kernel, block_r, num_warps in (
        ("hamming_popcount", hamming_popcount_kernel, POPCOUNT_BLOCK_R, POPCOUNT_WARPS),
        ("hamming_gram", hamming_gram_kernel, GRAM_BLOCK_R, GRAM_WARPS),
    )
)
