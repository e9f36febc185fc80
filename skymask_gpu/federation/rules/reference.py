"""The rules as literal loops in float64, one client or one coordinate at a time.

Tests and the benchmark compare the fast rules with these; nothing here is meant to be fast. Rows
are NumPy arrays: ``rows_MP`` has a row per client and a column per parameter. f is the number of
rows that are assumed to be malicious. The literal version of SkyMask is in
``engine/solvers/reference.py``.
"""

from collections.abc import Iterable

import numpy as np

__all__ = [
    "bulyan_chosen",
    "fltrust",
    "geometric_median_pull",
    "krum_ranking",
    "mean_near_median",
    "median",
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
