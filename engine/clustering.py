"""From masks to a verdict: which clients' masks lie with the root model's.

All that is needed is D, the (R, R) matrix of the shares of mask bits in which two rows differ, i.e. of squared distances of 0/1
vectors. With J the centring matrix, K = -1/2 J D J is the Gram matrix of the centred masks, and its leading eigenvectors times
the roots of their eigenvalues are the PCA scores. Two rules:

* ``two-stage`` (default): keeps everyone when nobody attacks; deterministic. First it rejects copies, masks nearer to another
  client's than two models come that are trained each on its own data, or, if there are none, one side of a cut; then outliers.
* ``published``: PCA to two dimensions and a Gaussian mixture of two components (SkyMask, ECCV 2024, arXiv 2312.12484, section
  4.3). It always makes two clusters, so without an attack it rejects a third of the honest clients.

Shapes: N clients, R = N + 1 rows, the root model's row last.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skymask_gpu.engine.distances import Distances, mask_distances
from skymask_gpu.engine.profiling import phase

__all__ = ["ClusteredMasks", "Clustering", "cluster_distances", "cluster_masks"]

# The two-stage rule: the constants, and where each comes from.
SEPARATION = 1.0  # squared distance of two groups over their variance; results are the same from 0.75 to 1.25
GAP = 1.35  # ratio of one edge to the next where outliers begin; honest label groups come close to it
SMALLEST_SHARE = 0.2  # of the clients: the honest share that the attack model still allows
# A cut that is not that wide counts too if it is a clean one and its far side has little to do with the root direction. Without
# attackers D is at most 5.6 and the ratio at least 0.5; with flipped signs or labels at least 7.1, and at most 0.3.
CLEAN_CUT = 6.0  # Ashman's D of the two normals on the first principal component
LESS_ALIGNED = 0.4  # mean alignment with the root direction, over that of the near side
COPY = 0.02  # of the way to a nearest mask; 0 for attackers that send one update, 0.19 and more for honest clients of a CNN,
# but less than 0.1 for a few of a small MLP with a dozen samples each
HONEST_QUANTILE = 0.9  # of the ways to a nearest mask: honest even when four in five clients are copies
EM_STEPS = 100
VARIANCE_FLOOR = 1e-3  # of the variance of all scores

# Principal scores of up to so many rows by a full eigendecomposition; of more by iteration, to this residual relative to the
# first eigenvalue or, where the leading eigenvalues lie too close together to tell apart, until so many products are done.
_DENSE_ROWS = 1024
_RESIDUAL = 1e-7
_MOST_PRODUCTS = 40
_BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """How masks are clustered.

    Attributes:
        rule: ``"two-stage"`` or ``"published"``.
        seed: of the k-means start of the published rule; the two-stage rule is deterministic.
    """

    rule: Literal["two-stage", "published"] = "two-stage"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("two-stage", "published"):
            raise ValueError(f"Clustering.rule must be 'two-stage' or 'published', got {self.rule!r}")


@dataclass(frozen=True)
class ClusteredMasks:
    """The verdict on N clients.

    Attributes:
        benign: ``(N,)`` bool, on the device of the masks.
        num_clusters: 1 if everyone is kept, else 2.
        scores: ``(R, 2)`` float64, the first two principal components of the masks, root last: the picture of the paper.
        separation: squared distance of the two sides' centroids over their pooled variance (0 if there is one side).
        reason: one sentence: why these clients were rejected, or why nobody was.
    """

    benign: Tensor
    num_clusters: int
    scores: Tensor
    separation: float
    reason: str


def cluster_masks(
    bits: Tensor,
    num_params: int,
    *,
    alignment: Tensor | None = None,
    config: Clustering = Clustering(),
) -> ClusteredMasks:
    """The verdict from packed bits ``(R, ceil(num_params / 8))`` uint8, root row last; see :func:`cluster_distances`."""
    if bits.dim() != 2 or bits.dtype != torch.uint8 or bits.shape[1] != -(-num_params // 8):
        raise ValueError(
            f"bits must be (R, {-(-num_params // 8)}) uint8 for {num_params} parameters, got {tuple(bits.shape)} {bits.dtype}"
        )
    with phase("distances", bits, 4 * len(bits) ** 2):
        distances = mask_distances(bits, num_params)
    return _cluster(distances, alignment, config)


def cluster_distances(
    distances: Tensor,
    *,
    alignment: Tensor | None = None,
    config: Clustering = Clustering(),
) -> ClusteredMasks:
    """The verdict from the matrix of Hamming shares.

    Args:
        distances: ``(R, R)``, share of bits in which rows i and j differ, symmetric, 0 on the diagonal, root row last; R >= 2.
        alignment: ``(N,)`` each client's inner product with the root direction (an update the server trains on the root data);
            lets the two-stage rule notice that the root row sits with the attackers. None: that check is left out.
        config: which rule.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1] or distances.shape[0] < 2:
        raise ValueError(f"distances must be (R, R) with R >= 2 and the root row last, got {tuple(distances.shape)}")
    if not torch.isfinite(distances).all():
        raise ValueError("distances must be finite, got NaN or Inf")
    return _cluster(Distances(distances), alignment, config)


