"""Clusterings that several rules share."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["best_cut", "hdbscan_labels", "two_means"]

_MOST_STEPS = 100


def hdbscan_labels(
    distances_NN: Tensor, *, min_cluster_size: int, min_samples: int, allow_single_cluster: bool = False
) -> Tensor:
    """The cluster of each row by HDBSCAN on distances, ``(N,)`` int64; -1 means noise.

    HDBSCAN is by Campello et al. (PAKDD 2013).

    ``min_samples`` does not count the row itself, as in the papers' hdbscan package; scikit-learn's
    counts it.
    """
    from sklearn.cluster import HDBSCAN

    num_rows = len(distances_NN)
    if num_rows < 2:
        return torch.zeros(num_rows, dtype=torch.long, device=distances_NN.device)
    clusterer = HDBSCAN(
        min_cluster_size=min_cluster_size,
        min_samples=min(min_samples + 1, num_rows),
        metric="precomputed",
        allow_single_cluster=allow_single_cluster,
        copy=True,
    )
    labels = clusterer.fit_predict(distances_NN.double().cpu().numpy())
    return torch.from_numpy(labels).to(distances_NN.device, torch.long)


def best_cut(values_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row of numbers into the two clusters with the least sum of squares.

    The result is exact, because two clusters on a line are divided by a single cut.

    Args:
        values_KN: ``(K, N)`` float64, N >= 2.

    Returns:
        ``(K, N)`` bool, which values are in the upper cluster, and ``(K,)`` the sum of the squared
        distances to the two means.
    """
    num_values = values_KN.shape[1]
    sorted_KN = (values_KN - values_KN.mean(1, keepdim=True)).sort(1).values
    lower_KC = sorted_KN.cumsum(1)[:, :-1]
    count_C = torch.arange(1, num_values, dtype=values_KN.dtype, device=values_KN.device)
    # The mean is 0, so the sum of squares between two clusters follows from their sums alone.
    between_KC = lower_KC.square() * (1 / count_C + 1 / (num_values - count_C))
    cut_K1 = between_KC.argmax(1, keepdim=True)
    lowest_of_upper_K1 = values_KN.sort(1).values.gather(1, cut_K1 + 1)
    within_K = sorted_KN.square().sum(1) - between_KC.amax(1)
    return values_KN >= lowest_of_upper_K1, within_K.clamp_min(0)


def two_means(points_NF: Tensor, distances: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Divide points into two clusters by k-means, without random numbers.

    The first centres are the two points that are furthest apart. A point equally near to both
    centres goes to the first. The steps end when no point changes its cluster, when a cluster would
    become empty, or after 100.

    Args:
        points_NF: ``(N, F)``, N >= 1.
        distances: a function ``(N, F), (C, F) -> (N, C)``, the distance of each point to each
            centre.

    Returns:
        ``(N,)`` bool, which points are in the second cluster; none if all points are equal.
    """
    num_points = len(points_NF)
    furthest = divmod(int(distances(points_NF, points_NF).argmax()), num_points)
    centres_2F = points_NF[list(furthest)]
    second_N = torch.zeros(num_points, dtype=torch.bool, device=points_NF.device)
    for _ in range(_MOST_STEPS):
        first, second = distances(points_NF, centres_2F).T
        nearer_N = second < first
        if nearer_N.all() or not nearer_N.any() or torch.equal(nearer_N, second_N):
            break
        second_N = nearer_N
        centres_2F = torch.stack([points_NF[~second_N].mean(0), points_NF[second_N].mean(0)])
    return second_N
