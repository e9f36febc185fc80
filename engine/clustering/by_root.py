"""The signed rule where neither keep shares nor cosines are known.

Nothing then tells which of two sides is worse. The cut and the outliers are therefore found as in
the two-stage rule, by the root's own row, among the clients that are not copies.

Shapes: N clients, R = N + 1 rows, root last.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.among import others_at_the_centroid
from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.ruling import Facts, Ruling, separation
from skymask_gpu.engine.clustering.two_stage import (
    ALL_KEPT,
    SMALLEST_SHARE,
    cut_by_root,
    cut_reasons,
    scattered,
    scattered_reason,
    with_root,
)
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.anywhere import path_maxima

__all__ = ["copies_reason", "signed_by_root"]

# If more than this share of the clients are copies, the others are not cut. Two decoys among 20
# clients do not exceed it. No range was measured for this number.
MANY_COPIES = 0.1


def signed_by_root(distances: Distances, alignment_N: Tensor | None, copy_N: Tensor, backend: Backend) -> Ruling:
    """Which clients are kept.

    ``copy_N`` marks the clients whose masks are copies of two others' masks or more.
    """
    smallest = SMALLEST_SHARE * len(copy_N)
    others = others_at_the_centroid(distances, torch.cat([~copy_N, copy_N.new_ones(1)]))
    scores_R2, settled = backend.principal_scores(others)
    x_R = scores_R2[:, 0].contiguous()
    with_root_N = with_root(x_R, scores_R2, backend)
    apart = separation(others, with_root_N)
    cut_N, facts = cut_by_root(x_R[:-1], with_root_N, apart, alignment_N, smallest)
    # What many copies leave of each honest label group spreads less than the groups lie apart. A
    # cut would then separate honest clients, so there is none.
    many = copy_N.sum() > MANY_COPIES * len(copy_N)
    kept_N = ~copy_N & (cut_N | many)
    scattered_N, gap = scattered(path_maxima(distances.stored, kept_N, distances.unit), kept_N, smallest)
    facts = {**facts, "copies": copy_N.sum(), "many": many, "scattered": scattered_N.sum(), "gap": gap}
    return Ruling(kept_N & ~scattered_N, apart, _reason, facts, sure=settled)


def _reason(facts: Facts) -> str:
    reasons = [copies_reason(facts)] if facts["copies"] else []
    cut = [] if facts["many"] else cut_reasons(facts)
    # The reason "root alone" says why everyone is kept, so it must not stand beside a rejection.
    if not (facts["root alone"] and (reasons or facts["scattered"])):
        reasons += cut
    if facts["scattered"]:
        reasons.append(scattered_reason(facts))
    return " and ".join(reasons) or ALL_KEPT


def copies_reason(facts: Facts) -> str:
    return f"{int(facts['copies'])} masks are copies of two others' or more"
