"""The two-stage rule: it first rejects copies of each other or one side of a cut, then outliers.

Where many masks are copies, the others are not cut.

Shapes: N clients, R = N + 1 rows, the root's row last.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.ruling import Facts, Ruling, mean_of, separation
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.anywhere import path_maxima

__all__ = [
    "SMALLEST_SHARE",
    "by_root",
    "copies",
    "copy_reach",
    "nearest_neighbours",
    "root_reason",
    "scattered",
    "two_stage",
]

# --- The constants, and where each comes from ---

# Two groups are apart if the squared distance of their centroids exceeds this multiple of their
# variance. Results are the same from 0.75 to 1.25.
SEPARATION = 1.0
# Outliers begin where an edge exceeds the one before it by this ratio. Honest label groups come
# close to it.
GAP = 1.35
# The attack model allows 80% attackers. At least this share of the clients is therefore honest.
SMALLEST_SHARE = 0.2
# A cut whose sides do not lie that far apart counts too if it is clean and its far side has little
# to do with the root direction. CLEAN_CUT is Ashman's D of the two normals on the first principal
# component. LESS_ALIGNED is the far side's mean alignment with the root direction over that of the
# near side. Without attackers D is at most 5.6 and the ratio at least 0.5. With flipped signs or
# labels D is at least 7.1 and the ratio at most 0.3.
CLEAN_CUT = 6.0
LESS_ALIGNED = 0.4
# A copy is nearer to its nearest mask than this share of the usual distance to a nearest mask. The
# share is 0 for attackers that all send one update, and 0.19 and more for honest clients of a CNN,
# but less than 0.1 for a few clients of a small MLP with a dozen samples each.
COPY = 0.02
# A group of copies is rejected if it has at least three members and more than this share of all
# clients. Fewer are judged like everybody else, because an honest client may have uploaded its file
# twice, or attackers may replay its update to get it rejected. Attackers who would have an honest
# client rejected must spend this share of all clients on it.
MANY_COPIES = 0.1
# The usual distance is this quantile of the clients' distances to a nearest mask. It belongs to an
# honest client even when four in five clients are copies.
HONEST_QUANTILE = 0.9
# The first component is a direction only if the second eigenvalue is smaller by at least this share
# of the first. Where masks are all equally far apart the two are equal, and rounding, which moves
# them by about 1e-14, would choose which clients a cut takes off.
NO_DIRECTION = 1e-6
EM_STEPS = 100
# The floor of a normal's variance, as a share of the variance of all scores.
VARIANCE_FLOOR = 1e-3
ALL_KEPT = "no group of masks lies further apart than honest clients do: all kept"


def two_stage(distances: Distances, scores_R2: Tensor, alignment_N: Tensor | None, backend: Backend) -> Ruling:
    """Which clients are kept.

    ``alignment_N``, float64, is the inner product of each client's update with the root direction,
    or None if it is not known.
    """
    copy_N = copies(distances)
    # Copies are no evidence if hardly anyone is left without them.
    copy_N = copy_N & ((~copy_N).sum() >= SMALLEST_SHARE * len(copy_N))
    return by_root(distances, distances, scores_R2, alignment_N, copy_N, backend, _reason)


def by_root(
    distances: Distances,
    others: Distances,
    scores_R2: Tensor,
    alignment_N: Tensor | None,
    copy_N: Tensor,
    backend: Backend,
    reason: Callable[[Facts], str],
) -> Ruling:
    """Reject copies, then what a cut by the root's own mask takes off the others, then outliers.

    Args:
        distances: those of R rows.
        others: the distances that the cut is looked for in; copies may stand at the centroid of
            all other rows there.
        scores_R2: the principal scores of ``others``.
        alignment_N: see :func:`two_stage`.
        copy_N: the copies, ``(N,)`` bool.
        backend: computes scores and mixtures.
        reason: makes the sentence.
    """
    smallest = SMALLEST_SHARE * len(copy_N)
    many = copy_N.sum() > MANY_COPIES * len(copy_N)
    x_R = scores_R2[:, 0].contiguous()
    with_root_N = with_root(x_R, scores_R2, backend)
    # Many copies are a side of their own.
    apart = separation(others, torch.where(many, ~copy_N, with_root_N))
    cut_N, cut_facts = _cut(x_R[:-1], with_root_N, apart, alignment_N, copy_N, smallest)
    # What many copies leave of each honest label group spreads less than the groups lie apart. A
    # cut would then separate honest clients, so there is none.
    kept_N = ~copy_N & (cut_N | many)
    scattered_N, gap = scattered(path_maxima(distances.stored, kept_N, distances.unit), kept_N, smallest)
    facts = {"copies": copy_N.sum(), "many": many, **cut_facts, "scattered": scattered_N.sum(), "gap": gap}
    return Ruling(kept_N & ~scattered_N, apart, reason, facts)


def with_root(x_R: Tensor, scores_R2: Tensor, backend: Backend) -> Tensor:
    """Which clients are on the root's side when two normals are fitted to the component ``x_R``.

    The result is ``(N,)`` bool. All clients are on the root's side where there is no first
    component: see ``NO_DIRECTION``.
    """
    side_R = backend.two_normals(x_R, EM_STEPS, VARIANCE_FLOOR)
    # the two leading eigenvalues
    first, second = scores_R2.square().sum(0).unbind()
    return (side_R[:-1] == side_R[-1]) | (second >= (1 - NO_DIRECTION) * first)


def copies(distances: Distances) -> Tensor:
    """Clients of a large group whose masks are copies of each other, ``(N,)`` bool.

    Such masks are nearer to each other than two models come that are each trained on their own
    data. See ``MANY_COPIES`` for what is large.
    """
    alike_N = num_alike(distances)
    return (alike_N >= 3) & (alike_N > MANY_COPIES * len(alike_N))


def num_alike(distances: Distances) -> Tensor:
    """For each client the number of clients whose masks are copies of its own, ``(N,)`` int64.

    The client itself counts, unless the reach of a copy is 0.
    """
    nearest_R = nearest_neighbours(distances)
    reach = copy_reach(nearest_R, torch.ones_like(nearest_R[:-1], dtype=torch.bool))
    near_R = torch.empty(len(distances), dtype=torch.int64, device=distances.device)
    for first, block_TR in distances.blocks():
        near_R[first : first + len(block_TR)] = (block_TR[:, :-1] < reach).sum(1)
    return near_R[:-1]


def copy_reach(nearest_R: Tensor, among_N: Tensor) -> Tensor:
    """The distance, ``()``, below which a mask is a copy, given each row's distance to its nearest.

    Two models that are each trained on their own data do not come that near. The usual distance is
    that among the clients ``among_N``, ``(N,)`` bool.
    """
    return COPY * torch.minimum(quantile(nearest_R[:-1], HONEST_QUANTILE, among_N), nearest_R[-1])


def nearest_neighbours(distances: Distances) -> Tensor:
    """The distance from each row to the nearest other, ``(R,)`` float64."""
    nearest_R = torch.empty(len(distances), dtype=torch.float64, device=distances.device)
    for first, block_TR in distances.blocks():
        block_TR.diagonal(first).fill_(math.inf)
        nearest_R[first : first + len(block_TR)] = block_TR.amin(1)
    return nearest_R


def quantile(x_N: Tensor, q: float, among_N: Tensor) -> Tensor:
    """``x_N[among_N].quantile(q)`` without waiting; Inf where none are chosen.

    In torch 2.11 that method makes the host wait for its check of ``q``.
    """
    place = (q * (among_N.sum().double() - 1)).clamp_min(0)
    ordered_N = x_N.masked_fill(~among_N, math.inf).sort().values
    below, above = ordered_N.index_select(0, torch.stack([place.floor(), place.ceil()]).long()).unbind()
    return torch.where(among_N.any(), below.lerp(above, place - place.floor()), math.inf)


def _cut(
    x_N: Tensor, with_root_N: Tensor, apart: Tensor, alignment_N: Tensor | None, copy_N: Tensor, smallest: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which clients are kept, ``(N,)`` bool, if a cut on the first component decides; the facts.

    Copies are on neither side.
    """
    never = torch.zeros_like(apart, dtype=torch.bool)
    near_N, far_N = with_root_N & ~copy_N, ~with_root_N & ~copy_N
    swapped = never
    if alignment_N is not None:
        # The root is on the wrong side.
        swapped = (mean_of(alignment_N, near_N) < 0) & (mean_of(alignment_N, far_N) > 0)
        near_N, far_N = torch.where(swapped, far_N, near_N), torch.where(swapped, near_N, far_N)
    possible = near_N.sum() >= smallest
    wide = possible & (apart > SEPARATION)
    astray = never if alignment_N is None else possible & _is_clean_and_astray(x_N, alignment_N, near_N, far_N)
    facts = {"root alone": near_N.sum() == 0, "far": far_N.sum(), "wide": wide, "astray": astray, "swapped": swapped}
    return ~(far_N & (wide | astray)), facts


