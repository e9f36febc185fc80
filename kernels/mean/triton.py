"""The mean of chosen rows in Triton; the chosen rows are read once.

To the kernel, a row that is not chosen has the factor 0, and no row with the factor 0 is read.

A program owns BLOCK_P columns and walks down its share of the rows. So the sums need no atomics and
are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, on_device_of, vector_elements

BLOCK_R = 32
BLOCK_P = 256
NUM_WARPS = 8
# Programs that fill any current GPU several times over (an H200 has 132 multiprocessors).
ENOUGH_PROGRAMS = 2048


@kernel
def chosen_mean_kernel(
    # pointers
    rows_ptr,  # (R, P) float32 or bfloat16
    factors_ptr,  # (R,) float32
    sums_ptr,  # (splits, P) float32, written
    # sizes; columns and strides in units of VEC elements: the compiler then knows their alignment
    num_rows,
    rows_per_split,
    num_col_units,
    rows_stride_units,
    # meta-parameters
    VEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    split = tl.program_id(1)
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    total = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32)
    row_begin = split * rows_per_split
    row_end = tl.minimum(row_begin + rows_per_split, num_rows)
    for row in range(row_begin, row_end, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        factor = tl.load(factors_ptr + offs_r, mask=offs_r < row_end, other=0.0)  # [BLOCK_R]
        update = tl.load(
            rows_ptr + offs_r.to(tl.int64)[:, None] * rows_stride_units * VEC + offs_p[None, :],
            mask=(factor != 0.0)[:, None] & mask_p[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_R, BLOCK_P]
        total += factor[:, None] * update
    tl.store(sums_ptr + split.to(tl.int64) * num_cols + offs_p, tl.sum(total, axis=0), mask=mask_p)


# --- called with checked arguments ---


def split_rows(num_rows: int, num_params: int) -> int:
    """The number of rows that one program adds up; if there are few columns, fewer fill the GPU."""
    wanted_splits = triton.cdiv(ENOUGH_PROGRAMS, triton.cdiv(num_params, BLOCK_P))
    num_splits = max(1, min(wanted_splits, triton.cdiv(num_rows, 2 * BLOCK_R)))
    return triton.cdiv(triton.cdiv(num_rows, num_splits), BLOCK_R) * BLOCK_R


def chosen_mean(rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor) -> Tensor:
    num_rows, num_params = rows_RP.shape
    vec = vector_elements(num_params, rows_RP)
    num_blocks = triton.cdiv(num_params, BLOCK_P)
    rows_per_split = split_rows(num_rows, num_params)
    num_splits = triton.cdiv(num_rows, rows_per_split)
    sums_SP = torch.empty(num_splits, num_params, device=rows_RP.device)
    with on_device_of(rows_RP):
        chosen_mean_kernel[(num_blocks, num_splits)](
            rows_RP,
            torch.where(chosen_R, factors_R, 0.0),
            sums_SP,
            num_rows,
            rows_per_split,
            num_params // vec,
            rows_RP.stride(0) // vec,
            VEC=vec,
            BLOCK_R=BLOCK_R,
            BLOCK_P=BLOCK_P,
            **launch_options(NUM_WARPS),
        )
    return sums_SP.sum(0, dtype=torch.float64) / chosen_R.sum()


# The offline compile builds these.
VARIANTS = tuple(
    Variant(
        f"chosen_mean[{dtype}]",
        chosen_mean_kernel,
        NUM_WARPS,
        {"rows_ptr": dtype, "factors_ptr": "fp32"},
        {"BLOCK_R": BLOCK_R, "BLOCK_P": BLOCK_P},
    )
    for dtype in ("fp32", "bf16")
)
