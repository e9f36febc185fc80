"""Means over the kept clients: of their updates, and of their buffers (batch-norm statistics)."""

import torch
from torch import Tensor

from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.profiling import phase
from skymask_gpu.kernels.anywhere import chosen_mean

__all__ = ["mean_buffer", "mean_buffers", "mean_of_rows"]


def mean_of_rows(rows: ClientBlocks, chosen_K: Tensor) -> Tensor:
    """The mean, ``(P,)`` float32, of the rows where ``chosen_K``, ``(K,)`` bool, is True.

    It is the mean of the blocks' means, each weighted by its number of chosen rows, in float64.

    Example:
        >>> rows = ClientBlocks([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(1, 2)])
        >>> mean_of_rows(rows, torch.tensor([True, True, False]))
        tensor([2., 3.])
    """
    total_P = torch.zeros(rows.num_params, dtype=torch.float64, device=rows.device)
    for block, chosen in zip(rows, chosen_K.split(rows.sizes), strict=True):
        num_chosen = int(chosen.sum())
        if num_chosen:
            with phase("average", num_chosen * block[0].nbytes):
                total_P += chosen_mean(block, chosen) * num_chosen
    return (total_P / chosen_K.sum()).float()


def mean_buffers(buffers: list[dict[str, Tensor]], benign_K: Tensor) -> dict[str, Tensor]:
    """The mean of each buffer over the benign clients that sent it; see :func:`mean_buffer`.

    Args:
        buffers: one dict per client, from the name of a buffer to its value.
        benign_K: ``(K,)`` bool.
    """
    chosen = [row for row, benign in zip(buffers, benign_K.tolist(), strict=True) if benign]
    names = sorted({name for row in chosen for name in row})
    return {name: mean_buffer(torch.stack([row[name] for row in chosen if name in row])) for name in names}


def mean_buffer(values: Tensor) -> Tensor:
    """The mean of a buffer over M >= 1 clients, ``(M, ...) -> (...)``.

    A counter (whole numbers) gets the largest of the clients' values instead.

    Example:
        >>> mean_buffer(torch.tensor([[1.0], [2.0]])), mean_buffer(torch.tensor([3, 5]))
        (tensor([1.5000]), tensor(5))
    """
    return values.mean(0) if values.is_floating_point() else values.amax(0)
