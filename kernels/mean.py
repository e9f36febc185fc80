"""The mean of some rows of stacked updates, in one pass that reads no other row.

    mean[k] = sum over chosen i of rows[i, k] / number of chosen rows

A row that is not chosen never enters, whatever it holds: NaN and 1e30 leave no trace. That is also why the mean is not gathered
in an earlier pass over the updates: who is benign is known only after clustering, and to take the rejected rows out of a sum of
all would let one large hostile row destroy the mean by cancellation.

Sums are float64 on a CPU, on a GPU float32 within a share of the rows and float64 over the shares. Shapes: R rows, P columns.
Rows: float32 or bfloat16, any row stride, unit column stride. Devices: CUDA through Triton, CPU through Numba; the plain twin
where there is no Triton and on any other device.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["chosen_mean", "chosen_mean_reference"]

# Elements that the twin copies at a time.
_CHUNK_ELEMENTS = 2**22


def chosen_mean_reference(rows_RP: Tensor, chosen_R: Tensor) -> Tensor:
    """Plain twin of :func:`chosen_mean`, on any device."""
    everyone = bool(chosen_R.all())
    parts = rows_RP.split(max(1, _CHUNK_ELEMENTS // len(rows_RP)), dim=1)
    sum_P = torch.cat([(part if everyone else part[chosen_R]).sum(0, dtype=torch.float32) for part in parts])
    return sum_P.double() / chosen_R.sum()


def chosen_mean(rows_RP: Tensor, chosen_R: Tensor) -> Tensor:
    """``(P,)`` float64: the mean of the chosen rows; NaN if none is chosen.

    Args:
        rows_RP: ``(R, P)`` float32 or bfloat16, unit column stride.
        chosen_R: ``(R,)`` bool.

    Raises:
        ValueError: a shape, a dtype or a stride does not fit.
    """
    if rows_RP.dim() != 2 or 0 in rows_RP.shape or rows_RP.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"rows must be non-empty (R, P) float32 or bfloat16, got {tuple(rows_RP.shape)} {rows_RP.dtype}")
    if rows_RP.stride(1) != 1 and rows_RP.shape[1] > 1:
        raise ValueError(f"rows must have unit column stride, got strides {rows_RP.stride()}; call .contiguous()")
    if chosen_R.shape != rows_RP.shape[:1] or chosen_R.dtype != torch.bool:
        raise ValueError(f"chosen must be ({len(rows_RP)},) bool, got {tuple(chosen_R.shape)} {chosen_R.dtype}")
    if rows_RP.is_cuda and find_spec("triton"):
        from skymask_gpu.kernels._triton.mean import chosen_mean as on_triton

        return on_triton(rows_RP, chosen_R)
    if rows_RP.device.type == "cpu":
        from skymask_gpu.kernels._cpu.mean import chosen_mean as compiled

        return compiled(rows_RP, chosen_R)
    return chosen_mean_reference(rows_RP, chosen_R)
