"""Distances and principal scores among some of the clients, at fixed shapes: others are placed where they say nothing.

Shapes: N clients, R = N + 1 rows, root last.
"""

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.distances import Distances

__all__ = ["others_at_the_centroid", "scores_among"]

# Up to this number of rows a second matrix of distances is made, in which the clients left out say nothing.
_ROWS_TO_PLACE = 4096


def scores_among(distances: Distances, chosen_N: Tensor, backend: Backend) -> tuple[Tensor, Tensor | bool]:
    """Principal scores of the chosen clients alone, ``(N, 2)``, and whether they settled; the others' are 0."""
    among_R = torch.cat([chosen_N, chosen_N.new_zeros(1)])
    scores_R2, settled = backend.principal_scores(others_at_the_centroid(distances, among_R))
    return scores_R2[:-1], settled


def others_at_the_centroid(distances: Distances, chosen_R: Tensor) -> Distances:
    """Distances in which all other rows stand where the chosen ones have their mean."""
    if len(distances) > _ROWS_TO_PLACE:  # no room for a second matrix: everybody stays where they are
        return distances
    all_RR = distances.stored.to(torch.float64) * distances.unit
    share_R = chosen_R.to(torch.float64) / chosen_R.sum()
    to_chosen_R = all_RR @ share_R
    to_centroid_R = (to_chosen_R - share_R @ to_chosen_R / 2) * chosen_R
    both_RR = chosen_R[:, None] & chosen_R
    return Distances(torch.where(both_RR, all_RR, to_centroid_R[:, None] + to_centroid_R))
