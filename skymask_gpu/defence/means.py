"""Means over the clients that are kept: of their updates, and of the buffers (batch-norm statistics) that they sent."""

import torch
from torch import Tensor

from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.profiling import phase
from skymask_gpu.kernels.anywhere import chosen_mean

__all__ = ["mean_buffer", "mean_buffers", "mean_of_rows"]


def mean_of_rows(rows: ClientBlocks, chosen_K: Tensor) -> Tensor:
    """``(P,)`` float32 mean of the rows where ``chosen_K``, ``(K,)`` bool, is set.

    It is the mean of the blocks' means, each weighted by its number of chosen rows, in float64.
    """
    total_P = torch.zeros(rows.num_params, dtype=torch.float64, device=rows.device)
    for block, chosen in zip(rows, chosen_K.split(rows.sizes), strict=True):
        num_chosen = int(chosen.sum())
        if num_chosen:
            with phase("average", num_chosen * block[0].nbytes):
                total_P += chosen_mean(block, chosen) * num_chosen
    return (total_P / chosen_K.sum()).float()


def mean_buffers(buffers: list[dict[str, Tensor]], benign_K: Tensor) -> dict[str, Tensor]:
    """Each buffer that benign clients sent, over those clients: see :func:`mean_buffer`."""
    chosen = [row for row, benign in zip(buffers, benign_K.tolist(), strict=True) if benign]
    names = sorted({name for row in chosen for name in row})
    return {name: mean_buffer(torch.stack([row[name] for row in chosen if name in row])) for name in names}


def mean_buffer(values: Tensor) -> Tensor:
    """The mean of a buffer over clients, ``(M, ...) -> (...)``, M >= 1; counters (whole numbers) take the largest value.

    Example:
        >>> mean_buffer(torch.tensor([[1.0], [2.0]])), mean_buffer(torch.tensor([3, 5]))
        (tensor([1.5000]), tensor(5))
    """
    return values.mean(0) if values.is_floating_point() else values.amax(0)
