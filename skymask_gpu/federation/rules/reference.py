"""The rules as literal loops in float64, one client or one coordinate at a time.

Tests and the benchmark compare the fast rules with these; nothing here is meant to be fast. Rows
are NumPy arrays: ``rows_MP`` has a row per client and a column per parameter. f is the number of
rows that are assumed to be malicious. The literal version of SkyMask is in
``engine/solvers/reference.py``.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

__all__ = [
    "alignins_kept",
    "bucket_means",
    "bulyan_chosen",
    "centred_clipping",
    "dnc_kept",
    "fed_nga",
    "fedgreed_kept",
    "fltrust",
    "foundation_rows",
    "geometric_median_pull",
    "krum_ranking",
    "mean_clipped",
    "mean_near_median",
    "median",
    "nearest_means",
    "signguard_kept",
    "squared_distances",
    "trimmed_mean",
]


def median(rows_MP: np.ndarray) -> np.ndarray:
    """The middle value of each coordinate, or the mean of the two in the middle, ``(P,)``.

    >>> median(np.array([[1.0], [9.0], [2.0], [4.0]]))
    array([3.])
    """
    num_rows = len(rows_MP)
    columns = [sorted(column) for column in rows_MP.T]
    return np.array([(column[(num_rows - 1) // 2] + column[num_rows // 2]) / 2 for column in columns])


def trimmed_mean(rows_MP: np.ndarray, trim: int) -> np.ndarray:
    """The mean of each coordinate without its ``trim`` smallest and largest values, ``(P,)``."""
    return np.array([np.mean(sorted(column)[trim : len(column) - trim]) for column in rows_MP.T])


def geometric_median_pull(rows: Iterable[np.ndarray], point_P: np.ndarray) -> float:
    """The length of the mean of the unit vectors from a point to all rows.

    It is 0 at the geometric median.
    """
    pull_P, num_rows = np.zeros_like(point_P), 0
    for row_P in rows:
        offset_P = row_P - point_P
        pull_P += offset_P / np.linalg.norm(offset_P)
        num_rows += 1
    return float(np.linalg.norm(pull_P)) / num_rows


def squared_distances(rows_MP: np.ndarray) -> np.ndarray:
    """The squared distances between all pairs of rows, ``(M, M)``."""
    return np.array([[((a_P - b_P) ** 2).sum() for b_P in rows_MP] for a_P in rows_MP])


def krum_ranking(distances_MM: np.ndarray, num_malicious: int, extra_neighbours: int = 0) -> list[int]:
    """The rows in the order of their Krum scores, the smallest first.

    Krum takes the first row, Multi-Krum the mean of the first n - f rows. A score is the sum of the
    squared distances to the n - f - 2 nearest other rows, and to at least one. ByzFL uses one
    neighbour more, which is ``extra_neighbours=1``.
    """
    num_neighbours = max(1, len(distances_MM) - num_malicious - 2 + extra_neighbours)
    scores = []
    for index, distances_M in enumerate(distances_MM):
        others = np.delete(distances_M, index)
        scores.append(float(np.sort(others)[:num_neighbours].sum()))
    return sorted(range(len(scores)), key=scores.__getitem__)


def bulyan_chosen(distances_MM: np.ndarray, num_malicious: int) -> list[int]:
    """The n - 2 f rows that Krum chooses one after the other, each among the rows that are left."""
    left = list(range(len(distances_MM)))
    chosen: list[int] = []
    while len(chosen) < len(distances_MM) - 2 * num_malicious:
        best = krum_ranking(distances_MM[np.ix_(left, left)], num_malicious)[0]
        chosen.append(left.pop(best))
    return chosen


def mean_near_median(rows_TP: np.ndarray, count: int) -> np.ndarray:
    """The mean of the ``count`` values of each coordinate that are nearest to its median, ``(P,)``.

    If two values are equally near, the smaller one comes first.
    """
    means = []
    for column, middle in zip(rows_TP.T, median(rows_TP), strict=True):
        values = np.sort(column)
        nearest = values[np.argsort(np.abs(values - middle), kind="stable")]
        means.append(nearest[:count].mean())
    return np.array(means)


def fltrust(rows: Iterable[np.ndarray], root_P: np.ndarray) -> tuple[np.ndarray, list[bool]]:
    """The update ``(P,)``, and which rows have a trust score above 0.

    The update is zero if no row has one.
    """
    root_length = np.linalg.norm(root_P)
    total_P, total_score, kept = np.zeros_like(root_P), 0.0, []
    for row_P in rows:
        length = np.linalg.norm(row_P)
        score = max(0.0, float(row_P @ root_P) / float(length * root_length)) if length > 0 else 0.0
        kept.append(score > 0)
        if score > 0:
            total_P += score * root_length / length * row_P
            total_score += score
    return (total_P / total_score if total_score > 0 else total_P), kept


def dnc_kept(rows_MP: np.ndarray, subsets: Iterable[Sequence[int]], num_removed: int) -> list[bool]:
    """Which rows no trial of divide-and-conquer rejects; a trial looks at one subset of columns."""
    kept = [True] * len(rows_MP)
    for columns in subsets:
        part_Mb = rows_MP[:, list(columns)]
        centred_Mb = part_Mb - part_Mb.mean(0)
        axis_b = np.linalg.svd(centred_Mb, full_matrices=False)[2][0]
        scores = [float(row_b @ axis_b) ** 2 for row_b in centred_Mb]
        for row in sorted(range(len(scores)), key=scores.__getitem__)[max(1, len(scores) - num_removed) :]:
            kept[row] = False
    return kept


def mean_clipped(rows_MP: np.ndarray, kept: Sequence[bool], bound: float) -> np.ndarray:
    """The mean of the kept rows, each scaled down to the length ``bound``, ``(P,)``; 0 without."""
    total_P = np.zeros(rows_MP.shape[1])
    for row_P, is_kept in zip(rows_MP, kept, strict=True):
        if is_kept:
            length = float(np.linalg.norm(row_P))
            total_P += row_P * (min(1.0, bound / length) if length > 0 else 1.0)
    return total_P / max(1, sum(kept))


def signguard_kept(rows_MP: np.ndarray, columns: Sequence[int], shortest: float = 0.1, longest: float = 3.0) -> list[bool]:
    """Which rows pass SignGuard's two filters; the signs of some columns are counted."""
    from sklearn.cluster import MeanShift, estimate_bandwidth

    lengths = [float(np.linalg.norm(row_P)) for row_P in rows_MP]
    middle = float(np.median(lengths))
    features = np.array([[np.mean(row_P[list(columns)] * sign > 0) for sign in (1, -1)] for row_P in rows_MP])
    features = np.stack([features[:, 0], 1 - features.sum(1), features[:, 1]], 1)
    labels = MeanShift(bandwidth=estimate_bandwidth(features, quantile=0.5)).fit_predict(features)
    largest = max(set(labels.tolist()), key=labels.tolist().count)
    pairs = zip(lengths, labels.tolist(), strict=True)
    return [shortest * middle <= length <= longest * middle and label == largest for length, label in pairs]


