"""The signed rule beyond ``MOST_COMPARED`` clients: its groups are found in a sample of them.

Comparing all pairs takes quadratic time, and the distances of 100,000 masks would take 20 GB.
Beyond ``MOST_COMPARED`` clients, the rule therefore looks for its cuts among ``SAMPLED`` clients
and the root's row. All other clients are then compared with these only, so time grows linearly with
the number of clients:

1. The sample is drawn by a seed that follows from all masks. The same masks give the same sample,
   and no client can know beforehand whether it will be in it.
2. Both cuts are found in the sample, by the same functions as otherwise.
3. Every other client gets its place in the sample's principal components from its distances to the
   sample. It is then assigned to a side of each cut by the four witnesses that the rule sees: by
   the discriminant of two normals with a common covariance, fitted to the two sides of the sample.
   This is one more step of the EM algorithm that found the cut.
4. A client is a copy if two clients of the sample are as near as copies are, or if two clients, in
   the sample or not, have exactly its mask. A client of the sample is compared with all others.
5. Whatever needs no distances is decided for all clients together, as otherwise: updates of zeros,
   which copies are bad, and who opposes the root data steadily.

A group of attackers of which the sample holds less than a few clients is not found: with 1,023 of
100,000 clients these are groups of about two hundred.

Shapes: N clients, R = N + 1 rows, S sampled clients, F witnesses; the root's row is the last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.alike import Alike, mask_reach, near_masks
from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.cut_statistics import LEAST_LEFT
from skymask_gpu.engine.clustering.ruling import Facts, Ruling, separation
from skymask_gpu.engine.clustering.signed import COPIES, Cuts, by_cuts, cuts_among
from skymask_gpu.engine.clustering.two_stage import SMALLEST_SHARE
from skymask_gpu.engine.clustering.witnesses import Witnesses
from skymask_gpu.engine.clustering.worse_side import Cut
from skymask_gpu.engine.distances import Distances, sharded_distances
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.kernels.anywhere import hamming_counts_between

__all__ = ["SampledDistances", "is_sampled", "rows_in_memory", "signed_on_sample"]

# Up to this number of clients all pairs are compared. With more rows, distances would be rounded,
# and their components could not be computed among chosen clients only.
MOST_COMPARED = 4_095
# The number of clients in a sample. What a cut must explain grows with the number of clients, like
# what it does explain, so a larger sample finds hardly more; but the time to compare all clients
# with it grows.
SAMPLED = 1_023
# The clients that are not in the sample are compared with it in blocks of this many times its rows.
# The CPU packs the sample's bits anew for each block, so few large blocks take less time. A block's
# bits are copied, so small blocks take less memory.
_SAMPLES_AT_ONCE = 2
# The number of words of bits of which a temporary is made at once: 1 MiB in int64, which stays in a
# CPU's cache.
_WORDS_AT_ONCE = 2**17


def is_sampled(rule: str, num_clients: int) -> bool:
    """Whether a rule that knows keep shares or cosines judges N clients by a sample."""
    return rule == "signed" and num_clients > MOST_COMPARED


def rows_in_memory(rule: str, num_clients: int) -> int:
    """The number of rows whose distances from each other are held at once."""
    return SAMPLED + 1 if is_sampled(rule, num_clients) else num_clients + 1


@dataclass(frozen=True)
class SampledDistances:
    """Distances within a sample of the rows, and from all rows to the sample.

    Attributes:
        sample: the distances of the S sampled clients and of the root's row, which is the last.
        clients_S: the numbers of the sampled clients, ascending.
        alike_N: for each client, the number of clients with exactly its mask, itself included.
        to_sample: yields ``(numbers of n rows, (n, S + 1) float64)``: the distances of all R rows,
            a block of rows at a time, to the sampled clients and to the root's row.
    """

    sample: Distances
    clients_S: Tensor
    alike_N: Tensor
    to_sample: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    def __len__(self) -> int:
        """The number of rows, R."""
        return len(self.alike_N) + 1

    @property
    def device(self) -> torch.device:
        return self.sample.device

    @classmethod
    def of_masks(cls, bits: Tensor, shards: ColumnShards) -> Self:
        """The distances of packed bits, ``(R, bytes)`` uint8; a rank passes its own columns."""
        names_R = _names(bits, shards)
        num_clients = len(bits) - 1
        # Drawn on the CPU, so that every device draws the same clients for the same masks.
        generator = torch.Generator().manual_seed(int(names_R.sum()) & (2**63 - 1))
        drawn = torch.randperm(num_clients, generator=generator, device="cpu")[:SAMPLED].sort().values
        clients_S = drawn.to(bits.device)
        _, group_N, size = names_R[:-1].unique(return_inverse=True, return_counts=True)
        rows = torch.cat([clients_S, torch.full_like(clients_S[:1], num_clients)])
        sampled_bits = bits[rows]
        sample = sharded_distances(sampled_bits, shards)
        is_other_R = torch.ones(len(bits), dtype=torch.bool, device=bits.device).index_fill_(0, rows, False)
        others = is_other_R.argsort(descending=True, stable=True)[: len(bits) - len(rows)]

        def to_sample() -> Iterator[tuple[Tensor, Tensor]]:
            for first, block_TR in sample.blocks():
                yield rows[first : first + len(block_TR)], block_TR
            step = _SAMPLES_AT_ONCE * len(rows)
            for first in range(0, len(others), step):
                block = others[first : first + step]
                with phase("distances", sampled_bits, len(block) * bits.shape[1], 4 * len(block) * len(rows)):
                    counts = shards.sum(hamming_counts_between(bits[block], sampled_bits))
                yield block, counts.to(torch.float64) * (1 / shards.num_params)

        return cls(sample, clients_S, size[group_N], to_sample)


def _names(bits: Tensor, shards: ColumnShards) -> Tensor:
    """A number for each row, ``(R,)`` int64, which equal rows share.

    It is the sum of the row's words of 32 bits times random odd numbers, modulo 2**64. Two rows
    that differ share it with a probability of at most 2**-32, and only three that share it count as
    copies.
    """
    num_words = -(-bits.shape[1] // 4)
    # Each rank has other numbers, because its columns are others.
    generator = torch.Generator().manual_seed(shards.columns.start)
    factors = torch.randint(-(2**62), 2**62, (num_words,), generator=generator, device="cpu") * 2 + 1
    factors = factors.to(bits.device)
    names_R = torch.empty(len(bits), dtype=torch.int64, device=bits.device)
    step = max(1, _WORDS_AT_ONCE // num_words)
    for first in range(0, len(bits), step):
        padded = torch.nn.functional.pad(bits[first : first + step], (0, 4 * num_words - bits.shape[1])).contiguous()
        names_R[first : first + step] = (padded.view(torch.int32).long() * factors).sum(1)
    return shards.sum(names_R)


def signed_on_sample(
    masks: SampledDistances, scores_S2: Tensor, witnesses: Witnesses, backend: Backend
) -> tuple[Ruling, Tensor]:
    """The ruling on all clients, and the principal scores of all rows, ``(R, 2)``.

    Args:
        masks: the distances.
        scores_S2: the principal scores of the sample, ``(S + 1, 2)``.
        witnesses: those of all N clients; at least one must tell which side is worse.
        backend: computes scores.
    """
    sample, clients_S = masks.sample, masks.clients_S
    active_N = witnesses.active(len(masks.alike_N), masks.device)
    active_S, witnesses_S = active_N[clients_S], witnesses.of(clients_S)
    reach = mask_reach(sample, active_S)
    num_near_S, best_S = near_masks(sample, reach, witnesses_S, active_S)
    copy_S = active_S & ((num_near_S >= COPIES) | (masks.alike_N[clients_S] >= COPIES))
    # If few clients are left beside copies, they are too few to compare with.
    enough = (active_S & ~copy_S).sum() >= _least_in_sample(active_S.sum(), active_N.sum())
    alike_S = Alike.found(num_near_S, best_S, witnesses_S, active_S, copy_S & enough)
    cuts_S = cuts_among(sample, lambda: (scores_S2, True), witnesses_S, alike_S, backend)

    # Everything that is asked about the distances of all clients, in one pass over them: first the
    # scores of the picture, then the scores that each cut was found by.
    places = [_place_of_others(sample, scores_S2, torch.ones_like(scores_S2[:, 0], dtype=torch.bool))]
    among_S = alike_S.single
    for cut, scores_of_cut_S2 in zip(cuts_S.cuts, cuts_S.scores, strict=True):
        places.append(_place_of_others(sample, *_with_root(scores_of_cut_S2, among_S)))
        among_S = among_S & ~cut.far_N
    num_near_N, (scores_R2, *scores_by_cut) = _compared_with_sample(masks, reach, active_N, places)
    copy_N = active_N & ((num_near_N >= COPIES) | (masks.alike_N >= COPIES)) & enough
    # Two that are alike and of which one is not in the sample have nearly the same place.
    nobody_N, numbers_N = torch.zeros_like(active_N), torch.arange(len(active_N), device=active_N.device)
    alike = Alike(active_N, copy_N, nobody_N, numbers_N)

    cuts, among_S, among_N = [], alike_S.single, alike.once
    for cut, (first_N, second_N) in zip(cuts_S.cuts, (scores[:-1].T for scores in scores_by_cut), strict=True):
        seen = [x_N for x_N in (witnesses.agreement, witnesses.keep_share, first_N, second_N) if x_N is not None]
        far_N = _far_side(torch.stack(seen), clients_S, cut, among_S) & among_N
        cuts.append(replace(cut, far_N=far_N))
        among_S, among_N = among_S & ~cut.far_N, among_N & ~far_N
    placed = Cuts(among_N, cuts, [scores[:-1] for scores in scores_by_cut], cuts_S.sure)
    ruling = by_cuts(witnesses, alike, placed, lambda benign_N: separation(sample, benign_N[clients_S]))

    def reason(facts: Facts) -> str:
        return f"{ruling.reason(facts)}; groups were looked for among {len(clients_S):,} clients drawn from all"

    return replace(ruling, reason=reason), scores_R2


def _least_in_sample(num_sampled: Tensor, num_clients: Tensor) -> Tensor:
    """The number of sampled clients that there are at least if ``SMALLEST_SHARE`` of all are such.

    A sample holds fewer only by chances of less than one in ten thousand: this lies four standard
    deviations of the hypergeometric distribution below its mean.
    """
    share, left = SMALLEST_SHARE, (num_clients - num_sampled).double() / (num_clients - 1).clamp_min(1)
    return share * num_sampled - 4 * (num_sampled * share * (1 - share) * left).sqrt()


def _with_root(scores_S2: Tensor, among_S: Tensor) -> tuple[Tensor, Tensor]:
    """Scores among chosen clients, and which these are, with the root's row as not chosen."""
    return torch.cat([scores_S2, scores_S2.new_zeros(1, 2)]), torch.cat([among_S, among_S.new_zeros(1)])


