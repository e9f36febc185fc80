"""The signed rule: which clients are no evidence of their own, because their masks are alike.

The mask of a client that sent zeros tells nothing. Three or more masks that are nearer to each
other than models come that are each trained on their own data are copies. If only two are that
near, and their cosines are alike, too, one client stands for both. Counted as two, they would look
like a group that does not scatter at all, and a single replay could get an honest client rejected
with its attacker. If the cosines are not alike, one of the two may be an attacker who trained for
the other's mask. Each of them is then judged by itself.

Shapes: N clients, R = N + 1 rows, root last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.ruling import mean_of
from skymask_gpu.engine.clustering.two_stage import copy_reach, nearest_neighbours
from skymask_gpu.engine.clustering.witnesses import Witnesses
from skymask_gpu.engine.distances import Distances

__all__ = ["Alike", "mask_reach", "near_masks"]

# Two cosines are alike if they differ by no more than this share of their spread among all clients
# (0.2 to 0.5). The spread of two groups is at most half of the distance between their means, so two
# such clients belong to one group. On the stored sets with harmful attacks, 85 of 153 come out
# within 5% if each attacker has the mask of an honest client; at 1 these are 83, and 62 if cosines
# are not looked at.
ALIKE_COSINES = 0.3


@dataclass(frozen=True)
class Alike:
    """Which clients are no evidence of their own, ``(N,)`` each.

    Attributes:
        active_N: those who sent more than zeros, bool.
        copy_N: active clients with copies of one mask, bool.
        two_N: those of whom two are alike, bool.
        first_N: the number of the client who stands for each, int64: its own, but for one of two
            that are alike.
    """

    active_N: Tensor
    copy_N: Tensor
    two_N: Tensor
    first_N: Tensor

    @property
    def once(self) -> Tensor:
        """The active clients that are no copies, ``(N,)`` bool."""
        return self.active_N & ~self.copy_N

    @property
    def single(self) -> Tensor:
        """Those among them who stand for themselves, ``(N,)`` bool."""
        return self.once & (self.first_N == _numbers(self.first_N))

    @classmethod
    def found(cls, num_near_N: Tensor, best_N: Tensor, witnesses: Witnesses, active_N: Tensor, copy_N: Tensor) -> "Alike":
        """Given the copies and what :func:`near_masks` returns."""
        numbers_N, once_N = _numbers(best_N), active_N & ~copy_N
        both_N = (num_near_N == 2) & once_N
        second_N = both_N & both_N[best_N] & (best_N != numbers_N)
        if witnesses.cosine is not None:
            cosine_N = witnesses.cosine
            spread = mean_of((cosine_N - mean_of(cosine_N, active_N)).square(), active_N).sqrt()
            second_N = second_N & ((cosine_N - cosine_N[best_N]).abs() <= ALIKE_COSINES * spread)
        first_N = torch.where(second_N, best_N, numbers_N)
        is_first_N = torch.zeros_like(numbers_N).index_add(0, first_N, second_N.long()) > 0
        return cls(active_N, copy_N, second_N | is_first_N, first_N)


def mask_reach(distances: Distances, active_N: Tensor) -> Tensor:
    """The distance, ``()``, below which two active clients' masks are alike."""
    return copy_reach(nearest_neighbours(distances), active_N)


def near_masks(distances: Distances, reach: Tensor, witnesses: Witnesses, active_N: Tensor) -> tuple[Tensor, Tensor]:
    """How many active clients have a mask like each client's, and which of them is the best.

    The client itself is one of them. The best has the highest cosine, or keep share if cosines are
    not known. Who stands for others therefore does not depend on the order of the clients.

    Returns:
        The number and the best one's number, ``(N,)`` int64 each.
    """
    merit_N = witnesses.of_side[-1] if witnesses.of_side else torch.zeros_like(active_N, dtype=torch.float64)
    number_R = torch.empty(len(distances), dtype=torch.int64, device=distances.device)
    best_R = torch.empty_like(number_R)
    for first, block_TR in distances.blocks():
        rows = slice(first, first + len(block_TR))
        near_TN = (block_TR[:, :-1] < reach) & active_N
        number_R[rows] = near_TN.sum(1)
        best_R[rows] = merit_N.masked_fill(~near_TN, -torch.inf).argmax(1)
    return number_R[:-1], best_R[:-1]


def _numbers(like_N: Tensor) -> Tensor:
    return torch.arange(len(like_N), device=like_N.device)
