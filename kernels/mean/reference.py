"""The plain twin of the mean of chosen rows, in PyTorch."""

import torch
from torch import Tensor

__all__ = ["chosen_mean_reference"]

# The number of elements that are copied to float64 at a time.
_CHUNK_ELEMENTS = 2**22


def chosen_mean_reference(rows_RP: Tensor, chosen_R: Tensor) -> Tensor:
    """Plain twin of :func:`chosen_mean`, on any device."""
    everyone = bool(chosen_R.all())
    parts = rows_RP.split(max(1, _CHUNK_ELEMENTS // len(rows_RP)), dim=1)
    sum_P = torch.cat([(part if everyone else part[chosen_R]).sum(0, dtype=torch.float32) for part in parts])
    return sum_P.double() / chosen_R.sum()