def _place_of_others(sample: Distances, scores_R2: Tensor, chosen_R: Tensor) -> tuple[Tensor, Tensor]:
    """The map from the distances of any row to its principal scores among the chosen rows.

    With scores s of one component, whose sum of squares is the eigenvalue, and the mean distances m
    of the chosen rows from each other, a row at distances d has the score (m - d) s / (2 |s|^2)
    (Gower, Biometrika 1968). It gives the chosen rows their own scores.

    Returns:
        The factors of the distances, ``(R, 2)``, and what is added, ``(2,)``.
    """
    scores_R2 = scores_R2 * chosen_R[:, None]
    along_R2 = scores_R2 / (2 * scores_R2.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny))
    mean_R1 = sample.times((chosen_R.to(torch.float64) / chosen_R.sum())[:, None])
    return -along_R2, (mean_R1 * along_R2).sum(0)


def _compared_with_sample(
    masks: SampledDistances, reach: Tensor, active_N: Tensor, places: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """One pass over all distances to the sample.

    Returns:
        How many active clients have a mask like each client's, itself included, ``(N,)``, and for
        each map the scores of all rows, ``(R, 2)``. Clients of the sample are compared with all
        clients, and the others with the sample.
    """
    factors = torch.cat([factors_R2 for factors_R2, _ in places], 1)
    # Counts of fewer than 2**24 are exact in float32, and products are faster than sums of bools.
    active_R = torch.cat([active_N, active_N.new_zeros(1)]).to(torch.float32)
    active_S = active_R[masks.clients_S]
    near_R, near_S = torch.empty_like(active_R), torch.zeros_like(active_S)
    scores = torch.empty(len(masks), factors.shape[1], dtype=torch.float64, device=masks.device)
    for rows, block_TR in masks.to_sample():
        near_TS = (block_TR[:, :-1] < reach).to(torch.float32)
        near_R[rows] = near_TS @ active_S
        near_S += active_R[rows] @ near_TS
        scores[rows] = block_TR @ factors
    scores += torch.cat([added_2 for _, added_2 in places])
    return (near_R[:-1] + 1).index_copy(0, masks.clients_S, near_S).long(), list(scores.split(2, dim=1))


def _far_side(witness_FN: Tensor, clients_S: Tensor, cut: Cut, among_S: Tensor) -> Tensor:
    """Which clients belong to the far side of a cut of the sample, ``(N,)`` bool.

    Clients of the sample stay on their side. Two normals with a common covariance are fitted to the
    two sides (McLachlan & Peel, Finite Mixture Models, 3.3). Another client belongs to the far side
    if that is more likely. Nobody does without a cut.
    """
    if not cut.found:
        return torch.zeros(witness_FN.shape[1], dtype=torch.bool, device=witness_FN.device)
    far_S, near_S = (side_S.to(torch.float64) for side_S in (cut.far_N & among_S, ~cut.far_N & among_S))
    num_far, num_near = far_S.sum(), near_S.sum()
    x_FS = witness_FN[:, clients_S]
    far_F, near_F = x_FS @ far_S / num_far, x_FS @ near_S / num_near
    within_FS = (x_FS - torch.where(cut.far_N, far_F[:, None], near_F[:, None])) * among_S
    within_FF = within_FS @ within_FS.T / (num_far + num_near)
    # Witnesses have very different units, and one that is the same for all has no variance.
    spread_F = (within_FF.diagonal() + (far_F - near_F) ** 2 * num_far * num_near / (num_far + num_near) ** 2).sqrt()
    unit_F = torch.where(spread_F > 0, spread_F, 1.0)
    # A cut leaves at least a small share of the variance, as in EM.
    least_FF = LEAST_LEFT * torch.eye(len(unit_F), dtype=torch.float64, device=unit_F.device)
    along_F = torch.linalg.solve(within_FF / unit_F / unit_F[:, None] + least_FF, (far_F - near_F) / unit_F) / unit_F
    far_N = along_F @ (witness_FN - (far_F + near_F)[:, None] / 2) > (num_near / num_far).log()
    return far_N.index_copy(0, clients_S, cut.far_N)
