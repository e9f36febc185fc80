"""Sums per group of columns in Triton: every row is read once.

The columns are cut into pieces: a group is a piece, or several of at most COLUMNS_PER_PIECE. The
first kernel adds up a piece of BLOCK_K rows per program, and the second one the pieces of each
group, in their order. So the sums need no atomics and are the same in every run.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, on_device_of, vector_elements

# There are more threads than columns in a block, so that each thread reads 16 bytes of the vectors
# where it needs them. With fewer threads, the vectors would go through shared memory.
BLOCK_K = 16
BLOCK_L = 128
NUM_WARPS = 8
# Long enough that a program's sums, which are stored, are few beside the columns that it reads.
COLUMNS_PER_PIECE = 4096
# The second kernel's block of rows.
JOIN_K = 128
JOIN_WARPS = 4


@kernel
def piece_sums_kernel(
    # pointers
    rows_ptr,  # (K, L) float32 or bfloat16
    vectors_ptr,  # (2, L) float32
    begins_ptr,  # (S + 1,) int32, where each piece begins, and L
    parts_ptr,  # (3, S, K) float64, written
    # sizes; columns and strides in units of VEC elements: the compiler then knows their alignment
    num_rows,
    num_pieces,
    num_col_units,
    rows_stride_units,
    # meta-parameters
    VEC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # Neighbours take the same piece of different rows, so that they share its part of the vectors.
    row_blocks = tl.cdiv(num_rows, BLOCK_K)
    piece = tl.program_id(0) // row_blocks
    offs_k = (tl.program_id(0) % row_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < num_rows
    begin = tl.load(begins_ptr + piece)
    end = tl.load(begins_ptr + piece + 1)
    row_ptr = rows_ptr + offs_k.to(tl.int64)[:, None] * rows_stride_units * VEC
    one_ptr = vectors_ptr
    two_ptr = vectors_ptr + num_col_units * VEC
    squares = tl.zeros([BLOCK_K, BLOCK_L], dtype=tl.float64)
    products_one = tl.zeros([BLOCK_K, BLOCK_L], dtype=tl.float64)
    products_two = tl.zeros([BLOCK_K, BLOCK_L], dtype=tl.float64)
    # Whole units are read. What lies in the first and the last one beside the piece is set to 0,
    # whatever it holds.
    end_units = tl.cdiv(end, VEC)
    for unit in range(begin // VEC, end_units, BLOCK_L // VEC):
        offs_l = unit * VEC + tl.arange(0, BLOCK_L)
        mask_l = offs_l < end_units * VEC
        value = tl.load(row_ptr + offs_l[None, :], mask=mask_k[:, None] & mask_l[None, :], other=0.0)  # [BLOCK_K, BLOCK_L]
        one = tl.load(one_ptr + offs_l, mask=mask_l, other=0.0)  # [BLOCK_L]
        two = tl.load(two_ptr + offs_l, mask=mask_l, other=0.0)  # [BLOCK_L]
        inside = (offs_l >= begin) & (offs_l < end)
        value = tl.where(inside[None, :], value, 0.0).to(tl.float64)
        squares += value * value
        products_one += value * tl.where(inside, one, 0.0).to(tl.float64)[None, :]
        products_two += value * tl.where(inside, two, 0.0).to(tl.float64)[None, :]
    part = piece.to(tl.int64)
    tl.store(parts_ptr + part * num_rows + offs_k, tl.sum(squares, axis=1), mask=mask_k)
    part += num_pieces
    tl.store(parts_ptr + part * num_rows + offs_k, tl.sum(products_one, axis=1), mask=mask_k)
    part += num_pieces
    tl.store(parts_ptr + part * num_rows + offs_k, tl.sum(products_two, axis=1), mask=mask_k)


@kernel
def join_pieces_kernel(
    # pointers
    parts_ptr,  # (3, S, K) float64
    firsts_ptr,  # (G + 1,) int32, the first piece of each group, and S
    sums_ptr,  # (3, G, K) float64, written
    # sizes
    num_rows,
    num_pieces,
    num_groups,
    # meta-parameters
    BLOCK_K: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_K)
    group = tl.program_id(0) // row_blocks
    which = tl.program_id(1).to(tl.int64)
    offs_k = (tl.program_id(0) % row_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < num_rows
    total = tl.zeros([BLOCK_K], dtype=tl.float64)
    for piece in range(tl.load(firsts_ptr + group), tl.load(firsts_ptr + group + 1)):
        at = (which * num_pieces + piece) * num_rows + offs_k
        total += tl.load(parts_ptr + at, mask=mask_k, other=0.0)
    tl.store(sums_ptr + (which * num_groups + group) * num_rows + offs_k, total, mask=mask_k)


# --- called with checked arguments ---


def group_sums(rows_KL: Tensor, vectors_2L: Tensor, edges: np.ndarray) -> Tensor:
    (num_rows, num_columns), num_groups = rows_KL.shape, edges.size - 1
    vec = vector_elements(num_columns, rows_KL)
    begins_S, firsts_G = pieces(edges, rows_KL)
    num_pieces = len(begins_S) - 1
    parts_3SK = torch.empty(3, num_pieces, num_rows, dtype=torch.float64, device=rows_KL.device)
    sums_3GK = torch.empty(3, num_groups, num_rows, dtype=torch.float64, device=rows_KL.device)
    with on_device_of(rows_KL):
        piece_sums_kernel[(num_pieces * triton.cdiv(num_rows, BLOCK_K),)](
            rows_KL,
            vectors_2L,
            begins_S,
            parts_3SK,
            num_rows,
            num_pieces,
            num_columns // vec,
            rows_KL.stride(0) // vec,
            VEC=vec,
            BLOCK_K=BLOCK_K,
            BLOCK_L=BLOCK_L,
            **launch_options(NUM_WARPS),
        )
        join_pieces_kernel[(num_groups * triton.cdiv(num_rows, JOIN_K), 3)](
            parts_3SK,
            firsts_G,
            sums_3GK,
            num_rows,
            num_pieces,
            num_groups,
            BLOCK_K=JOIN_K,
            **launch_options(JOIN_WARPS),
        )
    return sums_3GK.transpose(1, 2)


def pieces(edges: np.ndarray, rows_KL: Tensor) -> tuple[Tensor, Tensor]:
    """Where each piece begins, and the first piece of each group; both with their end, int32."""
    begins = np.union1d(edges, np.arange(0, edges[-1], COLUMNS_PER_PIECE))
    firsts = np.searchsorted(begins, edges)
    # The host does not wait for a copy from pinned memory. PyTorch reuses the memory only after it
    # was read.
    both = torch.empty(len(begins) + len(firsts), dtype=torch.int32, pin_memory=rows_KL.is_cuda)
    both.copy_(torch.from_numpy(np.concatenate([begins, firsts])))
    there = torch.empty(both.shape, dtype=both.dtype, device=rows_KL.device).copy_(both, non_blocking=True)
    return there[: len(begins)], there[len(begins) :]


# The offline compile builds these.
VARIANTS = (
    *(
        Variant(
            f"piece_sums[{dtype}]",
            piece_sums_kernel,
            NUM_WARPS,
            {"rows_ptr": dtype, "vectors_ptr": "fp32", "begins_ptr": "i32", "parts_ptr": "fp64"},
            {"BLOCK_K": BLOCK_K, "BLOCK_L": BLOCK_L},
        )
        for dtype in ("fp32", "bf16")
    ),
    Variant(
        "join_pieces",
        join_pieces_kernel,
        JOIN_WARPS,
        {"parts_ptr": "fp64", "firsts_ptr": "i32", "sums_ptr": "fp64"},
        {"BLOCK_K": JOIN_K},
    ),
)