def centred_clipping(rows_MP: np.ndarray, start_P: np.ndarray, steps: int, radius: float | None) -> np.ndarray:
    """Centred clipping from a point, ``(P,)``; without a radius, with the median distance."""
    point_P = start_P
    for _ in range(steps):
        lengths = [float(np.linalg.norm(row_P - point_P)) for row_P in rows_MP]
        bound = float(np.median(lengths)) if radius is None else radius
        moves = [(row_P - point_P) * min(1.0, bound / length) for row_P, length in zip(rows_MP, lengths, strict=True)]
        point_P = point_P + sum(moves) / len(moves)
    return point_P


def fed_nga(rows_MP: np.ndarray) -> np.ndarray:
    """The mean of the rows, each first scaled to the median length, ``(P,)``."""
    lengths = [float(np.linalg.norm(row_P)) for row_P in rows_MP]
    return sum(np.median(lengths) / length * row_P for row_P, length in zip(rows_MP, lengths, strict=True)) / len(rows_MP)


def nearest_means(rows_MP: np.ndarray, num_malicious: int) -> np.ndarray:
    """For each row, the mean of the n - f rows that are nearest to it, ``(M, P)``."""
    means = []
    for row_P in rows_MP:
        distances = [float(((other_P - row_P) ** 2).sum()) for other_P in rows_MP]
        nearest = sorted(range(len(rows_MP)), key=distances.__getitem__)[: len(rows_MP) - num_malicious]
        means.append(np.mean([rows_MP[near] for near in nearest], 0))
    return np.array(means)


def foundation_rows(rows_MP: np.ndarray, num_copies: int) -> np.ndarray:
    """The rows, and copies of the one that is furthest from both extremes, ``(M + copies, P)``."""
    largest_P, smallest_P = rows_MP.max(0), rows_MP.min(0)
    scores = [min(float(np.linalg.norm(row_P - largest_P)), float(np.linalg.norm(row_P - smallest_P))) for row_P in rows_MP]
    return np.array([*rows_MP, *[rows_MP[scores.index(max(scores))]] * num_copies])


def bucket_means(rows_MP: np.ndarray, order: Sequence[int], size: int) -> np.ndarray:
    """The mean of each bucket of ``size`` rows, taken in the given order, ``(B, P)``."""
    buckets = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return np.array([np.mean([rows_MP[row] for row in bucket], 0) for bucket in buckets])


def alignins_kept(rows_MP: np.ndarray, global_P: np.ndarray, top_share: float = 0.3) -> list[bool]:
    """Which rows AlignIns keeps with both bounds at 1."""
    num_top = max(1, int(top_share * rows_MP.shape[1]))
    principal_P = np.sign(sum(np.sign(row_P) for row_P in rows_MP))
    directions, agreements = [], []
    for row_P in rows_MP:
        directions.append(float(row_P @ global_P) / float(np.linalg.norm(row_P) * np.linalg.norm(global_P)))
        top = np.argsort(-np.abs(row_P))[:num_top]
        agreements.append(float(np.mean(np.sign(row_P[top]) == principal_P[top])))

    def is_close(values: list[float]) -> list[bool]:
        middle, deviation = float(np.median(values)), float(np.std(values))
        return [deviation == 0 or abs(value - middle) / deviation < 1 for value in values]

    return [a and b for a, b in zip(is_close(directions), is_close(agreements), strict=True)]


def fedgreed_kept(rows_MP: np.ndarray, loss: Callable[[np.ndarray], float]) -> list[bool]:
    """Which rows FedGreed averages; ``loss`` is that of the model after an update."""
    order = sorted(range(len(rows_MP)), key=lambda row: loss(rows_MP[row]))
    taken = order[:1]
    for row in order[1:]:
        if loss(np.mean(rows_MP[[*taken, row]], 0)) > loss(np.mean(rows_MP[taken], 0)):
            break
        taken.append(row)
    return [row in taken for row in range(len(rows_MP))]
