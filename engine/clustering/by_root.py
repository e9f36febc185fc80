"""The signed rule where neither keep shares nor cosines are known.

Nothing then tells which of two sides is worse. The cut and the outliers are therefore found as in
the two-stage rule, by the root's own row, among the clients that are not copies.

Shapes: N clients, R = N + 1 rows, root last.
"""

from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.ruling import Facts, Ruling
from skymask_gpu.engine.clustering.two_stage import by_root, root_reason
from skymask_gpu.engine.distances import Distances

__all__ = ["copies_reason", "signed_by_root"]


def signed_by_root(distances: Distances, alignment_N: Tensor | None, copy_N: Tensor, backend: Backend) -> Ruling:
    """Which clients are kept.

    ``copy_N`` marks the clients whose masks are copies of two others' masks or more.
    """
    return by_root(distances, None, alignment_N, copy_N, backend, lambda facts: root_reason(facts, copies_reason(facts)))


def copies_reason(facts: Facts) -> str:
    return f"{int(facts['copies'])} masks are copies of two others' or more"
