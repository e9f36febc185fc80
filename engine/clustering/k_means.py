"""Two means by Lloyd's algorithm from a greedy k-means++ start (Arthur & Vassilvitskii 2007).

Shapes: R points, K dimensions, 2 means.
"""

import torch
from torch import Tensor

__all__ = ["starting_centres", "two_means", "two_means_without_waiting"]

_MOST_STEPS = 300
# The number of steps where the host does not look whether anything still changes, since a look
# would make it wait for the accelerator.
_BLIND_STEPS = 60


def starting_centres(x_RK: Tensor, seed: int) -> Tensor:
    """Two of the points as starting centres, ``(2, K)``.

    The first one is drawn at random. Two candidates for the second one are drawn with probabilities
    in proportion to the squared distance from the first, and the one that leaves less to explain is
    taken, as in scikit-learn for two clusters.
    """
    first, one_uniform, other_uniform = _host_numbers(len(x_RK), seed)
    first_K = x_RK[first]
    squared_R = ((x_RK - first_K) ** 2).sum(1)
    share_R = squared_R.cumsum(0) / squared_R.sum()
    one_1K = x_RK.index_select(0, _draw(share_R, one_uniform))
    other_1K = x_RK.index_select(0, _draw(share_R, other_uniform))

    def left(draw_1K: Tensor) -> Tensor:
        return torch.minimum(squared_R, ((x_RK - draw_1K) ** 2).sum(1)).sum()

    return torch.cat([first_K[None], torch.where(left(one_1K) <= left(other_1K), one_1K, other_1K)])


def two_means(x_RK: Tensor, centre_2K: Tensor) -> Tensor:
    """Labels 0 or 1, ``(R,)`` int64."""
    return _lloyd(x_RK, centre_2K, _MOST_STEPS, waits=True)[0]


def two_means_without_waiting(x_RK: Tensor, centre_2K: Tensor) -> tuple[Tensor, Tensor]:
    """The labels after a fixed number of steps, and whether they settled, ``()`` bool.

    The host does not synchronise with the accelerator.
    """
    return _lloyd(x_RK, centre_2K, _BLIND_STEPS, waits=False)


def _host_numbers(num_rows: int, seed: int) -> tuple[int, float, float]:
    """A random row, and two random numbers from [0, 1), which are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(num_rows, (), generator=generator)
    return int(first), *torch.rand(2, dtype=torch.float64, generator=generator).tolist()


def _draw(share_R: Tensor, uniform: float) -> Tensor:
    """The index, ``(1,)``, of the first point whose cumulated share reaches the drawn number."""
    return (share_R[:-1] < uniform).sum().unsqueeze(0)


def _lloyd(x_RK: Tensor, centre_2K: Tensor, steps: int, waits: bool) -> tuple[Tensor, Tensor]:
    labels_R = torch.zeros(len(x_RK), dtype=torch.long, device=x_RK.device)
    settled = torch.zeros((), dtype=torch.bool, device=x_RK.device)
    for _ in range(steps):
        before_R, labels_R = labels_R, torch.where(settled, labels_R, torch.cdist(x_RK, centre_2K).argmin(1))
        # If all points are on one side, the other side has no mean. This counts as settled, too.
        settled = settled | (labels_R == before_R).all() | (labels_R.min() == labels_R.max())
        if waits and settled:
            break
        in_2R = torch.stack([labels_R == 0, labels_R == 1]).to(x_RK)
        centre_2K = (in_2R @ x_RK) / in_2R.sum(1, keepdim=True)
    return labels_R, settled
