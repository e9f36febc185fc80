"""Ones in varying columns in Triton: see ``__init__.py``. The bits are read twice.

The first kernel gathers, for 32 columns at a time, where some row and where every row has a one; a
column varies where the two differ. The second one counts. Shares of rows and of words are added up
by atomics, which are exact for integers in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.shared.triton import Variant, count_ones, kernel, launch_options, on_device_of

# The number of words, of 32 columns each, that a program reads at once. Rows are padded to a
# multiple of 4 words, so that loads are 16 bytes wide.
BLOCK_W = 512
PAD_BYTES = 16
NUM_WARPS = 4
# The number of rows of one program, and its number of blocks of words.
ROWS_PER_PROGRAM = 64
BLOCKS_PER_PROGRAM = 8


@kernel
def some_and_all_kernel(
    # pointers
    words_ptr,  # (R, W) int32
    some_ptr,  # (W,) int32, bits of every row are set in it
    all_ptr,  # (W,) int32, bits that a row lacks are cleared in it
    # sizes; words in units of 4
    num_rows,
    word_units,
    # meta-parameters
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    num_words = word_units * 4
    offs_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < num_words
    first = tl.program_id(1) * ROWS
    some = tl.zeros([BLOCK_W], dtype=tl.int32)
    every = tl.full([BLOCK_W], -1, dtype=tl.int32)
    row_ptr = words_ptr + first.to(tl.int64) * num_words + offs_w
    for _ in range(first, tl.minimum(first + ROWS, num_rows)):
        word = tl.load(row_ptr, mask=mask_w, other=0)  # [BLOCK_W]
        some |= word
        every &= word
        row_ptr += num_words
    tl.atomic_or(some_ptr + offs_w, some, mask=mask_w, sem="relaxed")
    tl.atomic_and(all_ptr + offs_w, every, mask=mask_w, sem="relaxed")


@kernel
def ones_kernel(
    # pointers
    words_ptr,  # (R, W) int32
    some_ptr,  # (W,) int32
    all_ptr,  # (W,) int32
    ones_ptr,  # (R,) int64, added to
    # sizes; words in units of 4
    word_units,
    # meta-parameters
    BLOCKS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    num_words = word_units * 4
    row = tl.program_id(0)
    counts = tl.zeros([BLOCK_W], dtype=tl.int32)
    for block in range(BLOCKS):
        offs_w = (tl.program_id(1) * BLOCKS + block) * BLOCK_W + tl.arange(0, BLOCK_W)
        mask_w = offs_w < num_words
        word = tl.load(words_ptr + row.to(tl.int64) * num_words + offs_w, mask=mask_w, other=0)  # [BLOCK_W]
        some = tl.load(some_ptr + offs_w, mask=mask_w, other=0)  # [BLOCK_W]
        every = tl.load(all_ptr + offs_w, mask=mask_w, other=0)  # [BLOCK_W]
        counts += count_ones((word & (some ^ every)).to(tl.uint32, bitcast=True))
    tl.atomic_add(ones_ptr + row, tl.sum(counts).to(tl.int64), sem="relaxed")


# --- called with checked arguments ---


def varying_ones(bits: Tensor) -> Tensor:
    num_rows = len(bits)
    padding = -bits.shape[1] % PAD_BYTES
    # Rows are copied only if their length is no multiple of 16 bytes. The padding is 0 in all rows,
    # so it counts as columns in which no rows differ.
    words_RW = (torch.nn.functional.pad(bits, (0, padding)) if padding else bits.contiguous()).view(torch.int32)
    num_words = words_RW.shape[1]
    some_W = torch.zeros(num_words, dtype=torch.int32, device=bits.device)
    all_W = torch.full_like(some_W, -1)
    ones_S = torch.zeros(num_rows + 1, dtype=torch.int64, device=bits.device)
    blocks = triton.cdiv(num_words, BLOCK_W)
    options, units = launch_options(NUM_WARPS), num_words // 4
    with on_device_of(bits):
        some_and_all_kernel[(blocks, triton.cdiv(num_rows, ROWS_PER_PROGRAM))](
            words_RW, some_W, all_W, num_rows, units, ROWS=ROWS_PER_PROGRAM, BLOCK_W=BLOCK_W, **options
        )
        # The flags of the varying columns are counted like one more row. Its ones are their number.
        for rows, ones, count in ((words_RW, ones_S, num_rows), (some_W ^ all_W, ones_S[num_rows:], 1)):
            ones_kernel[(count, triton.cdiv(blocks, BLOCKS_PER_PROGRAM))](
                rows, some_W, all_W, ones, units, BLOCKS=BLOCKS_PER_PROGRAM, BLOCK_W=BLOCK_W, **options
            )
    return ones_S


# The offline compile builds these.
VARIANTS = (
    Variant(
        "some_and_all[u8]",
        some_and_all_kernel,
        NUM_WARPS,
        {"words_ptr": "i32", "some_ptr": "i32", "all_ptr": "i32"},
        {"ROWS": ROWS_PER_PROGRAM, "BLOCK_W": BLOCK_W},
    ),
    Variant(
        "varying_ones[u8]",
        ones_kernel,
        NUM_WARPS,
        {"words_ptr": "i32", "some_ptr": "i32", "all_ptr": "i32", "ones_ptr": "i64"},
        {"BLOCKS": BLOCKS_PER_PROGRAM, "BLOCK_W": BLOCK_W},
    ),
)
