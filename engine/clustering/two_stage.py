"""The two-stage rule: it first rejects copies of each other or one side of a cut, then outliers.

The first stage cuts only where there are no copies.

Shapes: N clients, R = N + 1 rows, the root's row last.
"""

import math

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.ruling import Facts, Ruling, mean_of, separation
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.anywhere import path_maxima

__all__ = [
    "ALL_KEPT",
    "SMALLEST_SHARE",
    "copy_reach",
    "cut_by_root",
    "cut_reasons",
    "nearest_neighbours",
    "scattered",
    "scattered_reason",
    "two_stage",
    "with_root",
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
    smallest = SMALLEST_SHARE * (len(distances) - 1)
    x_R = scores_R2[:, 0].contiguous()
    with_root_N = with_root(x_R, scores_R2, backend)
    copy_N = copies(distances)
    by_copies = copy_N.any() & ((~copy_N).sum() >= smallest)
    apart = separation(distances, torch.where(by_copies, ~copy_N, with_root_N))

    cut_N, cut_facts = cut_by_root(x_R[:-1], with_root_N, apart, alignment_N, smallest)
    # Where there are copies, the other clients are not cut. What is left of each honest label group
    # spreads less than the groups lie apart, so a cut would separate honest clients.
    kept_N = torch.where(by_copies, ~copy_N, cut_N)
    scattered_N, gap = scattered(path_maxima(distances.stored, kept_N, distances.unit), kept_N, smallest)
    return Ruling(
        benign_N=kept_N & ~scattered_N,
        separation=apart,
        reason=_reason,
        facts={
            "by copies": by_copies,
            "copies": copy_N.sum(),
            **cut_facts,
            "first stage keeps all": kept_N.all(),
            "scattered": scattered_N.sum(),
            "gap": gap,
        },
    )


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
    """Clients whose masks are copies of another's, ``(N,)`` bool.

    Such masks are nearer to each other than two models come that are each trained on their own
    data.
    """
    nearest_R = nearest_neighbours(distances)
    return nearest_R[:-1] < copy_reach(nearest_R)


def copy_reach(nearest_R: Tensor) -> Tensor:
    """The distance, ``()``, below which a mask is a copy, given each row's distance to its nearest.

    Two models that are each trained on their own data do not come that near.
    """
    return COPY * torch.minimum(quantile(nearest_R[:-1], HONEST_QUANTILE), nearest_R[-1])


def nearest_neighbours(distances: Distances) -> Tensor:
    """The distance from each row to the nearest other, ``(R,)`` float64."""
    nearest_R = torch.empty(len(distances), dtype=torch.float64, device=distances.device)
    for first, block_TR in distances.blocks():
        block_TR.diagonal(first).fill_(math.inf)
        nearest_R[first : first + len(block_TR)] = block_TR.amin(1)
    return nearest_R


def quantile(x_N: Tensor, q: float) -> Tensor:
    """``x_N.quantile(q)`` without waiting.

    In torch 2.11 that method makes the host wait for its check of ``q``.
    """
    place = q * (len(x_N) - 1)
    below, above = math.floor(place), math.ceil(place)
    ordered_N = x_N.sort().values
    return ordered_N[below].lerp(ordered_N[above], place - below)


def cut_by_root(
    x_N: Tensor, with_root_N: Tensor, apart: Tensor, alignment_N: Tensor | None, smallest: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which clients are kept, ``(N,)`` bool, if a cut on the first component decides; the facts."""
    never = torch.zeros_like(apart, dtype=torch.bool)
    swapped = never if alignment_N is None else _root_is_on_the_wrong_side(alignment_N, with_root_N)
    near_N = with_root_N ^ swapped
    num_near, num_far = near_N.sum(), (~near_N).sum()
    possible = num_near >= smallest
    wide = possible & (apart > SEPARATION)
    astray = never if alignment_N is None else possible & _is_clean_and_astray(x_N, alignment_N, near_N)
    facts = {"root alone": num_near == 0, "far": num_far, "wide": wide, "astray": astray, "swapped": swapped}
    return near_N | ~(wide | astray), facts


def _root_is_on_the_wrong_side(alignment_N: Tensor, with_root_N: Tensor) -> Tensor:
    return (mean_of(alignment_N, with_root_N) < 0) & (mean_of(alignment_N, ~with_root_N) > 0)


def _is_clean_and_astray(x_N: Tensor, alignment_N: Tensor, near_N: Tensor) -> Tensor:
    """Whether the far side of a cut on the first principal component is clean and astray.

    It is clean if it is a normal of its own (D of Ashman et al., AJ 1994). It is astray if it
    agrees with the root direction much less than the near side.
    """
    near, far = mean_of(x_N, near_N), mean_of(x_N, ~near_N)
    pooled = (mean_of((x_N - near) ** 2, near_N) + mean_of((x_N - far) ** 2, ~near_N)) / 2
    clean = (near - far).square() > CLEAN_CUT**2 * pooled
    agreed = mean_of(alignment_N, near_N)
    return clean & (agreed > 0) & (mean_of(alignment_N, ~near_N) < LESS_ALIGNED * agreed)


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
    copies_reason = [f"{int(facts['copies'])} masks are copies of another's"]
    reasons = copies_reason if facts["by copies"] else cut_reasons(facts)
    if facts["scattered"]:
        # if the first stage keeps all, its reasons are those of keeping everyone
        reasons = [] if facts["first stage keeps all"] else reasons
        reasons.append(scattered_reason(facts))
    return " and ".join(reasons) or ALL_KEPT


def cut_reasons(facts: Facts) -> list[str]:
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


def scattered_reason(facts: Facts) -> str:
    number, gap = int(facts["scattered"]), facts["gap"]
    return f"{number} masks lie {gap:.2f} times further out than honest ones from each other"
