"""The plain twin of the tree, in PyTorch. On a CPU it is what the public function runs."""

import torch
from torch import Tensor

__all__ = ["path_maxima_reference"]


def path_maxima_reference(stored_RR: Tensor, kept_N: Tensor, unit: float = 1.0) -> Tensor:
    """Plain twin of :func:`path_maxima`, on any device."""
    root = len(stored_RR) - 1

    def distances_to(node: int) -> Tensor:
        return stored_RR[node].to(torch.float64) * unit

    height_R = torch.zeros(root + 1, dtype=torch.float64, device=stored_RR.device)
    # The shortest edge into the tree, and the tree's node that it leads to. The edge is inf for
    # rows that are in the tree or are to stay out.
    outside_R = torch.cat([kept_N, kept_N.new_zeros(1)])
    edge_R = torch.where(outside_R, distances_to(root), torch.inf)
    parent_R = torch.full((root + 1,), root, device=stored_RR.device)
    for _ in range(int(kept_N.sum())):
        node = int(edge_R.argmin())
        height_R[node] = torch.maximum(height_R[parent_R[node]], edge_R[node])
        outside_R[node] = False
        edge_R[node] = torch.inf
        row_R = distances_to(node)
        closer_R = outside_R & (row_R < edge_R)
        edge_R = torch.where(closer_R, row_R, edge_R)
        parent_R[closer_R] = node
    return height_R[:-1]
