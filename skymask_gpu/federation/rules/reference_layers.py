"""MARS as literal loops in float64, as in ``reference.py``.

``shapes`` holds the shape of each parameter by its name, in the order in which they lie in a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = [
    "concentrated_energy",
    "mars_kept",
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
