"""Distances and principal scores among chosen clients only, while all shapes stay fixed.

The rows of the other clients are not removed. They are moved to the chosen clients' mean, where
they have no influence.

Shapes: N clients, R = N + 1 rows, root last.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.distances import Distances

__all__ = ["AllScores", "others_at_the_centroid", "scores_among"]

# Computes the principal scores of all rows, ``(R, 2)``, at the first call, and says whether they
# settled.
AllScores = Callable[[], tuple[Tensor, Tensor | bool]]

# Moving the other clients takes a second matrix of distances, which has as many entries as the
# first. It is made only up to this number of rows.
_ROWS_TO_PLACE = 4096


def _has_room(distances: Distances) -> bool:
    """Whether other rows can be moved; otherwise the scores are the same for all choices."""
    return len(distances) <= _ROWS_TO_PLACE


def scores_among(
    distances: Distances, all_scores: AllScores, chosen_N: Tensor, backend: Backend
) -> tuple[Tensor, Tensor | bool]:
    """Principal scores of the chosen clients alone, ``(N, 2)``, and whether they settled.

    The scores of the other clients are 0 if there is room to move them. Otherwise the scores are
    those of all rows, which are not computed again, since they are most of the work.
    """
    if not _has_room(distances):
        scores_R2, settled = all_scores()
        return scores_R2[:-1], settled
    among_R = torch.cat([chosen_N, chosen_N.new_zeros(1)])
    scores_R2, settled = backend.principal_scores(others_at_the_centroid(distances, among_R))
    return scores_R2[:-1], settled


def others_at_the_centroid(distances: Distances, chosen_R: Tensor) -> Distances:
    """Distances in which all other rows stand where the chosen ones have their mean.

    With more than 4,096 rows there is no room for a second matrix. The distances then come back as
    they are, and every row stays where it is.
    """
    if not _has_room(distances):
        return distances
    all_RR = distances.stored.to(torch.float64) * distances.unit
    share_R = chosen_R.to(torch.float64) / chosen_R.sum().clamp_min(1)
    to_chosen_R = all_RR @ share_R
    to_centroid_R = (to_chosen_R - share_R @ to_chosen_R / 2) * chosen_R
    both_RR = chosen_R[:, None] & chosen_R
    return Distances(torch.where(both_RR, all_RR, to_centroid_R[:, None] + to_centroid_R))
