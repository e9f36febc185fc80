"""Differing bits, pair by pair, in Triton. There are two kernels, chosen by the number of rows.

* popcount: exclusive or and population count of 32 columns at a time. A multiprocessor counts the
  bits of 16 words per clock (sm_80 to 100), so it compares 512 pairs of bits.
* tensor core: bits are spread to bytes, and int8 products of tiles make the Gram matrix of the 0/1
  matrix, from which the counts follow. On sm_90 a warp issues 294 instructions for 256 columns of a
  64 x 64 tile, and four warps take turns. That makes 3,600 pairs of bits per clock, near the tensor
  cores' own limit of 4,096.

A program owns a tile of pairs and a share of the columns; where all rows are compared with each
other, the tile lies on or above the diagonal. Shares are added up by atomics, which are exact for
integers in any order. Rows are compared with those of another matrix by tensor cores only.
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
    others_ptr,  # (S, W) uint32; with TRIANGLE the same rows
    sums_ptr,  # (R, S) int32, added to; with TRIANGLE only on and above the diagonal
    # sizes
    num_rows,
    num_others,
    row_units,
    # meta-parameters
    UNIT_WORDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TRIANGLE: tl.constexpr,
):
    if TRIANGLE:
        # With two names for the same values, too many registers would be taken on sm_100.
        others_ptr, num_others = words_ptr, num_rows
        if tl.program_id(1) < tl.program_id(0):
            return
    offs_i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_i = words_ptr + tl.minimum(offs_i, num_rows - 1).to(tl.int64) * row_units * UNIT_WORDS
    row_j = others_ptr + tl.minimum(offs_j, num_others - 1).to(tl.int64) * row_units * UNIT_WORDS
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
    at = offs_i.to(tl.int64)[:, None] * num_others + offs_j[None, :]
    tl.atomic_add(sums_ptr + at, gram, mask=(offs_i < num_rows)[:, None] & (offs_j < num_others)[None, :], sem="relaxed")


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


def hamming_counts_between(bits: Tensor, others: Tensor) -> Tensor:
    """A row of ones goes below each matrix: its product with a row is that row's number of ones."""
    many = len(bits) + len(others) >= MANY_ROWS
    columns = varying_bytes(torch.cat([bits, others])) if many else None
    ones = torch.full_like(bits[:1], 255)
    words_TW, units_1 = _words(torch.cat([bits, ones, others, ones]), columns)
    gram_RS = _gram(words_TW[: len(bits) + 1], units_1, words_TW[len(bits) + 1 :])
    return gram_RS[:-1, -1:] + gram_RS[-1, :-1] - 2 * gram_RS[:-1, :-1]


def popcount_counts(bits: Tensor, columns: Tensor | None = None) -> Tensor:
    """Count the differing bits by population counts, ``(R, R)`` int32."""
    num_rows = len(bits)
    words_RW, units_1 = _words(bits, columns)
    row_units = words_RW.shape[1] // UNIT_WORDS
    num_tiles = triton.cdiv(num_rows, POPCOUNT_BLOCK_R)
    sums_RR = torch.zeros(num_rows, num_rows, dtype=torch.int32, device=bits.device)
    with on_device_of(bits):
        hamming_popcount_kernel[(num_tiles, num_tiles, _num_splits(row_units, num_tiles * (num_tiles + 1) // 2))](
            words_RW,
            units_1,
            sums_RR,
            num_rows,
            row_units,
            UNIT_WORDS=UNIT_WORDS,
            BLOCK_R=POPCOUNT_BLOCK_R,
            **launch_options(POPCOUNT_WARPS),
        )
    return _both_halves(sums_RR)


def gram_counts(bits: Tensor, columns: Tensor | None = None) -> Tensor:
    """``(R, R)`` int32, by tensor cores: rows i and j differ in G[i,i] + G[j,j] - 2 G[i,j] bits."""
    gram_RR = _both_halves(_gram(*_words(bits, columns)))
    ones_R = gram_RR.diagonal().clone()
    return gram_RR.mul_(-2).add_(ones_R[:, None]).add_(ones_R)


def _gram(words_RW: Tensor, units_1: Tensor, others_SW: Tensor | None = None) -> Tensor:
    """The products of rows with others, ``(R, S)`` int32.

    Without others these are the rows' products with each other, on and above the diagonal.
    """
    triangle = others_SW is None
    others_SW = words_RW if others_SW is None else others_SW
    (num_rows, row_words), num_others = words_RW.shape, len(others_SW)
    tiles = triton.cdiv(num_rows, GRAM_BLOCK_R), triton.cdiv(num_others, GRAM_BLOCK_R)
    num_tiles = tiles[0] * (tiles[0] + 1) // 2 if triangle else tiles[0] * tiles[1]
    sums_RS = torch.zeros(num_rows, num_others, dtype=torch.int32, device=words_RW.device)
    with on_device_of(words_RW):
        hamming_gram_kernel[(*tiles, _num_splits(row_words // UNIT_WORDS, num_tiles))](
            words_RW,
            units_1,
            others_SW,
            sums_RS,
            num_rows,
            num_others,
            row_words // UNIT_WORDS,
            UNIT_WORDS=UNIT_WORDS,
            BLOCK_R=GRAM_BLOCK_R,
            TRIANGLE=triangle,
            **launch_options(GRAM_WARPS),
        )
    return sums_RS


def _num_splits(row_units: int, num_tiles: int) -> int:
    """The number of shares of the columns, enough that all tiles' programs fill a GPU."""
    return max(1, min(row_units, ENOUGH_PROGRAMS // num_tiles))


def _both_halves(sums_RR: Tensor) -> Tensor:
    """The symmetric matrix of which only the part on and above the diagonal counts, in place."""
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
VARIANTS = (
    Variant(
        "hamming_popcount",
        hamming_popcount_kernel,
        POPCOUNT_WARPS,
        {"words_ptr": "u32", "units_ptr": "i32", "sums_ptr": "i32"},
        {"UNIT_WORDS": UNIT_WORDS, "BLOCK_R": POPCOUNT_BLOCK_R},
    ),
    *(
        Variant(
            name,
            hamming_gram_kernel,
            GRAM_WARPS,
            {"words_ptr": "u32", "units_ptr": "i32", "others_ptr": "u32", "sums_ptr": "i32"},
            {"UNIT_WORDS": UNIT_WORDS, "BLOCK_R": GRAM_BLOCK_R, "TRIANGLE": triangle},
        )
        for name, triangle in (("hamming_gram", True), ("hamming_between", False))
    ),
)
