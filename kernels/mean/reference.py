"""The plain twin of the mean of chosen rows, in PyTorch."""

import torch
from torch import Tensor

__all__ = ["chosen_mean_reference"]

# The number of elements that are copied to float64 at a time.
_CHUNK_ELEMENTS = 2**22


def chosen_mean_reference(rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor | None = None) -> Tensor:
    """Plain twin of :func:`chosen_mean`, on any device."""
    entering_R = chosen_R if factors_R is None else chosen_R & (factors_R != 0)
    everyone = bool(entering_R.all())
    parts = rows_RP.split(max(1, _CHUNK_ELEMENTS // len(rows_RP)), dim=1)
    sums = []
    for part in parts:
        part = part if everyone else part[entering_R]
        scaled = part if factors_R is None else part * factors_R[entering_R, None]
        sums.append(scaled.sum(0, dtype=torch.float32))
    return torch.cat(sums).double() / chosen_R.sum()
