"""The plain twin of the differing bits, in PyTorch: compiled versions are compared with it."""

import torch
from torch import Tensor

__all__ = ["hamming_counts_reference"]

# Bytes that are unpacked at a time: few enough bits that counts in float32 are exact.
_TILE = 512


def hamming_counts_reference(bits: Tensor, unit: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """Plain twin of :func:`hamming_counts`, on any device."""
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
