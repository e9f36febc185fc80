"""MARS, LASA, FLGuardian and FedLAW as literal loops in float64, as in ``reference.py``.

``shapes`` holds the shape of each parameter by its name, in the order in which they lie in a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = [
    "capped_simplex",
    "concentrated_energy",
    "fedlaw_weights",
    "flguardian_trust",
    "lasa",
    "mars_kept",
    "most_trusted",
    "two_clusters",
    "wasserstein",
]

Shapes = Mapping[str, Sequence[int]]
Distance = Callable[[np.ndarray, np.ndarray], float]


def _columns(shapes: Shapes) -> dict[str, range]:
    columns, begin = {}, 0
    for name, shape in shapes.items():
        columns[name] = range(begin, begin + math.prod(shape))
        begin += math.prod(shape)
    return columns


def two_clusters(points: Sequence[np.ndarray], distance: Distance) -> list[bool]:
    """Which points k-means puts in the second of two clusters; none if all are equal.

    It starts from the two points that are furthest apart.
    """
    pairs = [(i, j) for i in range(len(points)) for j in range(len(points))]
    first, second = max(pairs, key=lambda pair: distance(points[pair[0]], points[pair[1]]))
    centres = [points[first], points[second]]
    in_second = [False] * len(points)
    for _ in range(100):
        nearer = [distance(point, centres[1]) < distance(point, centres[0]) for point in points]
        if all(nearer) or not any(nearer) or nearer == in_second:
            break
        in_second = nearer
        for number in (0, 1):
            members = [point for point, is_second in zip(points, in_second, strict=True) if is_second == bool(number)]
            centres[number] = np.mean(members, 0)
    return in_second


def wasserstein(a_E: np.ndarray, b_E: np.ndarray) -> float:
    """Wasserstein's distance of two lists of as many numbers.

    >>> wasserstein(np.array([1, 2, 3, 4, 5]), np.array([5, 5, 3, 2, 2]))
    0.4
    """
    return sum(abs(float(a) - float(b)) for a, b in zip(sorted(a_E), sorted(b_E), strict=True)) / len(a_E)


def concentrated_energy(model_P: np.ndarray, shapes: Shapes, energy_share: float = 0.05) -> np.ndarray:
    """The highest backdoor energies of each layer of a model, ``(E,)``; those of MARS."""
    highest: list[float] = []
    for name, columns in _columns(shapes).items():
        shape = shapes[name]
        if len(shape) == 1 and name.split(".")[-1] != "weight":
            continue
        energies = []
        for neuron in model_P[columns].reshape(shape):
            # a number, a vector, or a matrix of inputs and window
            matrix = np.reshape(neuron, (len(neuron), -1)) if len(shape) > 1 else np.array([[neuron]])
            energies.append(float(np.linalg.svd(matrix, compute_uv=False).max()))
        highest += sorted(energies, reverse=True)[: max(1, round(energy_share * shape[0]))]
    return np.array(highest)


def mars_kept(energies: Sequence[np.ndarray], cluster_distance: float = 0.03) -> list[bool]:
    """Which clients MARS keeps, by the concentrated backdoor energies of their models."""
    in_second = two_clusters(energies, wasserstein)
    if not any(in_second):
        return [True] * len(energies)
    centres = []
    for number in (False, True):
        members = [energy_E for energy_E, second in zip(energies, in_second, strict=True) if second == number]
        centres.append(np.mean(members, 0))
    if wasserstein(*centres) < cluster_distance:
        return [True] * len(energies)
    lower = bool(centres[1].sum() <= centres[0].sum())
    return [second == lower for second in in_second]


def _is_close(values: Sequence[float], bound: float) -> list[bool]:
    middle, deviation = float(np.median(values)), float(np.std(values))
    return [deviation <= 1e-12 * max(map(abs, values)) or abs(value - middle) / deviation < bound for value in values]


def lasa(
    rows_MP: np.ndarray, shapes: Shapes, sparsity: float = 0.3, magnitude_bound: float = 1.0, purity_bound: float = 1.0
) -> tuple[np.ndarray, dict[str, list[bool]]]:
    """LASA's update ``(P,)``, and which clients count in each layer."""
    middle = float(np.median([np.linalg.norm(row_P) for row_P in rows_MP]))
    sparse = []
    for row_P in rows_MP:
        smallest = sorted(np.abs(row_P))[int(sparsity * len(row_P))]
        length = float(np.linalg.norm(row_P))
        clipped_P = row_P * min(1.0, middle / length) if length > 0 else row_P
        sparse.append(np.array([c if abs(value) >= smallest else 0.0 for c, value in zip(clipped_P, row_P, strict=True)]))
    update_P, counting = np.zeros(rows_MP.shape[1]), {}
    for name, columns in _columns(shapes).items():
        lengths, purities = [], []
        for row_P in sparse:
            part_p = row_P[columns]
            lengths.append(float(np.linalg.norm(part_p)))
            signs = [float(np.sign(value)) for value in part_p if value != 0]
            purities.append((1 + sum(signs) / len(signs)) / 2 if signs else 0.5)
        both = zip(_is_close(lengths, magnitude_bound), _is_close(purities, purity_bound), strict=True)
        counts = [in_length and in_purity for in_length, in_purity in both]
        counting[name] = counts if any(counts) else [True] * len(sparse)
        members = [row_P[columns] for row_P, count in zip(sparse, counting[name], strict=True) if count]
        update_P[columns] = np.mean(members, 0)
    return update_P, counting


