"""How far out each row of a distance matrix lies: the longest edge on its path to the root.

The path is the one in the minimum spanning tree. Prim's algorithm grows the tree from the root,
which is the last row. Let e[i] be the shortest edge from row i into the tree so far, and h[i] the
height of the tree's row that this edge leads to. Each step takes the row with the least e into the
tree, with

    height[row] = max(h[row], e[row])

Rows that lie nearer to the new row than to the rest of the tree then get e[i] = distance[row, i]
and h[i] = height[row]. If several rows are equally near, the one with the lowest number comes
first, as with ``torch.argmin``. The heights do not depend on that choice, because each is the
bottleneck of the best path to the root.

Shapes: N rows and the root, R = N + 1. Devices: on CUDA one Triton launch grows the whole tree,
without the host. On a CPU the plain twin runs.
"""

from functools import partial

import torch
from torch import Tensor

from skymask_gpu.kernels.dispatch import compiled
from skymask_gpu.kernels.shared.checks import check_tensor
from skymask_gpu.kernels.tree.reference import path_maxima_reference

__all__ = ["path_maxima", "path_maxima_reference"]

_DTYPES = (torch.float64, torch.float32, torch.int32, torch.uint16)


def path_maxima(stored_RR: Tensor, kept_N: Tensor, unit: float = 1.0) -> Tensor:
    """The longest edge on each kept row's path to the root, ``(N,)`` float64.

    Args:
        stored_RR: ``(R, R)`` symmetric distances, finite, root last: float64, float32, int32 or
            uint16.
        kept_N: ``(N,)`` bool, the rows that the tree spans beside the root; all others get 0.
        unit: the distance that a stored 1 stands for.

    Raises:
        ValueError: a shape, a dtype or a device does not fit, or no kernel exists for the device.

    Example:
        >>> distances = torch.tensor([[0, 1, 9], [1, 0, 4], [9, 4, 0]], dtype=torch.int32)
        >>> path_maxima(distances, torch.ones(2, dtype=torch.bool)).tolist()
        [4.0, 4.0]
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


_backend = partial(compiled, __name__)