def _is_clean_and_astray(x_N: Tensor, alignment_N: Tensor, near_N: Tensor, far_N: Tensor) -> Tensor:
    """Whether the far side of a cut on the first principal component is clean and astray.

    It is clean if it is a normal of its own (D of Ashman et al., AJ 1994). It is astray if it
    agrees with the root direction much less than the near side.
    """
    near, far = mean_of(x_N, near_N), mean_of(x_N, far_N)
    pooled = (mean_of((x_N - near) ** 2, near_N) + mean_of((x_N - far) ** 2, far_N)) / 2
    clean = (near - far).square() > CLEAN_CUT**2 * pooled
    agreed = mean_of(alignment_N, near_N)
    return clean & (agreed > 0) & (mean_of(alignment_N, far_N) < LESS_ALIGNED * agreed)


def scattered(height_N: Tensor, kept_N: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Which kept clients lie beyond the first gap in the heights, ``(N,)``, and its ratio, ``()``.

    The height of a client is the longest edge on its path to the root in the minimum spanning tree.
    """
    ordered_N = height_N.masked_fill(~kept_N, math.inf).sort().values
    inner_M, outer_M = ordered_N[:-1], ordered_N[1:]
    # the number of clients on the inner side
    count_M = torch.arange(1, len(ordered_N), device=height_N.device)
    gap_M = (outer_M > GAP * inner_M) & (count_M >= math.ceil(smallest))
    first_1 = count_M.masked_fill(~gap_M, len(count_M)).amin(0, keepdim=True) - 1
    inner, outer = inner_M.index_select(0, first_1)[0], outer_M.index_select(0, first_1)[0]
    return kept_N & (height_N > inner) & gap_M.any(), outer / inner


def _reason(facts: Facts) -> str:
    return root_reason(facts, f"{int(facts['copies'])} masks are copies of another's")


def root_reason(facts: Facts, copies_reason: str) -> str:
    """The sentence on a verdict of :func:`by_root`; ``copies_reason`` is what it says of copies."""
    reasons = [copies_reason] if facts["copies"] else []
    # A root alone is a reason for keeping everyone, which does not fit beside a rejection.
    if not (facts["many"] or (facts["root alone"] and (reasons or facts["scattered"]))):
        reasons += _cut_reasons(facts)
    if facts["scattered"]:
        number, gap = int(facts["scattered"]), facts["gap"]
        reasons.append(f"{number} masks lie {gap:.2f} times further out than honest ones from each other")
    return " and ".join(reasons) or ALL_KEPT


def _cut_reasons(facts: Facts) -> list[str]:
    """The reasons that a cut by the root's side gives: none or one."""
    note = ""
    if facts["swapped"]:
        note = " (the root's mask lies with clients that oppose the root direction: the other side is kept)"
    if facts["root alone"]:
        return [
            "the root's mask lies apart from every client's, so there is no verdict: all kept; "
            "train the root with the clients' own learning rate and clip, or pass a root update trained like theirs"
        ]
    if facts["wide"]:
        times = facts["separation"]
        return [f"{int(facts['far'])} masks lie apart as one group, {times:.2f} times the spread of a group away{note}"]
    if facts["astray"]:
        return [f"{int(facts['far'])} masks are cut off cleanly, and their clients hardly follow the root direction{note}"]
    return []
