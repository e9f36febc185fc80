"""The bins in Triton: see ``__init__.py`` for what they compute.

A program owns a block of columns and goes over the rows or bins itself. So there are no atomics,
and the results are the same in every run. Edges and bins are contiguous; rows may lie any stride
apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.bins.reference import GUARD, MOST_MOVED, WIDEST_GAP
from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, moved, on_device_of, vector_elements

# Columns whose sample a program sorts: 16 values per thread.
EDGES_BLOCK_P = 32
EDGES_WARPS = 4
# Each thread owns 16 (bin, column) cells; their two edges, count, sum and squares stay in registers
# while the rows are read.
CELLS_PER_THREAD = 16
ROWS_AT_ONCE = 4
WEIGHTS_BLOCK_P = 512
WEIGHTS_WARPS = 4
STEP_BLOCK_B = 8
STEP_BLOCK_P = 256
STEP_WARPS = 8
# The offline compile assumes the defaults of training: 16 bins and 64 sampled rows.
NUM_BINS = 16
SAMPLED_ROWS = 64


@kernel
def bin_edges_kernel(
    # pointers
    rows_ptr,  # (R, P) float32 or bfloat16
    sampled_ptr,  # (S,) int64
    edges_ptr,  # (E, P) float32, written
    # sizes; columns and strides in units of VEC elements: the compiler then knows their alignment
    num_rows,
    num_sampled,
    num_edges,
    num_col_units,
    rows_stride_units,
    # meta-parameters
    WIDEST_GAP: tl.constexpr,
    GUARD: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_sampled
    last = num_sampled - 1
    row = tl.load(sampled_ptr + offs_s, mask=mask_s, other=0)  # [BLOCK_S]
    # The row numbers are not checked, because that would make the host wait. A wrong one must not
    # read other memory.
    row = tl.minimum(tl.maximum(row, 0), num_rows - 1)
    value = tl.load(
        rows_ptr + row[None, :] * rows_stride_units * VEC + offs_p[:, None],
        mask=mask_p[:, None] & mask_s[None, :],
        other=float("inf"),
    ).to(tl.float32)  # [BLOCK_P, BLOCK_S]
    value = tl.sort(value, dim=1)

    place = offs_s[None, :]
    lowest = tl.min(value, axis=1)
    highest = tl.sum(tl.where(place == last, value, 0.0), axis=1)
    lower_quartile = tl.sum(tl.where(place == last // 4, value, 0.0), axis=1)
    upper_quartile = tl.sum(tl.where(place == 3 * last // 4, value, 0.0), axis=1)
    spread = upper_quartile - lower_quartile
    spread = tl.where(spread > 0, spread, highest - lowest)
    place_before = tl.broadcast_to(tl.maximum(offs_s - 1, 0)[None, :], [BLOCK_P, BLOCK_S])
    gap = tl.where((place > 0) & mask_s[None, :], value - tl.gather(value, place_before, axis=1), 0.0)
    reached = tl.cumsum(tl.sqrt(tl.minimum(gap, WIDEST_GAP * spread[:, None])), axis=1)  # [BLOCK_P, BLOCK_S]
    whole = tl.sum(tl.where(place == last, reached, 0.0), axis=1)

    edge = lowest - GUARD * spread
    tl.store(edges_ptr + offs_p, edge, mask=mask_p)
    for inner in range(1, num_edges - 1):
        target = whole * (inner / (num_edges - 1))
        after = tl.sum(((reached < target[:, None]) & mask_s[None, :]).to(tl.int32), axis=1)
        after = tl.minimum(tl.maximum(after, 1), last)[:, None]
        before = tl.maximum(after - 1, 0)
        lower = tl.sum(tl.where(place == before, value, 0.0), axis=1)
        upper = tl.sum(tl.where(place == after, value, 0.0), axis=1)
        start = tl.sum(tl.where(place == before, reached, 0.0), axis=1)
        end = tl.sum(tl.where(place == after, reached, 0.0), axis=1)
        back = tl.where(end > start, (end - target) / (end - start), 0.0)
        edge = tl.maximum(edge, upper - (upper - lower) * back)
        tl.store(edges_ptr + tl.cast(inner, tl.int64) * num_cols + offs_p, edge, mask=mask_p)
    tl.store(edges_ptr + tl.cast(num_edges - 1, tl.int64) * num_cols + offs_p, highest + GUARD * spread, mask=mask_p)


@kernel
def bin_rows_kernel(
    # pointers
    rows_ptr,  # (R, P) float32 or bfloat16
    edges_ptr,  # (B - 1, P) float32
    counts_ptr,  # (B, P) uint16 or int32, added to
    sums_ptr,  # (B, P) float32, added to
    squares_ptr,  # (B, P) float32, added to
    ends_ptr,  # (2, P) float32, widened
    # sizes; columns and strides in units of VEC elements
    num_rows,
    num_bins,
    num_col_units,
    rows_stride_units,
    # meta-parameters
    VEC: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    offs_b = tl.arange(0, BLOCK_B)
    mask = (offs_b < num_bins)[:, None] & mask_p[None, :]
    at = offs_b.to(tl.int64)[:, None] * num_cols + offs_p[None, :]
    # A bin holds lower <= value < upper. The outermost are open, and bins beyond B hold nothing.
    lower = tl.load(edges_ptr + at - num_cols, mask=mask & (offs_b > 0)[:, None], other=float("-inf"))  # [BLOCK_B, BLOCK_P]
    upper = tl.load(edges_ptr + at, mask=mask & (offs_b < num_bins - 1)[:, None], other=float("inf"))  # [BLOCK_B, BLOCK_P]
    count = tl.load(counts_ptr + at, mask=mask, other=0).to(tl.int32)  # [BLOCK_B, BLOCK_P]
    total = tl.load(sums_ptr + at, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_P]
    squares = tl.load(squares_ptr + at, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_P]
    middle_edge = tl.cast((num_bins - 1) // 2, tl.int64) * num_cols
    origin = tl.load(edges_ptr + middle_edge + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    lowest = tl.load(ends_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    highest = tl.load(ends_ptr + num_cols + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    for first in range(0, num_rows, ROWS_AT_ONCE):
        for i in tl.static_range(ROWS_AT_ONCE):
            row = first + i
            # A row beyond the last is read as NaN, which no comparison puts into a bin or at an
            # end.
            row_width = tl.where(row < num_rows, num_cols, 0)
            value = tl.load(
                rows_ptr + tl.cast(row, tl.int64) * rows_stride_units * VEC + offs_p,
                mask=offs_p < row_width,
                other=float("nan"),
            ).to(tl.float32)  # [BLOCK_P]
            lowest = tl.where(value < lowest, value, lowest)
            highest = tl.where(value > highest, value, highest)
            inside = (value[None, :] >= lower) & (value[None, :] < upper)
            off = value - origin
            total = tl.where(inside, total + value[None, :], total)
            squares = tl.where(inside, squares + (off * off)[None, :], squares)
            count = tl.where(inside, count + 1, count)
    tl.store(counts_ptr + at, count.to(counts_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + at, total, mask=mask)
    tl.store(squares_ptr + at, squares, mask=mask)
    tl.store(ends_ptr + offs_p, lowest, mask=mask_p)
    tl.store(ends_ptr + num_cols + offs_p, highest, mask=mask_p)


@kernel
def bin_weights_kernel(
    # pointers
    counts_ptr,  # (B, P) uint16 or int32
    sums_ptr,  # (B, P) float32, become the centres
    squares_ptr,  # (B, P) float32, become the weights
    edges_ptr,  # (B - 1, P) float32
    ends_ptr,  # (2, P) float32
    # sizes; columns in units of VEC elements
    num_bins,
    num_col_units,
    # meta-parameters
    MOST_MOVED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    lowest = tl.load(ends_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    highest = tl.load(ends_ptr + num_cols + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    middle_edge = tl.cast((num_bins - 1) // 2, tl.int64) * num_cols
    origin = tl.load(edges_ptr + middle_edge + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    # While the next bin is read, these are known of the bin at hand (the first has no variance to
    # move), and of the one before it, whose weight then gets its last part.
    rows = tl.zeros([BLOCK_P], dtype=tl.float32)
    variance, centre, before = rows, rows, rows
    weight, weight_before = rows, rows
    lower = lowest  # the edge below the next bin
    at = tl.zeros([BLOCK_P], dtype=tl.int64) + offs_p
    for b in range(num_bins):
        edge_width = tl.where(b < num_bins - 1, num_cols, 0)
        upper = tl.load(edges_ptr + at, mask=offs_p < edge_width, other=0.0)  # [BLOCK_P]
        next_rows = tl.load(counts_ptr + at, mask=mask_p, other=0).to(tl.float32)  # [BLOCK_P]
        some = tl.maximum(next_rows, 1.0)
        mean = tl.load(sums_ptr + at, mask=mask_p, other=0.0) / some
        off = mean - origin
        next_variance = tl.load(squares_ptr + at, mask=mask_p, other=0.0) / some - off * off
        empty = tl.where(b == 0, lowest, tl.where(b == num_bins - 1, highest, lower / 2 + upper / 2))
        after = tl.where(next_rows > 0, mean, empty)
        tl.store(sums_ptr + at, after, mask=mask_p)
        # The bin at hand gives weight to both of its neighbours.
        below, above = centre - before, after - centre
        share = variance / (below * above)
        share = tl.where(share > MOST_MOVED, MOST_MOVED, share)
        inner = offs_p < tl.where(b > 1, num_cols, 0)
        gives = (share > 0) & (below > 0) & (above > 0) & inner
        moved = tl.where(gives, share * rows, 0.0)
        to_above = tl.where(gives, moved * (below / (below + above)), 0.0)
        tl.store(squares_ptr + at - 2 * num_cols, weight_before + (moved - to_above), mask=inner)
        weight_before = weight - moved
        weight = next_rows + to_above
        before, centre, rows, variance, lower = centre, after, next_rows, next_variance, upper
        at += num_cols
    tl.store(squares_ptr + at - 2 * num_cols, weight_before, mask=mask_p)
    tl.store(squares_ptr + at - num_cols, weight, mask=mask_p)


@kernel
def bin_step_kernel(
    # pointers
    logits_ptr,  # (B, P) float32, overwritten
    centres_ptr,  # (B, P) float32
    weights_ptr,  # (B, P) float32
    slope_ptr,  # (P,) float32
    mean_ptr,  # (P,) float32
    gate_sum_ptr,  # (P,) float32, written
    weighted_sum_ptr,  # (P,) float32, written
    # sizes; columns in units of VEC elements
    num_bins,
    num_col_units,
    # scalars
    full_step,
    # meta-parameters
    VEC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_cols = num_col_units * VEC
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < num_cols
    slope = tl.load(slope_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    mean = tl.load(mean_ptr + offs_p, mask=mask_p, other=0.0)  # [BLOCK_P]
    gate_sum = tl.zeros([BLOCK_B, BLOCK_P], dtype=tl.float32)
    weighted_sum = tl.zeros([BLOCK_B, BLOCK_P], dtype=tl.float32)
    for first in range(0, num_bins, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        mask = (offs_b < num_bins)[:, None] & mask_p[None, :]
        at = offs_b.to(tl.int64)[:, None] * num_cols + offs_p[None, :]
        logit = tl.load(logits_ptr + at, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_P]
        centre = tl.load(centres_ptr + at, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_P]
        of_bin = tl.load(weights_ptr + at, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_P]
        logit = moved(logit, centre, slope[None, :], mean[None, :], full_step)
        tl.store(logits_ptr + at, logit, mask=mask)
        weight = tl.sigmoid(logit) * of_bin
        gate_sum += weight
        weighted_sum += weight * centre
    tl.store(gate_sum_ptr + offs_p, tl.sum(gate_sum, axis=0), mask=mask_p)
    tl.store(weighted_sum_ptr + offs_p, tl.sum(weighted_sum, axis=0), mask=mask_p)


def bin_edges(rows_RP: Tensor, sampled_S: Tensor, num_bins: int) -> Tensor:
    num_params = rows_RP.shape[1]
    edges_EP = torch.empty(num_bins - 1, num_params, device=rows_RP.device)
    vec = vector_elements(num_params, rows_RP, edges_EP)
    with on_device_of(rows_RP):
        bin_edges_kernel[(triton.cdiv(num_params, EDGES_BLOCK_P),)](
            rows_RP,
            sampled_S,
            edges_EP,
            len(rows_RP),
            len(sampled_S),
            num_bins - 1,
            num_params // vec,
            rows_RP.stride(0) // vec,
            WIDEST_GAP=WIDEST_GAP,
            GUARD=GUARD,
            VEC=vec,
            BLOCK_S=max(2, triton.next_power_of_2(len(sampled_S))),
            BLOCK_P=EDGES_BLOCK_P,
            **launch_options(EDGES_WARPS),
        )
    return edges_EP


def bin_tile(num_bins: int) -> tuple[int, int, int]:
    """Bins, columns and warps per program: all bins, and enough columns for 16-byte loads."""
    block_b = triton.next_power_of_2(num_bins)
    block_p = max(16, 2048 // block_b)
    return block_b, block_p, min(32, block_b * block_p // (32 * CELLS_PER_THREAD))


def bin_rows(
    rows_RP: Tensor, edges_EP: Tensor, counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, ends_2P: Tensor
) -> None:
    num_bins, num_params = sums_BP.shape
    vec = vector_elements(num_params, rows_RP, edges_EP, counts_BP, sums_BP, squares_BP, ends_2P)
    block_b, block_p, num_warps = bin_tile(num_bins)
    with on_device_of(rows_RP):
        bin_rows_kernel[(triton.cdiv(num_params, block_p),)](
            rows_RP,
            edges_EP,
            counts_BP,
            sums_BP,
            squares_BP,
            ends_2P,
            len(rows_RP),
            num_bins,
            num_params // vec,
            rows_RP.stride(0) // vec,
            VEC=vec,
            ROWS_AT_ONCE=ROWS_AT_ONCE,
            BLOCK_B=block_b,
            BLOCK_P=block_p,
            **launch_options(num_warps),
        )


def bin_weights(counts_BP: Tensor, sums_BP: Tensor, squares_BP: Tensor, edges_EP: Tensor, ends_2P: Tensor) -> None:
    num_bins, num_params = counts_BP.shape
    vec = vector_elements(num_params, counts_BP, sums_BP, squares_BP, edges_EP, ends_2P)
    with on_device_of(counts_BP):
        bin_weights_kernel[(triton.cdiv(num_params, WEIGHTS_BLOCK_P),)](
            counts_BP,
            sums_BP,
            squares_BP,
            edges_EP,
            ends_2P,
            num_bins,
            num_params // vec,
            MOST_MOVED=MOST_MOVED,
            VEC=vec,
            BLOCK_P=WEIGHTS_BLOCK_P,
            **launch_options(WEIGHTS_WARPS),
        )


def bin_step(
    logits_BP: Tensor, centres_BP: Tensor, weights_BP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float
) -> tuple[Tensor, Tensor]:
    num_bins, num_params = logits_BP.shape
    gate_sum_P, weighted_sum_P = torch.empty_like(slope_P), torch.empty_like(slope_P)
    vec = vector_elements(num_params, logits_BP, centres_BP, weights_BP)
    with on_device_of(logits_BP):
        bin_step_kernel[(triton.cdiv(num_params, STEP_BLOCK_P),)](
            logits_BP,
            centres_BP,
            weights_BP,
            slope_P,
            mean_P,
            gate_sum_P,
            weighted_sum_P,
            num_bins,
            num_params // vec,
            float(full_step),
            VEC=vec,
            BLOCK_B=STEP_BLOCK_B,
            BLOCK_P=STEP_BLOCK_P,
            **launch_options(STEP_WARPS),
        )
    return gate_sum_P, weighted_sum_P


# The offline compile builds these.
_TILE_B, _TILE_P, _TILE_WARPS = bin_tile(NUM_BINS)
VARIANTS = (
    *(
        Variant(
            f"bin_edges[{dtype}]",
            bin_edges_kernel,
            EDGES_WARPS,
            {"rows_ptr": dtype, "sampled_ptr": "i64"},
            {"WIDEST_GAP": WIDEST_GAP, "GUARD": GUARD, "BLOCK_S": SAMPLED_ROWS, "BLOCK_P": EDGES_BLOCK_P},
        )
        for dtype in ("fp32", "bf16")
    ),
    *(
        Variant(
            f"bin_rows[{dtype}]",
            bin_rows_kernel,
            _TILE_WARPS,
            {"rows_ptr": dtype, "counts_ptr": "u16"},
            {"ROWS_AT_ONCE": ROWS_AT_ONCE, "BLOCK_B": _TILE_B, "BLOCK_P": _TILE_P},
        )
        for dtype in ("fp32", "bf16")
    ),
    Variant(
        "bin_rows[fp32, i32 counts]",
        bin_rows_kernel,
        _TILE_WARPS,
        {"rows_ptr": "fp32", "counts_ptr": "i32"},
        {"ROWS_AT_ONCE": ROWS_AT_ONCE, "BLOCK_B": _TILE_B, "BLOCK_P": _TILE_P},
    ),
    *(
        Variant(
            name,
            bin_weights_kernel,
            WEIGHTS_WARPS,
            {"counts_ptr": counts},
            {"MOST_MOVED": MOST_MOVED, "BLOCK_P": WEIGHTS_BLOCK_P},
        )
        for name, counts in (("bin_weights", "u16"), ("bin_weights[i32 counts]", "i32"))
    ),
    Variant("bin_step", bin_step_kernel, STEP_WARPS, {}, {"BLOCK_B": STEP_BLOCK_B, "BLOCK_P": STEP_BLOCK_P}),
)