def flguardian_trust(rows_MP: np.ndarray, shapes: Shapes, depth_weight: float = 2.0) -> list[float]:
    """FLGuardian's trust in each client, as a share of what all layers give."""
    columns: dict[str, list[int]] = {}
    for name, of_parameter in _columns(shapes).items():
        columns.setdefault(name.rpartition(".")[0], []).extend(of_parameter)
    trust = [0.0] * len(rows_MP)
    for depth, of_module in enumerate(columns.values(), start=1):
        parts = [row_P[of_module] for row_P in rows_MP]
        by_angle = [[_cosine_distance(a_p, b_p) for b_p in parts] for a_p in parts]
        by_length = [[float(np.linalg.norm(a_p - b_p)) for b_p in parts] for a_p in parts]
        pairs = zip(_larger_cluster(by_angle), _larger_cluster(by_length), strict=True)
        for client, (in_angle, in_length) in enumerate(pairs):
            trust[client] += depth_weight ** (depth - len(columns)) if in_angle and in_length else 0.0
    return [value / sum(depth_weight ** (depth - len(columns)) for depth in range(1, len(columns) + 1)) for value in trust]


def _cosine_distance(a_p: np.ndarray, b_p: np.ndarray) -> float:
    if a_p is b_p:
        return 0.0
    lengths = float(np.linalg.norm(a_p)) * float(np.linalg.norm(b_p))
    distance = 1 - float(a_p @ b_p) / lengths if lengths > 0 else 1.0
    return distance if distance > 1e-14 else 0.0


def _larger_cluster(distances: list[list[float]]) -> list[bool]:
    in_second = two_clusters([np.array(row) for row in distances], lambda a, b: float(np.linalg.norm(a - b)))
    num_second = sum(in_second)
    if 2 * num_second == len(in_second):
        return [True] * len(in_second)
    return [second == (2 * num_second > len(in_second)) for second in in_second]


def most_trusted(trust: Sequence[float], num_kept: int) -> list[bool]:
    """Who has a trust above that of the best client who gets no place, or else the highest one."""
    beaten = sorted(trust, reverse=True)[num_kept:]
    kept = [not beaten or value > beaten[0] for value in trust]
    return kept if any(kept) else [value == max(trust) for value in trust]


def capped_simplex(values: Sequence[float], cap: float) -> list[float]:
    """The nearest numbers from 0 to ``cap`` whose sum is 1, by bisection.

    >>> [round(value, 6) for value in capped_simplex([0.9, 0.5, 0.1], 0.6)]
    [0.6, 0.4, 0.0]
    """
    low, high = min(values) - cap, max(values)
    for _ in range(200):
        middle = (low + high) / 2
        is_too_much = sum(min(max(value - middle, 0.0), cap) for value in values) > 1
        low, high = (middle, high) if is_too_much else (low, middle)
    return [min(max(value - low, 0.0), cap) for value in values]


def fedlaw_weights(
    rows_MP: np.ndarray,
    gradient: Callable[[np.ndarray], np.ndarray],
    most: int,
    cap: float = 1.1,
    lr: float = 0.1,
    steps: int = 10,
) -> tuple[list[float], np.ndarray]:
    """FedLAW's weights, and its update ``(P,)``.

    ``gradient`` is that of the root loss of the model after an update, and ``most`` the largest
    number of clients with a weight.
    """
    lengths = [float(np.linalg.norm(row_P)) for row_P in rows_MP]
    middle = float(np.median(lengths))
    rows = [row_P * min(1.0, middle / length) if length > 0 else row_P for row_P, length in zip(rows_MP, lengths, strict=True)]
    weights = [1 / len(rows)] * len(rows)
    for _ in range(steps):
        gradient_P = gradient(sum(weight * row_P for weight, row_P in zip(weights, rows, strict=True)))
        moved = [weight - lr * float(row_P @ gradient_P) for weight, row_P in zip(weights, rows, strict=True)]
        largest = sorted(range(len(rows)), key=lambda row: -moved[row])[:most]
        weights = [0.0] * len(rows)
        for row, weight in zip(largest, capped_simplex([moved[row] for row in largest], cap / most), strict=True):
            weights[row] = weight
    return weights, sum(weight * row_P for weight, row_P in zip(weights, rows, strict=True))