def _cluster(distances: Distances, alignment: Tensor | None, config: Clustering) -> ClusteredMasks:
    num_clients = len(distances) - 1
    if alignment is not None:
        if tuple(alignment.shape) != (num_clients,) or not torch.isfinite(alignment).all():
            raise ValueError(
                f"alignment must be ({num_clients},) finite numbers, one a client, got shape {tuple(alignment.shape)}"
                f"{'' if torch.isfinite(alignment).all() else ' with NaN or Inf'}"
            )
        alignment = alignment.to(distances.device, torch.float64)
    scores_R2 = _principal_scores(distances)
    everyone = torch.ones(num_clients, dtype=torch.bool, device=distances.device)
    if num_clients < 3:
        return ClusteredMasks(everyone, 1, scores_R2, 0.0, f"{num_clients} clients are too few to compare: all kept")
    if not any(block.any() for _, block in distances.blocks()):
        return ClusteredMasks(everyone, 1, scores_R2, 0.0, "all masks are equal: all kept")
    if config.rule == "published":
        return _published(distances, scores_R2, config.seed)
    return _two_stage(distances, scores_R2, alignment)


def _principal_scores(distances: Distances) -> Tensor:
    """PCA scores in two dimensions, ``(R, 2)``, from squared distances; a component's largest entry is positive."""

    def centred_times(vectors_RK: Tensor) -> Tensor:
        product_RK = distances.times(vectors_RK - vectors_RK.mean(0))
        return -0.5 * (product_RK - product_RK.mean(0))

    if len(distances) <= _DENSE_ROWS:
        all_RR = distances.stored.to(torch.float64) * distances.unit
        centred_RR = all_RR - all_RR.mean(0) - all_RR.mean(1, keepdim=True) + all_RR.mean()
        values, vectors = torch.linalg.eigh(-0.5 * centred_RR)
        values_2, vectors_R2 = values[-2:].flip(0), vectors[:, -2:].flip(1)
    else:
        values_2, vectors_R2 = _leading_eigenpairs(centred_times, len(distances), distances.device)
    largest_2 = vectors_R2.gather(0, vectors_R2.abs().argmax(0, keepdim=True))
    return vectors_R2 * torch.where(largest_2 < 0, -1.0, 1.0) * values_2.clamp_min(0).sqrt()


