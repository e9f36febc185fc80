"""In how many bits the rows of a packed bit matrix differ, pair by pair.

With G the Gram matrix of the 0/1 matrix, rows i and j differ in

    G[i,i] + G[j,j] - 2 G[i,j]

bits, which is also the population count of their exclusive or. Counts are integers, so every way gives the same.

Shapes: R rows of packed bits, ``(R, bytes)`` uint8. Devices: CUDA through Triton, CPU through Numba; the plain twin where there
is no Triton and on any other device.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["hamming_counts", "hamming_counts_reference", "varying_bytes"]

# Bytes unpacked at a time by the twin: few enough bits that float32 counts are exact.
_TILE = 512


def hamming_counts_reference(
    bits: Tensor, unit: int = 1, dtype: torch.dtype = torch.int32, columns: Tensor | None = None
) -> Tensor:
    """Plain twin of :func:`hamming_counts`, on any device; columns in which all rows agree are left out."""
    if columns is not None:
        bits = bits[:, columns]
    num_rows = len(bits)
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    counts_RR = torch.zeros(num_rows, num_rows, dtype=torch.int32, device=bits.device)
    for part in bits.split(_TILE, dim=1):
        flags_RT = ((part.unsqueeze(-1) >> shifts_8) & 1).flatten(1)
        ones_T = flags_RT.sum(0)
        varying_RV = flags_RT[:, (ones_T > 0) & (ones_T < num_rows)].float()
        gram_RR = varying_RV @ varying_RV.T
        ones_R = gram_RR.diagonal()
        counts_RR += (ones_R[:, None] + ones_R[None, :] - 2 * gram_RR).int()
    return ((counts_RR + unit // 2) // unit).to(dtype)


def varying_bytes(bits: Tensor) -> Tensor:
    """``(bytes,)`` bool: in which bytes not all rows are equal. One read of the bits."""
    lowest, highest = bits.aminmax(dim=0)
    return lowest != highest


def hamming_counts(bits: Tensor, unit: int = 1, dtype: torch.dtype = torch.int32, columns: Tensor | None = None) -> Tensor:
    """``(R, R)``: the number of bits in which two rows differ, in units of ``unit``, rounded.

    Args:
        bits: ``(R, bytes)`` uint8, contiguous; padding bits are equal in all rows.
        unit: at least 1.
        dtype: of the result, int32 or uint16; the counts must fit.
        columns: ``(bytes,)`` bool, which bytes to look at; None: all. With :func:`varying_bytes` the result is the same as
            without. That costs a read and a copy of the bits and saves little: of 60 clients' masks (a CNN on MNIST), 77 to 98%
            of the bytes vary, though only 53 to 78% of the columns do.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    _check(bits, unit, dtype, columns)
    if bits.is_cuda and find_spec("triton"):
        from skymask_gpu.kernels._triton.hamming import hamming_counts as on_triton

        return on_triton(bits, unit, dtype, columns)
    if bits.device.type == "cpu":
        from skymask_gpu.kernels._cpu.hamming import hamming_counts as compiled

        return compiled(bits if columns is None else bits[:, columns], unit, dtype)
    return hamming_counts_reference(bits, unit, dtype, columns)


def _check(bits: Tensor, unit: int, dtype: torch.dtype, columns: Tensor | None) -> None:
    if bits.dim() != 2 or bits.dtype != torch.uint8 or 0 in bits.shape:
        raise ValueError(f"bits must be non-empty (R, bytes) uint8, got {tuple(bits.shape)} {bits.dtype}")
    if unit < 1 or dtype not in (torch.int32, torch.uint16):
        raise ValueError(f"unit must be at least 1 and dtype int32 or uint16, got {unit} and {dtype}")
    if columns is not None and (columns.shape != bits.shape[1:] or columns.dtype != torch.bool):
        raise ValueError(f"columns must be ({bits.shape[1]},) bool, got {tuple(columns.shape)} {columns.dtype}")
