"""The replay and the cuts in Triton: see ``__init__.py`` for what they compute.

A program owns a block of columns and goes over the rows, bins or steps itself. So there are no
atomics, and the results are the same in every run. Bins and the history are contiguous; rows may
lie any stride apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.cuts.reference import BISECTIONS
from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, moved, on_device_of, vector_elements

# The number of values per column that are replayed while the history is read once.
REPLAY_BLOCK_V = 2
REPLAY_BLOCK_P = 1024
REPLAY_WARPS = 4
CUTS_BLOCK_P = 256
CUTS_WARPS = 1
BITS_BLOCK_R = 8
BITS_BLOCK_P = 256
BITS_WARPS = 8
# The number of rows for which one program writes the bits. It reads the cuts of its columns once.
BITS_ROWS = 64
# The same where every row is replayed. Its blocks have as many columns as above, which lie 8 by 8
# side by side.
AGAIN_BLOCK_R = 4
AGAIN_WARPS = 8


@kernel
def replay_kernel(
    # pointers
    values_ptr,  # (V, P) float32 or bfloat16
    slopes_ptr,  # (T, P) float32
    means_ptr,  # (T, P) float32
    logits_ptr,  # (V, P) float32, written
    # sizes; columns and strides in units of VEC elements
    num_values,
    num_steps,
    num_col_units,
    values_stride_units,
    # scalars
    init,
    full_step,
    # meta-parameters
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (offs_v < num_values)[:, None] & mask_p[None, :]
    values_64 = offs_v.to(tl.int64)[:, None]
    value = tl.load(values_ptr + values_64 * values_stride_units * VEC + offs_p[None, :], mask=mask, other=0.0).to(
        tl.float32
    )  # [BLOCK_V, BLOCK_P]
    logit = tl.zeros([BLOCK_V, BLOCK_P], dtype=tl.float32) + init
    for step in range(num_steps):
        at = tl.cast(step, tl.int64) * num_cols + offs_p
        slope = tl.load(slopes_ptr + at, mask=mask_p, other=0.0)  # [BLOCK_P]
        mean = tl.load(means_ptr + at, mask=mask_p, other=0.0)  # [BLOCK_P]
        logit = moved(logit, value, slope[None, :], mean[None, :], full_step)
    tl.store(logits_ptr + values_64 * num_cols + offs_p[None, :], logit, mask=mask)


@triton.jit
def _bit_after(value, slopes_ptr, means_ptr, offs_p, mask_p, num_cols, num_steps, init, full_step, threshold):
    """The bit of one value per column after the history; all are ``[BLOCK_P]``."""
    logit = tl.zeros_like(value) + init
    for step in range(num_steps):
        at = tl.cast(step, tl.int64) * num_cols + offs_p
        slope = tl.load(slopes_ptr + at, mask=mask_p, other=0.0)
        mean = tl.load(means_ptr + at, mask=mask_p, other=0.0)
        logit = moved(logit, value, slope, mean, full_step)
    return logit > threshold


@triton.jit
def _note_crossing(changed, last, probe, below, above, crossings):
    """Count a change of the bit; if it is the first, note the two probes around it."""
    first = changed & (crossings == 0)
    return tl.where(first, last, below), tl.where(first, probe, above), crossings + changed.to(tl.int32)


@kernel
def find_cuts_kernel(
    # pointers
    logits_ptr,  # (B, P) float32
    centres_ptr,  # (B, P) float32
    counts_ptr,  # (B, P) uint16 or int32
    ends_ptr,  # (2, P) float32
    slopes_ptr,  # (T, P) float32
    means_ptr,  # (T, P) float32
    position_ptr,  # (P,) float32, written
    left_ptr,  # (P,) bool, written
    crossings_ptr,  # (P,) int32, written
    # sizes; columns in units of VEC elements
    num_bins,
    num_steps,
    num_col_units,
    # scalars
    init,
    full_step,
    threshold,
    # meta-parameters
    BISECTIONS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    lowest = tl.load(ends_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P], as is all below
    highest = tl.load(ends_ptr + num_cols + offs_p, mask=mask_p, other=0.0)
    left = _bit_after(lowest, slopes_ptr, means_ptr, offs_p, mask_p, num_cols, num_steps, init, full_step, threshold)
    right = _bit_after(highest, slopes_ptr, means_ptr, offs_p, mask_p, num_cols, num_steps, init, full_step, threshold)

    before, last = left, lowest
    below, above = tl.zeros_like(lowest), tl.zeros_like(lowest)
    crossings = tl.zeros([BLOCK_P], dtype=tl.int32)
    for b in range(num_bins):
        at = tl.cast(b, tl.int64) * num_cols + offs_p
        bit = tl.load(logits_ptr + at, mask=mask_p, other=0.0) > threshold
        centre = tl.load(centres_ptr + at, mask=mask_p, other=0.0)
        filled = tl.load(counts_ptr + at, mask=mask_p, other=0) > 0
        below, above, crossings = _note_crossing(filled & (bit != before), last, centre, below, above, crossings)
        before = tl.where(filled, bit, before)
        last = tl.where(filled, centre, last)
    below, above, crossings = _note_crossing(right != before, last, highest, below, above, crossings)
    for _ in range(BISECTIONS):
        middle = below + (above - below) * 0.5
        bit = _bit_after(middle, slopes_ptr, means_ptr, offs_p, mask_p, num_cols, num_steps, init, full_step, threshold)
        below = tl.where(bit == left, middle, below)
        above = tl.where(bit == left, above, middle)
    tl.store(position_ptr + offs_p, tl.where(crossings == 0, float("inf"), above), mask=mask_p)
    tl.store(left_ptr + offs_p, left, mask=mask_p)
    tl.store(crossings_ptr + offs_p, crossings, mask=mask_p)


@kernel
def cut_bits_kernel(
    # pointers
    rows_ptr,  # (R, P) float32 or bfloat16
    cut_ptr,  # (P,) float32
    left_ptr,  # (P,) bool
    bits_ptr,  # (R, bytes) uint8, written
    # sizes; columns and strides in units of VEC elements
    num_rows,
    num_col_units,
    rows_stride_units,
    num_bytes,
    # meta-parameters
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    offs_b = tl.program_id(0) * (BLOCK_P // 8) + tl.arange(0, BLOCK_P // 8)
    cut = tl.load(cut_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    left = tl.load(left_ptr + offs_p, mask=mask_p, other=0) != 0  # [BLOCK_P]
    weights = 1 << tl.arange(0, 8)
    row_begin = tl.program_id(1) * ROWS
    for row in range(row_begin, tl.minimum(row_begin + ROWS, num_rows), BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        mask = mask_r[:, None] & mask_p[None, :]
        rows_64 = offs_r.to(tl.int64)[:, None]
        update = tl.load(rows_ptr + rows_64 * rows_stride_units * VEC + offs_p[None, :], mask=mask, other=0.0).to(
            tl.float32
        )  # [BLOCK_R, BLOCK_P]
        bit = (((update < cut[None, :]) == left[None, :]) & mask).to(tl.int32)
        octets = tl.reshape(bit, [BLOCK_R, BLOCK_P // 8, 8])
        packed = tl.sum(octets * weights[None, None, :], axis=2)  # [BLOCK_R, BLOCK_P // 8]
        tl.store(
            bits_ptr + rows_64 * num_bytes + offs_b[None, :],
            packed.to(tl.uint8),
            mask=mask_r[:, None] & (offs_b < num_bytes)[None, :],
        )


@kernel
def replay_bits_kernel(
    # pointers
    rows_ptr,  # (R, P) float32 or bfloat16
    chosen_ptr,  # (8 bytes,) bool
    order_ptr,  # (bytes,) int64, the bytes that hold a chosen column come first
    count_ptr,  # (1,) int32, how many do
    slopes_ptr,  # (T, P) float32
    means_ptr,  # (T, P) float32
    bits_ptr,  # (R, bytes) uint8, the bits of chosen columns are overwritten
    # sizes
    num_rows,
    num_steps,
    num_cols,
    rows_stride,
    num_bytes,
    # scalars
    init,
    full_step,
    threshold,
    # meta-parameters
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    first = tl.program_id(0) * (BLOCK_P // 8)
    count = tl.load(count_ptr)
    # Most programs have nothing to do. The host does not know how many, since it does not wait.
    if first >= count:
        return
    offs_b = first + tl.arange(0, BLOCK_P // 8)
    mask_b = offs_b < count
    byte = tl.load(order_ptr + offs_b, mask=mask_b, other=0)  # [BLOCK_P // 8]
    lane = tl.arange(0, BLOCK_P)
    mask_p = first + lane // 8 < count
    offs_p = tl.load(order_ptr + first + lane // 8, mask=mask_p, other=0) * 8 + lane % 8  # [BLOCK_P]
    chosen = tl.load(chosen_ptr + offs_p, mask=mask_p, other=0) != 0
    weights = 1 << tl.arange(0, 8)
    own = tl.sum(tl.reshape(chosen.to(tl.int32), [BLOCK_P // 8, 8]) * weights[None, :], axis=1)  # [BLOCK_P // 8]
    row_begin = tl.program_id(1) * ROWS
    for row in range(row_begin, tl.minimum(row_begin + ROWS, num_rows), BLOCK_R):
        offs_r = row + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        rows_64 = offs_r.to(tl.int64)[:, None]
        update = tl.load(rows_ptr + rows_64 * rows_stride + offs_p[None, :], mask=mask_r[:, None] & chosen[None, :], other=0.0)
        update = update.to(tl.float32)  # [BLOCK_R, BLOCK_P]
        logit = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32) + init
        for step in range(num_steps):
            at = tl.cast(step, tl.int64) * num_cols + offs_p
            slope = tl.load(slopes_ptr + at, mask=chosen, other=0.0)  # [BLOCK_P]
            mean = tl.load(means_ptr + at, mask=chosen, other=0.0)  # [BLOCK_P]
            logit = moved(logit, update, slope[None, :], mean[None, :], full_step)
        bit = ((logit > threshold) & chosen[None, :]).to(tl.int32)
        octets = tl.reshape(bit, [BLOCK_R, BLOCK_P // 8, 8])
        packed = tl.sum(octets * weights[None, None, :], axis=2)  # [BLOCK_R, BLOCK_P // 8]
        to_ptr = bits_ptr + rows_64 * num_bytes + byte[None, :]
        mask = mask_r[:, None] & mask_b[None, :]
        before = tl.load(to_ptr, mask=mask, other=0).to(tl.int32)
        tl.store(to_ptr, ((before & (255 ^ own)[None, :]) | packed).to(tl.uint8), mask=mask)


# --- called with checked arguments ---


def replay(values_VP: Tensor, slopes_TP: Tensor, means_TP: Tensor, *, init: float, full_step: float) -> Tensor:
    num_values, num_params = values_VP.shape
    logits_VP = torch.empty(num_values, num_params, device=values_VP.device)
    vec = vector_elements(num_params, values_VP, slopes_TP, means_TP, logits_VP)
    with on_device_of(values_VP):
        replay_kernel[(triton.cdiv(num_params, REPLAY_BLOCK_P), triton.cdiv(num_values, REPLAY_BLOCK_V))](
            values_VP,
            slopes_TP,
            means_TP,
            logits_VP,
            num_values,
            len(slopes_TP),
            num_params // vec,
            values_VP.stride(0) // vec,
            float(init),
            float(full_step),
            VEC=vec,
            BLOCK_V=REPLAY_BLOCK_V,
            BLOCK_P=REPLAY_BLOCK_P,
            **launch_options(REPLAY_WARPS),
        )
    return logits_VP


def find_cuts(
    logits_BP: Tensor,
    centres_BP: Tensor,
    counts_BP: Tensor,
    ends_2P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_bins, num_params = logits_BP.shape
    device = logits_BP.device
    position_P = torch.empty(num_params, device=device)
    left_P = torch.empty(num_params, dtype=torch.bool, device=device)
    crossings_P = torch.empty(num_params, dtype=torch.int32, device=device)
    vec = vector_elements(num_params, logits_BP, centres_BP, counts_BP, ends_2P, slopes_TP, means_TP)
    with on_device_of(logits_BP):
        find_cuts_kernel[(triton.cdiv(num_params, CUTS_BLOCK_P),)](
            logits_BP,
            centres_BP,
            counts_BP,
            ends_2P,
            slopes_TP,
            means_TP,
            position_P,
            left_P,
            crossings_P,
            num_bins,
            len(slopes_TP),
            num_params // vec,
            float(init),
            float(full_step),
            float(threshold),
            BISECTIONS=BISECTIONS,
            VEC=vec,
            BLOCK_P=CUTS_BLOCK_P,
            **launch_options(CUTS_WARPS),
        )
    return position_P, left_P, crossings_P


def cut_bits(rows_RP: Tensor, cut_P: Tensor, left_P: Tensor, bits: Tensor) -> None:
    num_rows, num_params = rows_RP.shape
    vec = vector_elements(num_params, rows_RP)
    with on_device_of(rows_RP):
        cut_bits_kernel[(triton.cdiv(num_params, BITS_BLOCK_P), triton.cdiv(num_rows, BITS_ROWS))](
            rows_RP,
            cut_P,
            left_P,
            bits,
            num_rows,
            num_params // vec,
            rows_RP.stride(0) // vec,
            bits.shape[1],
            VEC=vec,
            ROWS=BITS_ROWS,
            BLOCK_R=BITS_BLOCK_R,
            BLOCK_P=BITS_BLOCK_P,
            **launch_options(BITS_WARPS),
        )


def replay_bits(
    rows_RP: Tensor,
    chosen_P: Tensor,
    slopes_TP: Tensor,
    means_TP: Tensor,
    bits: Tensor,
    *,
    init: float,
    full_step: float,
    threshold: float,
) -> None:
    num_rows, num_params = rows_RP.shape
    num_bytes = bits.shape[1]
    padded = torch.nn.functional.pad(chosen_P, (0, 8 * num_bytes - num_params))
    holds_B = padded.view(num_bytes, 8).any(1)
    with on_device_of(rows_RP):
        replay_bits_kernel[(triton.cdiv(num_bytes, BITS_BLOCK_P // 8), triton.cdiv(num_rows, BITS_ROWS))](
            rows_RP,
            padded,
            holds_B.argsort(descending=True, stable=True),
            holds_B.sum(dtype=torch.int32),
            slopes_TP,
            means_TP,
            bits,
            num_rows,
            len(slopes_TP),
            num_params,
            rows_RP.stride(0),
            num_bytes,
            float(init),
            float(full_step),
            float(threshold),
            ROWS=BITS_ROWS,
            BLOCK_R=AGAIN_BLOCK_R,
            BLOCK_P=BITS_BLOCK_P,
            **launch_options(AGAIN_WARPS),
        )


# The offline compile builds these.
VARIANTS = (
    *(
        Variant(
            f"replay[{dtype}]",
            replay_kernel,
            REPLAY_WARPS,
            {"values_ptr": dtype},
            {"BLOCK_V": REPLAY_BLOCK_V, "BLOCK_P": REPLAY_BLOCK_P},
        )
        for dtype in ("fp32", "bf16")
    ),
    *(
        Variant(
            name,
            find_cuts_kernel,
            CUTS_WARPS,
            {"counts_ptr": counts, "left_ptr": "i1", "crossings_ptr": "i32"},
            {"BISECTIONS": BISECTIONS, "BLOCK_P": CUTS_BLOCK_P},
        )
        for name, counts in (("find_cuts", "u16"), ("find_cuts[i32 counts]", "i32"))
    ),
    *(
        Variant(
            f"cut_bits[{dtype}]",
            cut_bits_kernel,
            BITS_WARPS,
            {"rows_ptr": dtype, "left_ptr": "i1", "bits_ptr": "u8"},
            {"ROWS": BITS_ROWS, "BLOCK_R": BITS_BLOCK_R, "BLOCK_P": BITS_BLOCK_P},
        )
        for dtype in ("fp32", "bf16")
    ),
    *(
        Variant(
            f"replay_bits[{dtype}]",
            replay_bits_kernel,
            AGAIN_WARPS,
            {"rows_ptr": dtype, "chosen_ptr": "i1", "order_ptr": "i64", "count_ptr": "i32", "bits_ptr": "u8"},
            {"ROWS": BITS_ROWS, "BLOCK_R": AGAIN_BLOCK_R, "BLOCK_P": BITS_BLOCK_P},
        )
        for dtype in ("fp32", "bf16")
    ),
)
