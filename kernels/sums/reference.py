"""The plain twin of the sums per group of columns, in PyTorch."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

__all__ = ["group_sums_reference"]

# The number of elements that are converted to float64 at a time. A CPU's cache can hold them in
# part, and a GPU is busy with many rows only.
_CHUNK_ELEMENTS = {"cpu": 2**22}
_CHUNK_ELEMENTS_ELSEWHERE = 2**25


def group_sums_reference(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> Tensor:
    """Plain twin of :func:`group_sums`, on any device and for rows of any real dtype."""
    elements = _CHUNK_ELEMENTS.get(rows_KL.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, elements // rows_KL.shape[1])
    vectors_2L = vectors_2L.double()
    return torch.cat([_sums(part_KL.double(), vectors_2L, edges) for part_KL in rows_KL.split(step)], 1)


def _sums(rows_KL: Tensor, vectors_2L: Tensor, edges: Sequence[int]) -> Tensor:
    sums = []
    for begin, end, num_groups in _runs(edges):
        rows_KGW = rows_KL[:, begin:end].unflatten(1, (num_groups, -1))
        vectors_2GW = vectors_2L[:, begin:end].unflatten(1, (num_groups, -1))
        squares_1KG = rows_KGW.square().sum(2, keepdim=True).permute(2, 0, 1)
        sums.append(torch.cat([squares_1KG, torch.einsum("kgw,vgw->vkg", rows_KGW, vectors_2GW)]))
    return torch.cat(sums, 2)


def _runs(edges: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The first and the last column, and the number, of adjacent groups of one width."""
    for _, run in groupby(pairwise(edges), key=lambda group: group[1] - group[0]):
        groups = list(run)
        yield groups[0][0], groups[-1][1], len(groups)
