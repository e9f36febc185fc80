"""In how many bits the rows of a packed bit matrix differ, pair by pair.

Shapes: R rows of packed bits, ``(R, bytes)`` uint8. The plain twin stands beside the public function; the compiled one is in
``_cpu/hamming.py``. There is no Triton version yet.
"""

import torch
from torch import Tensor

__all__ = ["hamming_counts", "hamming_counts_reference"]

# Bytes unpacked at a time by the twin: few enough bits that float32 counts are exact.
_TILE = 512


def hamming_counts_reference(bits: Tensor, unit: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """Plain twin of :func:`hamming_counts`, on any device.

    Rows i and j differ in G[i,i] + G[j,j] - 2 G[i,j] bits, G being the Gram matrix of the 0/1 matrix; columns in which all rows
    agree are left out.
    """
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


def hamming_counts(bits: Tensor, unit: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """``(R, R)``: the number of bits in which two rows differ, in units of ``unit``, rounded.

    Args:
        bits: ``(R, bytes)`` uint8, contiguous; padding bits are equal in all rows.
        unit: at least 1.
        dtype: of the result, int32 or uint16; the counts must fit.
    """
    if bits.device.type != "cpu":
        return hamming_counts_reference(bits, unit, dtype)
    from skymask_gpu.kernels._cpu.hamming import hamming_counts as compiled

    return compiled(bits, unit, dtype)
