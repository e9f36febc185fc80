"""``Ruling``, which every rule returns, and how far apart the two sides of a cut lie.

Shapes: N clients, R = N + 1 rows, the root's last.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skymask_gpu.engine.distances import Distances

__all__ = ["Facts", "Ruling", "mean_of", "separation"]

Facts = dict[str, float]


@dataclass(frozen=True)
class Ruling:
    """The decision of a rule; all its tensors are still on the device.

    Attributes:
        benign_N: which clients are kept, ``(N,)`` bool.
        separation: separation of the two sides, ``()`` float64.
        facts: the ``()`` tensors that the sentence needs.
        figures: what the rule saw per client, by name, ``(N,)`` float64 each; empty if it saw
            nothing but masks.
        reason: makes the sentence, once the facts and the separation are numbers on the host.
        sure: whether all iterations settled.
    """

    benign_N: Tensor
    separation: Tensor
    reason: Callable[[Facts], str]
    facts: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Tensor] = field(default_factory=dict)
    sure: Tensor | bool = True


def mean_of(values_N: Tensor, chosen_N: Tensor) -> Tensor:
    """The mean of the chosen values, ``()``.

    It is NaN if none are chosen. Neither < nor > holds between NaN and a number.
    """
    return (values_N * chosen_N).sum() / chosen_N.sum()


def separation(distances: Distances, a_N: Tensor) -> Tensor:
    """The squared distance of two sides' centroids, over their pooled variance: ``()`` float64.

    It is 0 if a side is empty.
    """
    root_2 = a_N.new_zeros(1, 2)
    member_R2 = torch.cat([torch.stack([a_N, ~a_N], 1), root_2]).to(torch.float64)
    (a_a, a_b), (_, b_b) = member_R2.T @ distances.times(member_R2)
    num_a, num_b = member_R2.sum(0)
    variance_a, variance_b = a_a / num_a**2 / 2, b_b / num_b**2 / 2
    between = a_b / (num_a * num_b) - variance_a - variance_b
    pooled = (num_a * variance_a + num_b * variance_b) / (num_a + num_b)
    nothing = (num_a == 0) | (num_b == 0) | ((pooled == 0) & (between <= 0))
    return (between / pooled).masked_fill(nothing, 0.0)
