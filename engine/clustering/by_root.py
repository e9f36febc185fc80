"""The signed rule where neither keep shares nor cosines are known.

Nothing then tells which of two sides is worse. The cut and the outliers are therefore found as in
the two-stage rule, by the root's own row, among the clients that are not copies.

Shapes: N clients, R = N + 1 rows, root last.
"""

from dataclasses import replace

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.among import others_at_the_centroid
from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.ruling import Facts, Ruling
from skymask_gpu.engine.clustering.two_stage import by_root, root_reason
from skymask_gpu.engine.distances import Distances

__all__ = ["copies_reason", "signed_by_root"]


def signed_by_root(distances: Distances, alignment_N: Tensor | None, copy_N: Tensor, backend: Backend) -> Ruling:
    """Which clients are kept.

    ``copy_N`` marks the clients whose masks are copies of two others' masks or more.
    """
    others = others_at_the_centroid(distances, torch.cat([~copy_N, copy_N.new_ones(1)]))
    scores_R2, settled = backend.principal_scores(others)
    ruling = by_root(distances, others, scores_R2, alignment_N, copy_N, backend, _reason)
    return replace(ruling, sure=settled)


def _reason(facts: Facts) -> str:
    return root_reason(facts, copies_reason(facts))


def copies_reason(facts: Facts) -> str:
    return f"{int(facts['copies'])} masks are copies of two others' or more"
