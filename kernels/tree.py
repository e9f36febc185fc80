"""How far out each row of a distance matrix lies: the longest edge on its way to the root in the minimum spanning tree.

Prim's algorithm from the root, which is the last row. With e[i] the shortest edge from row i into the tree so far, and h[i] the
height of the row of the tree that it leads to, each step takes the row with the least e into the tree and

    height[row] = max(h[row], e[row])

after which rows that lie nearer to it have e[i] = distance[row, i], h[i] = height[row]. Of rows equally near the one with the
lowest number comes first (as ``torch.argmin`` promises); the heights are the same whichever does, since they are the
bottlenecks of the best ways to the root.

Shapes: N rows and the root, R = N + 1. Devices: CUDA through Triton, the whole tree in one launch and without the host; on a
CPU plain torch.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels._backends import compiled
from skymask_gpu.kernels._checks import check_tensor

__all__ = ["path_maxima", "path_maxima_reference"]

_DTYPES = (torch.float64, torch.float32, torch.int32, torch.uint16)


def path_maxima_reference(stored_RR: Tensor, kept_N: Tensor, unit: float = 1.0) -> Tensor:
    """Plain twin of :func:`path_maxima`, on any device."""
    root = len(stored_RR) - 1

    def distances_to(node: int) -> Tensor:
        return stored_RR[node].to(torch.float64) * unit

    height_R = torch.zeros(root + 1, dtype=torch.float64, device=stored_RR.device)
    # the shortest edge into the tree (inf: in it, or not to come into it), and the tree's node it leads to
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


def path_maxima(stored_RR: Tensor, kept_N: Tensor, unit: float = 1.0) -> Tensor:
    """``(N,)`` float64: the longest edge on each kept row's way to the root in the minimum spanning tree.

    Args:
        stored_RR: ``(R, R)`` symmetric distances, finite, root last: float64, float32, int32 or uint16.
        kept_N: ``(N,)`` bool, the rows that the tree spans beside the root; the others' heights are 0.
        unit: what one of ``stored_RR`` is worth.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, or no kernel exists for the device.
    """
    check_tensor("distances", stored_RR, ("R", "R"), _DTYPES, "any strides")
    num_rows, num_columns = stored_RR.shape
    if num_rows != num_columns:
        raise ValueError(f"distances must be square (R, R), got {tuple(stored_RR.shape)}")
    check_tensor("kept", kept_N, (num_rows - 1,), (torch.bool,), "any strides", device=stored_RR.device)
    if stored_RR.device.type == "cpu":
        return path_maxima_reference(stored_RR, kept_N, unit)
    heights_N: Tensor = _backend("distances", stored_RR).path_maxima(stored_RR, kept_N, unit)
    return heights_N


_backend = partial(compiled, "tree")
