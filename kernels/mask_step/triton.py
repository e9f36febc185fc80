"""The mask step in Triton: the kernel and its launchers.

A step moves 12 bytes per element in float32: it reads an update and a logit, and writes a logit.
The first step reads no logit (8 bytes), and the last one writes a bit instead (8 bytes and a bit).

A program owns BLOCK_P columns and walks down its share of the rows. The sums over rows therefore
need no atomics, and are the same in every run. PyTorch adds up the shares at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, moved, on_device_of, vector_elements

BLOCK_R = 8
BLOCK_P = 256
NUM_WARPS = 8
# Programs that fill any current GPU several times over (an H200 has 132 multiprocessors).
ENOUGH_PROGRAMS = 2048


@kernel
def mask_step_kernel(
    # pointers
    updates_ptr,  # (R, P) float32 or bfloat16
    logits_in_ptr,  # (R, P) float32, read if READ_LOGITS
    logits_out_ptr,  # (R, P) float32, written if WRITE_LOGITS
    slope_ptr,  # (P,) float32
    mean_ptr,  # (P,) float32
    gate_sum_ptr,  # (splits, P) float32, written unless EMIT_BITS
    weighted_sum_ptr,  # (splits, P) float32, written unless EMIT_BITS
    bits_ptr,  # (R, bytes) uint8, written if EMIT_BITS
    # sizes; columns and strides in units of VEC elements: the compiler then knows their alignment
    num_rows,
    rows_per_split,
    num_col_units,
    updates_stride_units,
    logits_in_stride_units,
    logits_out_stride_units,
    num_bytes,
    # scalars
    init,
    full_step,
    threshold,
    # meta-parameters
    VEC: tl.constexpr,
    READ_LOGITS: tl.constexpr,
    WRITE_LOGITS: tl.constexpr,
    EMIT_BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    split = tl.program_id(1)
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    slope = tl.load(slope_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    mean = tl.load(mean_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]

    gate_sum = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32)
    weighted_sum = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32)
    row_begin = split * rows_per_split
    row_end = tl.minimum(row_begin + rows_per_split, num_rows)
    for row in range(row_begin, row_end, BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        mask_r = offs_r < row_end
        mask = mask_r[:, None] & mask_p[None, :]
        # R * P can exceed 2**31, so row numbers become 64-bit before they are multiplied by a
        # stride.
        rows_64 = offs_r.to(tl.int64)[:, None]
        update = tl.load(updates_ptr + rows_64 * updates_stride_units * VEC + offs_p[None, :], mask=mask, other=0.0).to(
            tl.float32
        )  # [BLOCK_R, BLOCK_P]
        if READ_LOGITS:
            logit = tl.load(
                logits_in_ptr + rows_64 * logits_in_stride_units * VEC + offs_p[None, :], mask=mask, other=0.0
            )  # [BLOCK_R, BLOCK_P]
        else:
            logit = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32) + init
        logit = moved(logit, update, slope[None, :], mean[None, :], full_step)
        if WRITE_LOGITS:
            tl.store(logits_out_ptr + rows_64 * logits_out_stride_units * VEC + offs_p[None, :], logit, mask=mask)
        if EMIT_BITS:
            bit = ((logit > threshold) & mask).to(tl.int32)
            octets = tl.reshape(bit, [BLOCK_R, BLOCK_P // 8, 8])
            weights = 1 << tl.arange(0, 8)
            packed = tl.sum(octets * weights[None, None, :], axis=2)  # [BLOCK_R, BLOCK_P // 8]
            offs_b = tl.program_id(0) * (BLOCK_P // 8) + tl.arange(0, BLOCK_P // 8)
            tl.store(
                bits_ptr + rows_64 * num_bytes + offs_b[None, :],
                packed.to(tl.uint8),
                mask=mask_r[:, None] & (offs_b < num_bytes)[None, :],
            )
        else:
            # The gate of a masked row must not count: sigmoid(0) is not 0.
            gate = tl.where(mask, tl.sigmoid(logit), 0.0)
            gate_sum += gate
            weighted_sum += gate * update
    if not EMIT_BITS:
        offs_out = split.to(tl.int64) * num_cols + offs_p
        tl.store(gate_sum_ptr + offs_out, tl.sum(gate_sum, axis=0), mask=mask_p)
        tl.store(weighted_sum_ptr + offs_out, tl.sum(weighted_sum, axis=0), mask=mask_p)


# --- called with checked arguments ---


def first_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, init: float, full_step: float
) -> tuple[Tensor, Tensor]:
    sums_2SP = _empty_sums(updates_RP)
    _launch(updates_RP, None, logits_RP, slope_P, mean_P, sums_2SP, init=init, full_step=full_step)
    gate_sum_P, weighted_sum_P = sums_2SP.sum(1).unbind(0)
    return gate_sum_P, weighted_sum_P


def next_step(
    updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    sums_2SP = _empty_sums(updates_RP)
    _launch(updates_RP, logits_RP, logits_RP, slope_P, mean_P, sums_2SP, full_step=full_step)
    gate_sum_P, weighted_sum_P = sums_2SP.sum(1).unbind(0)
    return gate_sum_P, weighted_sum_P


def last_step(
    updates_RP: Tensor,
    logits_RP: Tensor | None,
    slope_P: Tensor,
    mean_P: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
    logits_out_RP: Tensor | None = None,
) -> Tensor:
    num_rows, num_params = updates_RP.shape
    bits = torch.empty(num_rows, -(-num_params // 8), dtype=torch.uint8, device=updates_RP.device)
    training = {"init": init, "full_step": full_step, "threshold": threshold}
    _launch(updates_RP, logits_RP, logits_out_RP, slope_P, mean_P, bits, **training)
    return bits


def _num_splits(num_rows: int, num_params: int) -> int:
    """The number of programs that share a block of columns; with few columns, more fill a GPU."""
    wanted = -(-ENOUGH_PROGRAMS // triton.cdiv(num_params, BLOCK_P))
    return max(1, min(wanted, triton.cdiv(num_rows, 8 * BLOCK_R)))


def _empty_sums(updates_RP: Tensor) -> Tensor:
    """Memory for both sums of each share of the rows, ``(2, splits, P)`` float32."""
    num_rows, num_params = updates_RP.shape
    num_splits = _num_splits(num_rows, num_params)
    # Both begin at multiples of 16 bytes, whatever the number of splits. Otherwise Triton would
    # compile again.
    num_sums = num_splits * num_params
    sums_2SP = torch.empty(2, -(-num_sums // 4) * 4, dtype=torch.float32, device=updates_RP.device)[:, :num_sums]
    return sums_2SP.view(2, num_splits, num_params)


def _launch(
    updates_RP: Tensor,
    logits_in_RP: Tensor | None,
    logits_out_RP: Tensor | None,
    slope_P: Tensor,
    mean_P: Tensor,
    out: Tensor,
    *,
    full_step: float,
    init: float = 0.0,
    threshold: float = 0.0,
) -> None:
    """Launch the kernel. Besides logits it writes to ``out``: both sums, or the bits (uint8)."""
    num_rows, num_params = updates_RP.shape
    vec = vector_elements(num_params, updates_RP, logits_in_RP, logits_out_RP)
    num_splits = _num_splits(num_rows, num_params)
    rows_per_split = triton.cdiv(triton.cdiv(num_rows, num_splits), BLOCK_R) * BLOCK_R
    grid = (triton.cdiv(num_params, BLOCK_P), triton.cdiv(num_rows, rows_per_split))
    # A pointer that the compiled variant never touches.
    unused = slope_P
    emit_bits = out.dtype == torch.uint8
    gate_sum, weighted_sum, bits = (unused, unused, out) if emit_bits else (out[0], out[1], unused)
    if not emit_bits and grid[1] < num_splits:
        gate_sum[grid[1] :].zero_()
        weighted_sum[grid[1] :].zero_()
    with on_device_of(updates_RP):
        mask_step_kernel[grid](
            updates_RP,
            unused if logits_in_RP is None else logits_in_RP,
            unused if logits_out_RP is None else logits_out_RP,
            slope_P,
            mean_P,
            gate_sum,
            weighted_sum,
            bits,
            num_rows,
            rows_per_split,
            num_params // vec,
            updates_RP.stride(0) // vec,
            0 if logits_in_RP is None else logits_in_RP.stride(0) // vec,
            0 if logits_out_RP is None else logits_out_RP.stride(0) // vec,
            -(-num_params // 8),
            float(init),
            float(full_step),
            float(threshold),
            VEC=vec,
            READ_LOGITS=logits_in_RP is not None,
            WRITE_LOGITS=logits_out_RP is not None,
            EMIT_BITS=emit_bits,
            BLOCK_R=BLOCK_R,
            BLOCK_P=BLOCK_P,
            **launch_options(NUM_WARPS),
        )


# The offline compile builds these.
VARIANTS = tuple(
    Variant(
        f"{name}[{dtype}]",
        mask_step_kernel,
        NUM_WARPS,
        {"updates_ptr": dtype, "bits_ptr": "u8"},
        {"BLOCK_R": BLOCK_R, "BLOCK_P": BLOCK_P, "READ_LOGITS": reads, "WRITE_LOGITS": writes, "EMIT_BITS": emits},
    )
    for dtype in ("fp32", "bf16")
    for name, reads, writes, emits in (
        ("first_step", False, True, False),
        ("next_step", True, True, False),
        ("last_step", True, False, True),
    )
)
