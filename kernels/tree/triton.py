"""The longest edges on the paths to the root, in Triton: one program grows the whole tree.

Each step reads one row of distances in blocks, and meanwhile finds the next row to take in. Between
the steps, the shortest edges and the heights that they lead to are stored in memory, so any number
of rows will do. In practice they stay in the cache.
"""

import torch
import triton.language as tl
from torch import Tensor

from skymask_gpu.kernels.shared.triton import Variant, kernel, launch_options, on_device_of

BLOCK_R = 1024
NUM_WARPS = 8


@kernel
def path_maxima_kernel(
    # pointers
    stored_ptr,  # (R, R) float64, float32, int32 or uint16
    edges_ptr,  # (R,) float64, inf where a row is to come in, NaN where not; overwritten
    leads_ptr,  # (R,) float64, overwritten: the height of the tree's row that the edge leads to
    heights_ptr,  # (R,) float64, 0, written where a row is to come in
    unit_ptr,  # (1,) float64
    # sizes
    num_rows,
    stored_stride,
    # meta-parameters
    BLOCK_R: tl.constexpr,
):
    unit = tl.load(unit_ptr)
    node = num_rows - 1
    height = unit * 0
    growing = True
    while growing:
        best = tl.zeros([BLOCK_R], dtype=tl.float64) + float("inf")
        best_at = tl.zeros([BLOCK_R], dtype=tl.int32)
        row_ptr = stored_ptr + tl.cast(node, tl.int64) * stored_stride
        for first in range(0, num_rows, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask_r = offs_r < num_rows
            distance = tl.load(row_ptr + offs_r, mask=mask_r, other=0).to(tl.float64) * unit  # [BLOCK_R]
            edge = tl.load(edges_ptr + offs_r, mask=mask_r, other=float("nan"))  # [BLOCK_R]
            lead = tl.load(leads_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
            # The row that was taken in gets the edge NaN. Nothing is less than NaN, so it is never
            # taken again.
            edge = tl.where(offs_r == node, float("nan"), edge)
            closer = distance < edge
            edge = tl.where(closer, distance, edge)
            tl.store(edges_ptr + offs_r, edge, mask=mask_r)
            tl.store(leads_ptr + offs_r, tl.where(closer, height, lead), mask=mask_r)
            better = edge < best
            best = tl.where(better, edge, best)
            best_at = tl.where(better, offs_r, best_at)
        # Wait here, because other threads read what a thread stored, both below and in the next
        # step.
        tl.debug_barrier()
        shortest = tl.min(best, axis=0)
        growing = shortest < float("inf")
        if growing:
            node = tl.min(tl.where(best == shortest, best_at, num_rows), axis=0)
            height = tl.maximum(tl.load(leads_ptr + node), shortest)
            tl.store(heights_ptr + node, height)


# --- called with checked arguments ---


def path_maxima(stored_RR: Tensor, kept_N: Tensor, unit: float) -> Tensor:
    if stored_RR.stride(1) != 1:
        stored_RR = stored_RR.contiguous()
    outside_R = torch.nn.functional.pad(kept_N, (0, 1))
    edges_R = torch.where(outside_R, torch.inf, torch.nan).double()
    heights_R = torch.zeros_like(edges_R)
    with on_device_of(stored_RR):
        path_maxima_kernel[(1,)](
            stored_RR,
            edges_R,
            torch.empty_like(edges_R),
            heights_R,
            torch.full((1,), unit, dtype=torch.float64, device=stored_RR.device),
            len(stored_RR),
            stored_RR.stride(0),
            BLOCK_R=BLOCK_R,
            **launch_options(NUM_WARPS),
        )
    return heights_R[:-1]


# The offline compile builds these: distances as they are stored for up to 4,096 rows, for more, and
# as a caller may pass them.
VARIANTS = tuple(
    Variant(
        f"path_maxima[{dtype}]",
        path_maxima_kernel,
        NUM_WARPS,
        {"stored_ptr": dtype, **dict.fromkeys(("edges_ptr", "leads_ptr", "heights_ptr", "unit_ptr"), "fp64")},
        {"BLOCK_R": BLOCK_R},
    )
    for dtype in ("i32", "u16", "fp64")
)
