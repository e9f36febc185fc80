"""The plain twin of the differing bits, in PyTorch: compiled versions are compared with it."""

import torch
from torch import Tensor

__all__ = ["hamming_counts_between_reference", "hamming_counts_reference"]

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


def hamming_counts_between_reference(bits: Tensor, others: Tensor) -> Tensor:
    """Plain twin of :func:`hamming_counts_between`, on any device."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    counts_RS = torch.zeros(len(bits), len(others), dtype=torch.int32, device=bits.device)
    for part in zip(bits.split(_TILE, dim=1), others.split(_TILE, dim=1), strict=True):
        rows_RT, others_ST = (((matrix.unsqueeze(-1) >> shifts_8) & 1).flatten(1).float() for matrix in part)
        counts_RS += (rows_RT.sum(1)[:, None] + others_ST.sum(1) - 2 * rows_RT @ others_ST.T).int()
    return counts_RS
