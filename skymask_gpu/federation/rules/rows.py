"""Sums, norms and distances of the rows of ``(N, P)`` updates, in float64 on blocks of columns.

No temporary is larger than ``(N, N)`` or a block, and values as large as 1e30 neither overflow nor
turn to NaN.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "clipped_mean",
    "column_blocks",
    "cosine_distances",
    "inner_products",
    "mean_of_kept",
    "median_deviations",
    "row_norms",
    "squared_distances",
    "squared_distances_to",
    "weighted_sum",
]

_BLOCK_ELEMENTS = 2**22
# Cosine distances below this come from rounding: float32 rows that differ are further apart.
_ROUNDING = 1e-14
# Standard deviations below this share of the largest value come from rounding.
_SAME = 1e-12


def column_blocks(updates_NP: Tensor) -> Iterator[Tensor]:
    """Yield blocks of columns, ``(N, p)`` float64, from left to right."""
    for block in updates_NP.split(_block_width(updates_NP), dim=1):
        yield block.double()


def weighted_sum(updates_NP: Tensor, weights_N: Tensor) -> Tensor:
    """The sum of the rows, each times its weight, ``(P,)`` float64."""
    return torch.cat([weights_N.double() @ block for block in column_blocks(updates_NP)])


def mean_of_kept(updates_NP: Tensor, kept_N: Tensor) -> Tensor:
    """The mean of the kept rows, ``(P,)``, in the updates' dtype; zero if none is kept."""
    return (weighted_sum(updates_NP, kept_N) / kept_N.sum().clamp_min(1)).to(updates_NP.dtype)


def clipped_mean(updates_NP: Tensor, kept_N: Tensor, norms_N: Tensor, bound: Tensor) -> Tensor:
    """The mean of the kept rows, ``(P,)``, each first scaled down to the norm ``bound``.

    Shorter rows stay as they are. The mean is zero if no row is kept.
    """
    scale_N = (bound / norms_N.clamp_min(torch.finfo(norms_N.dtype).tiny)).clamp_max(1)
    return weighted_sum(updates_NP, kept_N * scale_N / kept_N.sum().clamp_min(1)).to(updates_NP.dtype)


def row_norms(updates_NP: Tensor) -> Tensor:
    """The Euclidean norm of each row, ``(N,)`` float64."""
    return squared_distances_to(updates_NP, updates_NP.new_zeros(updates_NP.shape[1])).sqrt()


def squared_distances_to(updates_NP: Tensor, point: Tensor) -> Tensor:
    """Each row's squared distance to a point, ``(P,)``, or to its own point of ``(N, P)``."""
    total_N = updates_NP.new_zeros(len(updates_NP), dtype=torch.float64)
    parts = point.split(_block_width(updates_NP), dim=-1)
    for block, part in zip(column_blocks(updates_NP), parts, strict=True):
        total_N += (block - part.double()).square().sum(1)
    return total_N


def inner_products(updates_NP: Tensor, shift_P: Tensor | None = None) -> Tensor:
    """The inner product of each two rows, ``(N, N)`` float64; ``shift_P`` is added to all rows."""
    total_NN = updates_NP.new_zeros(len(updates_NP), len(updates_NP), dtype=torch.float64)
    start = 0
    for block in column_blocks(updates_NP):
        if shift_P is not None:
            # Not in place: a block of float64 updates is a view of the caller's tensor.
            block = block + shift_P[start : start + block.shape[1]].double()
        total_NN.addmm_(block, block.T)
        start += block.shape[1]
    return total_NN


def squared_distances(updates_NP: Tensor) -> Tensor:
    """The squared distance of each two rows, ``(N, N)`` float64; 0 on the diagonal."""
    products_NN = inner_products(updates_NP)
    squares_N = products_NN.diagonal()
    return (squares_N[:, None] + squares_N - 2 * products_NN).clamp_min(0).fill_diagonal_(0)


def cosine_distances(products_NN: Tensor) -> Tensor:
    """1 - cosine of each two rows, ``(N, N)`` float64, from their inner products.

    A row of zeros is at distance 1 from all others.
    """
    lengths_N = products_NN.diagonal().sqrt()
    lengths_NN = (lengths_N[:, None] * lengths_N).clamp_min(torch.finfo(products_NN.dtype).tiny)
    distances_NN = (1 - products_NN / lengths_NN).fill_diagonal_(0)
    return torch.where(distances_NN < _ROUNDING, 0, distances_NN)


def median_deviations(values_N: Tensor) -> Tensor:
    """Each number's |x - median| in standard deviations (with division by n), ``(N,)`` float64.

    They are 0 if the standard deviation is only rounding.
    """
    deviation = values_N.std(correction=0)
    is_rounding = deviation <= _SAME * values_N.abs().max()
    distances_N = (values_N - values_N.quantile(0.5)).abs()
    return torch.where(is_rounding, 0, distances_N / deviation.clamp_min(torch.finfo(values_N.dtype).tiny))


def _block_width(updates_NP: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // len(updates_NP))
