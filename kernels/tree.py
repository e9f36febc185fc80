"""The longest edges on the ways to the root in a minimum spanning tree.

Shapes: N clients, R = N + 1 rows, the root's last.
"""

import math

import torch
from torch import Tensor

__all__ = ["path_maxima", "path_maxima_reference"]


def path_maxima_reference(stored_RR: Tensor, kept_N: Tensor, unit: float = 1.0) -> Tensor:
    """Plain twin of :func:`path_maxima`, on any device."""

    def row(number: int) -> Tensor:
        return stored_RR[number].to(torch.float64) * unit

    root = len(stored_RR) - 1
    height_R = torch.zeros(root + 1, dtype=torch.float64, device=stored_RR.device)
    # the shortest edge into the tree (inf: in it, or not to come into it), and the tree's node it leads to
    outside_R = torch.cat([kept_N, kept_N.new_zeros(1)])
    edge_R = torch.where(outside_R, row(root), torch.inf)
    parent_R = torch.full((root + 1,), root, device=stored_RR.device)
    for _ in range(int(kept_N.sum())):
        node = int(edge_R.argmin())
        height_R[node] = torch.maximum(height_R[parent_R[node]], edge_R[node])
        outside_R[node] = False
        edge_R[node] = math.inf
        row_R = row(node)
        closer_R = outside_R & (row_R < edge_R)
        edge_R = torch.where(closer_R, row_R, edge_R)
        parent_R[closer_R] = node
    return height_R[:-1]


def path_maxima(stored_RR: Tensor, kept_N: Tensor, unit: float = 1.0) -> Tensor:
    """``(N,)`` float64: the longest edge on each kept client's way to the root in the minimum spanning tree (Prim's algorithm).

    The tree spans the kept clients and the root; the others' heights are 0.

    Args:
        stored_RR: ``(R, R)`` symmetric distances of any real dtype, root row last.
        kept_N: ``(N,)`` bool.
        unit: what one of ``stored_RR`` is worth.
    """
    return path_maxima_reference(stored_RR, kept_N, unit)
