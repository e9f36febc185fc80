"""The plain twin of the count of ones, in PyTorch."""

import torch
from torch import Tensor

__all__ = ["varying_ones_reference"]

# The number of elements that are unpacked at a time.
_CHUNK_ELEMENTS = 2**22


def varying_ones_reference(bits: Tensor) -> Tensor:
    """Plain twin of :func:`varying_ones`, on any device."""
    num_rows = len(bits)
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones_S = torch.zeros(num_rows + 1, dtype=torch.int64, device=bits.device)
    for part in bits.split(max(1, _CHUNK_ELEMENTS // (8 * num_rows)), dim=1):
        flags_RT = ((part.unsqueeze(-1) >> shifts_8) & 1).flatten(1)
        ones_T = flags_RT.sum(0, dtype=torch.int64)
        varying_T = (ones_T > 0) & (ones_T < num_rows)
        ones_S[:-1] += (flags_RT & varying_T).sum(1, dtype=torch.int64)
        ones_S[-1] += varying_T.sum()
    return ones_S