def _leading_eigenpairs(times: Callable[[Tensor], Tensor], num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two largest eigenvalues, ``(2,)``, of a symmetric matrix given by its products, and their vectors, ``(R, 2)``.

    Block Krylov iteration with the Rayleigh-Ritz procedure (Golub & Van Loan, Matrix Computations, 10.3).
    """
    start = torch.randn(num_rows, _BLOCK, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    basis_RM = products_RM = start.new_empty(num_rows, 0)
    for _ in range(_MOST_PRODUCTS):
        for _ in range(2):  # the second time takes away what rounding left of the basis
            start = torch.linalg.qr(start - basis_RM @ (basis_RM.T @ start)).Q
        product = times(start)
        basis_RM, products_RM = torch.cat([basis_RM, start], 1), torch.cat([products_RM, product], 1)
        ritz_MM = basis_RM.T @ products_RM
        values, vectors = torch.linalg.eigh((ritz_MM + ritz_MM.T) / 2)
        values_2, weights_M2 = values[-2:].flip(0), vectors[:, -2:].flip(1)
        vectors_R2 = basis_RM @ weights_M2
        residual_2 = torch.linalg.vector_norm(products_RM @ weights_M2 - vectors_R2 * values_2, dim=0)
        if (residual_2 <= _RESIDUAL * values_2[0]).all():
            break
        start = product
    return values_2, vectors_R2


# --- the two-stage rule -----------------------------------------------------------------------------------------------


def _copies(distances: Distances) -> Tensor:
    """Clients whose masks are nearer to another's than two models come that are trained each on its own, ``(N,)`` bool."""
    nearest_R = torch.empty(len(distances), dtype=torch.float64, device=distances.device)
    for first, block_TR in distances.blocks():
        block_TR.diagonal(first).fill_(math.inf)
        nearest_R[first : first + len(block_TR)] = block_TR.amin(1)
    nearest_N, root_nearest = nearest_R[:-1], nearest_R[-1]
    return nearest_N < COPY * torch.minimum(nearest_N.quantile(HONEST_QUANTILE), root_nearest)


def _two_stage(distances: Distances, scores_R2: Tensor, alignment_N: Tensor | None) -> ClusteredMasks:
    num_clients = len(distances) - 1
    smallest = SMALLEST_SHARE * num_clients
    copies_N = _copies(distances)
    if copies_N.any() and (~copies_N).sum() >= smallest:
        # no cut of the others: honest label groups lie further apart than what is left of each spreads
        kept_N, separation = ~copies_N, _separation(distances, ~copies_N)
        reasons = [f"{int(copies_N.sum())} masks are copies of another's"]
    else:
        kept_N, separation, reasons = _cut(distances, scores_R2[:, 0], alignment_N, smallest)

    scattered_N, ratio = _scattered(distances, kept_N, smallest)
    if scattered_N.any():
        reasons = [] if kept_N.all() else reasons  # those of keeping everyone
        kept_N = kept_N & ~scattered_N
        reasons.append(f"{int(scattered_N.sum())} masks lie {ratio:.2f} times further out than honest ones from each other")
    reason = " and ".join(reasons) or "no group of masks lies further apart than honest clients do: all kept"
    return ClusteredMasks(kept_N, 1 if kept_N.all() else 2, scores_R2, separation, reason)


def _cut(distances: Distances, x_R: Tensor, alignment_N: Tensor | None, smallest: float) -> tuple[Tensor, float, list[str]]:
    """Who is kept, ``(N,)`` bool, if the masks are cut in two on the first principal component; the separation; the reasons."""
    side_R = _two_normals(x_R)
    with_root_N = side_R[:-1] == side_R[-1]
    separation = _separation(distances, with_root_N)
    note = ""
    if alignment_N is not None and _root_is_on_the_wrong_side(alignment_N, with_root_N):
        with_root_N = ~with_root_N
        note = " (the root's mask lies with clients that oppose the root direction: the other side is kept)"
    everyone_N = torch.ones_like(with_root_N)
    if not with_root_N.any():
        reason = (
            "the root's mask lies apart from every client's, so there is no verdict: all kept; "
            "train the root with the clients' own learning rate and clip, or pass a root update trained like theirs"
        )
        return everyone_N, separation, [reason]
    num_far = int((~with_root_N).sum())
    if num_far > 0 and with_root_N.sum() >= smallest:
        if separation > SEPARATION:
            reason = f"{num_far} masks lie apart as one group, {separation:.2f} times the spread of a group away{note}"
            return with_root_N, separation, [reason]
        if alignment_N is not None and _is_clean_and_astray(x_R[:-1], alignment_N, with_root_N):
            reason = f"{num_far} masks are cut off cleanly, and their clients hardly follow the root direction{note}"
            return with_root_N, separation, [reason]
    return everyone_N, separation, []


def _is_clean_and_astray(x_N: Tensor, alignment_N: Tensor, near_N: Tensor) -> bool:
    """Whether the far side of a cut on the first principal component is a normal of its own (Ashman et al., AJ 1994: D), and
    agrees with the root direction much less than the near side.
    """
    near, far = x_N[near_N], x_N[~near_N]
    pooled = (near.var(correction=0) + far.var(correction=0)) / 2
    clean = (near.mean() - far.mean()).square() > CLEAN_CUT**2 * pooled
    agreed = alignment_N[near_N].mean()
    return bool(clean and agreed > 0 and alignment_N[~near_N].mean() < LESS_ALIGNED * agreed)


def _two_normals(x_R: Tensor) -> Tensor:
    """Labels 0 or 1, ``(R,)``, of a one-dimensional mixture of two normals fitted by EM from the best cut into two means."""
    num_rows = x_R.shape[0]
    sorted_R, order = x_R.sort()
    count_R = torch.arange(1, num_rows, dtype=x_R.dtype, device=x_R.device)
    left_sum = sorted_R.cumsum(0)[:-1]
    right_sum = sorted_R.sum() - left_sum
    # least squares within two groups = most squares between them
    cut = int((left_sum**2 / count_R + right_sum**2 / (num_rows - count_R)).argmax()) + 1
    member_R2 = torch.zeros(num_rows, 2, dtype=x_R.dtype, device=x_R.device)
    member_R2[order[:cut], 0] = 1
    member_R2[order[cut:], 1] = 1

    floor = VARIANCE_FLOOR * x_R.var(correction=0)
    for _ in range(EM_STEPS):
        weight_2 = member_R2.sum(0).clamp_min(torch.finfo(x_R.dtype).tiny)
        mean_2 = (member_R2 * x_R[:, None]).sum(0) / weight_2
        variance_2 = ((member_R2 * (x_R[:, None] - mean_2) ** 2).sum(0) / weight_2).clamp_min(floor)
        log_density_R2 = weight_2.log() - 0.5 * variance_2.log() - 0.5 * (x_R[:, None] - mean_2) ** 2 / variance_2
        before_R2, member_R2 = member_R2, log_density_R2.softmax(1)
        if torch.equal(before_R2, member_R2):
            break
    return member_R2.argmax(1)


def _separation(distances: Distances, a_N: Tensor) -> float:
    """Squared distance of the centroids of two sides over their pooled variance; 0 if a side is empty."""
    num_a, num_b = int(a_N.sum()), int((~a_N).sum())
    if num_a == 0 or num_b == 0:
        return 0.0
    root_2 = a_N.new_zeros(1, 2)
    member_R2 = torch.cat([torch.stack([a_N, ~a_N], 1), root_2]).to(torch.float64)
    (a_a, a_b), (_, b_b) = (member_R2.T @ distances.times(member_R2)).tolist()
    variance_a, variance_b = a_a / num_a**2 / 2, b_b / num_b**2 / 2
    between = a_b / (num_a * num_b) - variance_a - variance_b
    pooled = (num_a * variance_a + num_b * variance_b) / (num_a + num_b)
    if pooled == 0:
        return math.inf if between > 0 else 0.0
    return between / pooled


def _root_is_on_the_wrong_side(alignment_N: Tensor, with_root_N: Tensor) -> bool:
    if with_root_N.all() or not with_root_N.any():
        return False
    return bool(alignment_N[with_root_N].mean() < 0) and bool(alignment_N[~with_root_N].mean() > 0)


def _scattered(distances: Distances, kept_N: Tensor, smallest: float) -> tuple[Tensor, float]:
    """Kept clients beyond the first gap in the ways to the root, ``(N,)`` bool, and how wide the gap is.

    A client's way is the path to the root in the minimum spanning tree; its height is the longest edge on it.
    """
    heights_N = _path_maxima(distances, kept_N)
    ordered_K = heights_N[kept_N].sort().values.tolist()
    for k in range(max(1, math.ceil(smallest)), len(ordered_K)):
        inner, outer = ordered_K[k - 1], ordered_K[k]
        if outer > GAP * inner:
            return kept_N & (heights_N > inner), outer / inner if inner > 0 else math.inf
    return torch.zeros_like(kept_N), 0.0


def _path_maxima(distances: Distances, kept_N: Tensor) -> Tensor:
    """``(N,)``: the longest edge on each kept client's way to the root in the minimum spanning tree (Prim's algorithm).

    The tree spans the kept clients and the root, which is the last row; the others' heights are 0.
    """
    root = len(distances) - 1
    height_R = torch.zeros(root + 1, dtype=torch.float64, device=distances.device)
    # the shortest edge into the tree (inf: in it, or not to come into it), and the tree's node it leads to
    outside_R = torch.cat([kept_N, kept_N.new_zeros(1)])
    edge_R = torch.where(outside_R, distances.row(root), torch.inf)
    parent_R = torch.full((root + 1,), root, device=distances.device)
    for _ in range(int(kept_N.sum())):
        node = int(edge_R.argmin())
        height_R[node] = torch.maximum(height_R[parent_R[node]], edge_R[node])
        outside_R[node] = False
        edge_R[node] = math.inf
        row_R = distances.row(node)
        closer_R = outside_R & (row_R < edge_R)
        edge_R = torch.where(closer_R, row_R, edge_R)
        parent_R[closer_R] = node
    return height_R[:-1]


# --- the published rule -----------------------------------------------------------------------------------------------


def _published(distances: Distances, scores_R2: Tensor, seed: int) -> ClusteredMasks:
    labels_R = _gaussian_mixture(scores_R2, _two_means(scores_R2, seed))
    benign_N = labels_R[:-1] == labels_R[-1]
    separation = _separation(distances, benign_N)
    if not benign_N.any():
        reason = "the mixture puts the root in a component of its own: all kept"
        return ClusteredMasks(~benign_N, 1, scores_R2, separation, reason)
    if benign_N.all():
        return ClusteredMasks(benign_N, 1, scores_R2, separation, "the mixture puts every client with the root: all kept")
    reason = f"{int((~benign_N).sum())} masks are in the component without the root"
    return ClusteredMasks(benign_N, 2, scores_R2, separation, reason)


def _two_means(x_RK: Tensor, seed: int) -> Tensor:
    """Labels of Lloyd's algorithm from a greedy k-means++ start (Arthur & Vassilvitskii 2007), ``(R,)``."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(x_RK), (), generator=generator))
    squared_R = ((x_RK - x_RK[first]) ** 2).sum(1)
    # of two draws the one that leaves less to explain, as scikit-learn does for two clusters
    draws = torch.multinomial(squared_R.cpu(), 2, replacement=True, generator=generator).tolist()
    left = [torch.minimum(squared_R, ((x_RK - x_RK[draw]) ** 2).sum(1)).sum() for draw in draws]
    centre_2K = x_RK[[first, draws[0] if left[0] <= left[1] else draws[1]]]
    labels_R = torch.zeros(len(x_RK), dtype=torch.long, device=x_RK.device)
    for _ in range(300):
        before_R, labels_R = labels_R, torch.cdist(x_RK, centre_2K).argmin(1)
        if torch.equal(before_R, labels_R) or labels_R.min() == labels_R.max():
            break
        centre_2K = torch.stack([x_RK[labels_R == side].mean(0) for side in (0, 1)])
    return labels_R


def _gaussian_mixture(x_RK: Tensor, labels_R: Tensor) -> Tensor:
    """Labels of two normals with full covariances, fitted by EM from hard labels; scikit-learn's defaults."""
    regularisation, tolerance, max_steps = 1e-6, 1e-3, 100
    num_rows, num_dims = x_RK.shape
    member_R2 = torch.nn.functional.one_hot(labels_R, 2).to(x_RK)
    likelihood = -math.inf
    for _ in range(max_steps):
        weight_2 = member_R2.sum(0) + 10 * torch.finfo(x_RK.dtype).eps
        mean_2K = member_R2.T @ x_RK / weight_2[:, None]
        offset_2RK = x_RK - mean_2K[:, None]
        covariance_2KK = (offset_2RK * member_R2.T[..., None]).mT @ offset_2RK / weight_2[:, None, None]
        covariance_2KK += regularisation * torch.eye(num_dims, dtype=x_RK.dtype, device=x_RK.device)
        factor_2KK = torch.linalg.cholesky(covariance_2KK)
        white_2KR = torch.linalg.solve_triangular(factor_2KK, offset_2RK.mT, upper=False)
        log_det_2 = factor_2KK.diagonal(dim1=1, dim2=2).log().sum(1)
        log_density_R2 = (
            (weight_2 / num_rows).log() - log_det_2 - 0.5 * num_dims * math.log(2 * math.pi) - 0.5 * (white_2KR**2).sum(1).T
        )
        before, likelihood = likelihood, log_density_R2.logsumexp(1).mean().item()
        member_R2 = log_density_R2.softmax(1)
        if abs(likelihood - before) < tolerance:
            break
    return member_R2.argmax(1)
