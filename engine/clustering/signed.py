"""The signed rule: where two groups of clients differ in everything that is seen of them, the one that is worse is rejected.

Four witnesses of each client: the cosine of its update with the root direction, the keep share of its mask (the share of ones
among the columns in which masks differ: how much of the update the root data want), and the first two principal components of
all clients' masks. The root's own row is none of them: with ordinary recipes it often lies with the attackers.

1. Copies, three or more masks nearer to each other than models come that are trained each on its own, are left out of all that
   follows. At the end they go if they are far worse than those kept: a client that others replay stays. Two are judged like
   everybody.
2. Cut. With T the witnesses' covariance, a cut into a far side (share p of n clients) and a near one (q), and d the difference
   of their means, the linear discriminant W^-1 d, W = T - p q d d^T (Fisher 1936), separates best; EM of two normals with the
   common covariance W (McLachlan & Peel, Finite Mixture Models, 3.3) finds cuts from several starts. Such a cut explains

       L = n (-log(1 - p q d^T T^-1 d) / 2 + p log p + q log q)

   nats more than one normal does. The far side is the one that is worse: with z the difference of means in one witness over
   its spread within the sides, z of cosine and of keep share add up to far less than nothing; or it is a minority whose masks
   lie apart as one group, and whose cosine is lower. It is rejected if L is large, it is worse, and its cosine is clearly
   lower; a majority only if its cosine is next to nothing, and it is worse by both.
3. Again among those that are kept, for a second direction.

Without a keep share nothing tells a better side but the root's own row: then the cut is that of the two-stage rule.

Shapes: N clients, R = N + 1 rows, root last; F witnesses, S cuts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.clustering.backends import Backend
from skymask_gpu.engine.clustering.ruling import Facts, Ruling, mean_of, separation
from skymask_gpu.engine.clustering.two_stage import (
    ALL_KEPT,
    SMALLEST_SHARE,
    copy_reach,
    cut_by_root,
    cut_reasons,
    nearest_neighbours,
    scattered,
    scattered_reason,
    with_root,
)
from skymask_gpu.engine.distances import Distances
from skymask_gpu.kernels.anywhere import path_maxima

__all__ = ["Witnesses", "signed"]

# The constants. A range behind one says where 149 of the 153 stored sets with harmful attacks come out within 5% and nobody is
# rejected without an attack, when this constant alone is varied (207 sets, recipes that people use).
#
# The nats that a cut must explain: a fixed number (6.5 to 8), and this number for each client (above 0.15, up to 0.18; at 0.15
# honest clients are rejected in one set without an attack).
NATS, NATS_A_CLIENT = 7.5, 1 / 6
# A far side below this share of the clients (0.1 to 0.15) must explain more by this factor (1.2 to 1.35), since a few odd
# clients are no rarity.
FEW, FEW_FACTOR = 0.12, 1.3
# A cut that needs the second component too must explain more by this factor (1.7 to 3), since honest label groups lie apart
# in it.
SECOND_DIRECTION = 2.0
# What is left after a cut is cut again only if the second cut explains more by this factor (1.3 to 3).
SECOND_CUT = 2.0
# A far side is worse if the sum of its two z lies this far below 0 (2 to 3.3).
WORSE = 3.0
# A minority with a lower cosine is also worse if the squared distance of the sides' centroids is this multiple of the variance
# within the sides (0.25 to 1.5).
APART = 1.0
# The far side's mean cosine must be below this share of the near side's (0.7 to 1; beyond 0.8 small federations lose honest
# clients: 0.6% instead of 0.2% without an attack).
LESS_ALIGNED = 0.8
# A majority goes only if its mean cosine is below this share of the minority's (0.2 to 0.45). At 0.5, in an earlier version, a
# majority was rejected because a minority was better.
HARDLY_ALIGNED = 0.3
# Without a keep share, the others are not cut if more than this share of the clients are copies; two decoys of 20 are not
# (no range was measured).
MANY_COPIES = 0.1
# Each witness needs at least this number of clients, since with more witnesses any few clients could be told apart (no range
# was measured).
CLIENTS_A_WITNESS = 3
# The number of EM steps (20 to 80).
STEPS = 40
# EM starts with each of these shares of the clients, the lowest ones in a witness, as the far side; 0 means a single client.
STARTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
# Up to this number of rows a second matrix of distances is made, in which the clients left out say nothing.
_ROWS_TO_PLACE = 4096
_TINY = 1e-12


@dataclass(frozen=True)
class Witnesses:
    """What is known of the clients beside their masks' distances, ``(N,)`` float64 each; None: not known.

    Attributes:
        alignment: inner products of updates with the root direction.
        keep_share: share of ones among the columns in which masks differ.
        norms: Euclidean norms of the updates.
    """

    alignment: Tensor | None = None
    keep_share: Tensor | None = None
    norms: Tensor | None = None

    @property
    def agreement(self) -> Tensor | None:
        """The cosine with the root direction, up to the root direction's length; 0 for an update of zeros."""
        if self.alignment is None or self.norms is None:
            return self.alignment
        return self.alignment / self.norms.clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def of_side(self) -> list[Tensor]:
        """Those that tell which side is worse. Without norms a scaled update agrees the more the longer it is: then the
        alignment is none of them.
        """
        agreement = None if self.norms is None else self.agreement
        return [witness for witness in (self.keep_share, agreement) if witness is not None]


@dataclass(frozen=True)
class _Cut:
    """``far_N``: who is cut off, nobody if nothing counts; what it explains, ``()``."""

    far_N: Tensor
    nats: Tensor
    agreement_z: Tensor
    keep_z: Tensor


def signed(distances: Distances, witnesses: Witnesses, backend: Backend) -> Ruling:
    """Who is kept."""
    smallest = SMALLEST_SHARE * (len(distances) - 1)
    copy_N = _many_copies(distances)
    copy_N = copy_N & ((~copy_N).sum() >= smallest)
    if witnesses.keep_share is None:
        return _signed_by_root(distances, witnesses.alignment, copy_N, smallest, backend)
    once_N = kept_N = ~copy_N
    sure: Tensor | bool = True
    cuts = []
    for factor in (1.0, SECOND_CUT):
        scores_N2, settled = _scores_among(distances, kept_N, backend)
        cut = _cut(distances, scores_N2, witnesses, kept_N, factor * (NATS + NATS_A_CLIENT * len(kept_N)))
        kept_N, sure = kept_N & ~cut.far_N, sure & settled
        cuts.append(cut)
    bad_copy_N = copy_N & _far_below(witnesses, kept_N)
    facts = {"copies": bad_copy_N.sum(), **_facts(witnesses, kept_N, once_N, cuts[0], cuts[1])}
    benign_N = once_N & kept_N | copy_N & ~bad_copy_N
    return Ruling(benign_N, separation(distances, benign_N), _reason, facts, sure)


def _far_below(witnesses: Witnesses, kept_N: Tensor) -> Tensor:
    """Who is far worse than those kept, by one witness or by both together, ``(N,)`` bool."""
    zs = []
    for witness_N in witnesses.of_side:
        kept = mean_of(witness_N, kept_N)
        spread = mean_of((witness_N - kept).square(), kept_N).sqrt()
        zs.append((witness_N - kept) / spread.clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack([*zs, sum(zs[1:], zs[0])]).amin(0) <= -WORSE


def _many_copies(distances: Distances) -> Tensor:
    """Clients with the masks of two others or more, ``(N,)`` bool."""
    reach = copy_reach(nearest_neighbours(distances))
    near_R = torch.empty(len(distances), dtype=torch.int64, device=distances.device)
    for first, block_TR in distances.blocks():
        near_R[first : first + len(block_TR)] = (block_TR[:, :-1] < reach).sum(1)
    return near_R[:-1] >= 3  # itself among them


def _scores_among(distances: Distances, chosen_N: Tensor, backend: Backend) -> tuple[Tensor, Tensor | bool]:
    """Principal scores of the chosen clients alone, ``(N, 2)``, and whether they settled; the others' are 0."""
    among_R = torch.cat([chosen_N, chosen_N.new_zeros(1)])
    scores_R2, settled = backend.principal_scores(_others_at_the_centroid(distances, among_R))
    return scores_R2[:-1], settled


def _others_at_the_centroid(distances: Distances, chosen_R: Tensor) -> Distances:
    """Distances in which all other rows stand where the chosen ones have their mean: there they say nothing."""
    if len(distances) > _ROWS_TO_PLACE:  # no room for a second matrix: everybody stays where they are
        return distances
    all_RR = distances.stored.to(torch.float64) * distances.unit
    share_R = chosen_R.to(torch.float64) / chosen_R.sum()
    to_chosen_R = all_RR @ share_R
    to_centroid_R = (to_chosen_R - share_R @ to_chosen_R / 2) * chosen_R
    both_RR = chosen_R[:, None] & chosen_R
    return Distances(torch.where(both_RR, all_RR, to_centroid_R[:, None] + to_centroid_R))


def _signed_by_root(
    distances: Distances, alignment_N: Tensor | None, copy_N: Tensor, smallest: float, backend: Backend
) -> Ruling:
    """The cut and the outliers of the two-stage rule among those that are no copies."""
    others = _others_at_the_centroid(distances, torch.cat([~copy_N, copy_N.new_ones(1)]))
    scores_R2, settled = backend.principal_scores(others)
    x_R = scores_R2[:, 0].contiguous()
    with_root_N = with_root(x_R, scores_R2, backend)
    apart = separation(others, with_root_N)
    cut_N, facts = cut_by_root(x_R[:-1], with_root_N, apart, alignment_N, smallest)
    # honest label groups lie further apart than what many copies leave of each spreads
    many = copy_N.sum() > MANY_COPIES * len(copy_N)
    kept_N = ~copy_N & (cut_N | many)
    scattered_N, gap = scattered(path_maxima(distances.stored, kept_N, distances.unit), kept_N, smallest)
    facts = {**facts, "copies": copy_N.sum(), "many": many, "scattered": scattered_N.sum(), "gap": gap}
    return Ruling(kept_N & ~scattered_N, apart, _reason_by_root, facts, settled)


def _reason_by_root(facts: Facts) -> str:
    reasons = [_copies_reason(facts)] if facts["copies"] else []
    cut = [] if facts["many"] else cut_reasons(facts)
    if not (facts["root alone"] and (reasons or facts["scattered"])):  # that is a reason for keeping everyone
        reasons += cut
    if facts["scattered"]:
        reasons.append(scattered_reason(facts))
    return " and ".join(reasons) or ALL_KEPT


def _copies_reason(facts: Facts) -> str:
    return f"{int(facts['copies'])} masks are copies of two others' or more"


# --- the cut ------------------------------------------------------------------------------------------------------------


def _cut(distances: Distances, scores_N2: Tensor, witnesses: Witnesses, among_N: Tensor, least_nats: float) -> _Cut:
    """The cut of some clients that explains most, of those whose far side is to go."""
    in_N = among_N.to(torch.float64)
    agreement_N, keep_N = witnesses.agreement, witnesses.keep_share
    assert keep_N is not None, "without a keep share the cut is another"
    signs = [_standard(witness_N, in_N) for witness_N in (agreement_N, keep_N) if witness_N is not None]
    first_N, second_N = scores_N2.T
    starts = [*signs, sum(signs[1:], signs[0]), first_N, -first_N, second_N, -second_N]
    white_FN = _white([*signs, first_N, second_N], in_N)
    far_SN = _starts(starts, in_N)

    most = max(1, (len(in_N) - 1) // CLIENTS_A_WITNESS)
    best = None
    for extra, factor in ((1, 1.0), (2, SECOND_DIRECTION)):
        some_FN = white_FN[: min(len(signs) + extra, most)]
        found = _best(_em(some_FN, far_SN, in_N), distances, some_FN, witnesses, in_N, factor * least_nats)
        best = found if best is None else _either(found.nats > 0, found, best)
    assert best is not None, "there are two"
    return best


def _either(condition: Tensor, one: _Cut, other: _Cut) -> _Cut:
    return _Cut(*(torch.where(condition, getattr(one, name), getattr(other, name)) for name in _Cut.__dataclass_fields__))


def _best(
    split_SN: Tensor, distances: Distances, white_FN: Tensor, witnesses: Witnesses, in_N: Tensor, least_nats: float
) -> _Cut:
    agreement_N, keep_N = witnesses.agreement, witnesses.keep_share
    assert keep_N is not None
    far_SN = torch.cat([split_SN, ~split_SN]) & (in_N > 0)  # either side may be the worse one
    keep_z_S = _effect(keep_N, far_SN, in_N)
    agreement_z_S = torch.zeros_like(keep_z_S) if agreement_N is None else _effect(agreement_N, far_SN, in_N)
    z_S = keep_z_S if len(witnesses.of_side) == 1 else keep_z_S + agreement_z_S

    nats_S, share_S = _nats(far_SN.to(torch.float64), white_FN, in_N)
    least_nats_S = torch.where(share_S < FEW, FEW_FACTOR * least_nats, least_nats)
    worse_S = z_S <= -WORSE
    if agreement_N is not None:
        worse_S = worse_S | (_apart(distances, far_SN, in_N) > APART) & (agreement_z_S < 0)
    counts_S = (nats_S > least_nats_S) & worse_S
    minority_S = share_S <= 0.5
    if agreement_N is not None:
        near_SN = ~far_SN & (in_N > 0)
        far_S, near_S = _means(agreement_N, far_SN), _means(agreement_N, near_SN)
        if witnesses.norms is not None:
            counts_S = counts_S & (far_S < LESS_ALIGNED * near_S)
        hardly = HARDLY_ALIGNED if witnesses.norms is not None else 0.0
        astray_S = (near_S > 0) & (far_S < hardly * near_S) & (keep_z_S < 0) & (agreement_z_S < 0)
        minority_S = minority_S | astray_S
    enough_left_S = share_S <= 1 - SMALLEST_SHARE
    nats_S = nats_S.masked_fill(~(counts_S & minority_S & enough_left_S), 0.0)
    index_1 = nats_S.argmax().unsqueeze(0)
    nats = nats_S.index_select(0, index_1)[0]
    return _Cut(
        far_SN.index_select(0, index_1)[0] & (nats > 0),
        nats,
        agreement_z_S.index_select(0, index_1)[0],
        keep_z_S.index_select(0, index_1)[0],
    )


def _apart(distances: Distances, far_SN: Tensor, in_N: Tensor) -> Tensor:
    """Squared distance of the sides' centroids over the variance within them, ``(S,)``; 0 on average where nothing differs."""
    near_SN, far_SN = in_N * ~far_SN, in_N * far_SN
    root_S = in_N.new_zeros(len(far_SN), 1)
    near_SR, far_SR = torch.cat([near_SN, root_S], 1), torch.cat([far_SN, root_S], 1)
    to_near_SR, to_far_SR = distances.times(torch.cat([near_SR, far_SR]).T.contiguous()).T.split(len(far_SN))
    num_near_S, num_far_S = near_SN.sum(1), far_SN.sum(1)
    # squares around the centroids, and the squared distance of the centroids
    squares_near_S = (near_SR * to_near_SR).sum(1) / (2 * num_near_S)
    squares_far_S = (far_SR * to_far_SR).sum(1) / (2 * num_far_S)
    apart_S = (near_SR * to_far_SR).sum(1) / (num_near_S * num_far_S) - squares_near_S / num_near_S - squares_far_S / num_far_S
    variance_S = (squares_near_S + squares_far_S) / (in_N.sum() - 2)
    return apart_S / variance_S - 1 / num_near_S - 1 / num_far_S


def _means(values_N: Tensor, chosen_SN: Tensor) -> Tensor:
    return (chosen_SN * values_N).sum(1) / chosen_SN.sum(1)


def _standard(values_N: Tensor, in_N: Tensor) -> Tensor:
    """Mean 0 and variance 1 among those that count; all 0 where all are equal."""
    centred_N = (values_N - mean_of(values_N, in_N)) * in_N
    return centred_N / (centred_N.square().sum() / in_N.sum()).sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def _white(columns: list[Tensor], in_N: Tensor) -> Tensor:
    """The columns' span among those that count, ``(F, N)``, with the unit matrix as covariance; 0 where one adds nothing.

    Gram and Schmidt, twice for the sake of rounding; the first columns do not hang on the later ones.
    """
    done: list[Tensor] = []
    for column_N in columns:
        rest_N = _standard(column_N, in_N)
        for _ in range(2):
            for white_N in done:
                rest_N = rest_N - mean_of(rest_N * white_N, in_N) * white_N
        variance = mean_of(rest_N.square(), in_N)
        done.append(torch.where(variance > 1e-8, rest_N / variance.clamp_min(1e-8).sqrt(), 0.0))
    return torch.stack(done)


def _starts(columns: list[Tensor], in_N: Tensor) -> Tensor:
    """The far side that EM starts from: the lowest shares of each column, ``(S, N)`` float64."""
    starts = []
    for column_N in columns:
        order_N = column_N.masked_fill(in_N == 0, torch.inf).argsort(stable=True)
        rank_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(1, len(order_N) + 1, device=order_N.device))
        starts += [rank_N <= (share * in_N.sum()).clamp_min(1.0) for share in STARTS]
    return torch.stack(starts) * in_N


def _em(white_FN: Tensor, far_SN: Tensor, in_N: Tensor) -> Tensor:
    """Two normals with a common covariance, by a fixed number of steps: who is more likely of the far one, ``(S, N)`` bool.

    Among white witnesses T is the unit matrix, hence W^-1 d = d / (1 - p q |d|^2).
    """
    for _ in range(STEPS):
        p_S = (mean_of_all(far_SN, in_N)).clamp(_TINY, 1 - _TINY)
        q_S = 1 - p_S
        moment_SF = (far_SN * in_N) @ white_FN.T / in_N.sum()  # p times the far mean, and -q times the near one
        difference_SF = moment_SF / (p_S * q_S)[:, None]
        left_S = (1 - (moment_SF * difference_SF).sum(1)).clamp_min(1e-6)
        middle_SF = moment_SF * ((1 / p_S - 1 / q_S) / 2)[:, None]
        along_SN = difference_SF @ white_FN - (difference_SF * middle_SF).sum(1, keepdim=True)
        far_SN = torch.sigmoid(along_SN / left_S[:, None] + (p_S / q_S).log()[:, None])
    return far_SN > 0.5


def mean_of_all(values_SN: Tensor, in_N: Tensor) -> Tensor:
    return (values_SN * in_N).sum(1) / in_N.sum()


def _nats(far_SN: Tensor, white_FN: Tensor, in_N: Tensor) -> tuple[Tensor, Tensor]:
    """L of each cut, and the share p of its far side, ``(S,)``; L is 0 where a side is empty."""
    p_S = mean_of_all(far_SN, in_N)
    q_S = 1 - p_S
    moment_SF = (far_SN * in_N) @ white_FN.T / in_N.sum()
    left_S = (1 - moment_SF.square().sum(1) / (p_S * q_S).clamp_min(_TINY)).clamp_min(1e-6)
    nats_S = in_N.sum() * (-left_S.log() / 2 + torch.special.xlogy(p_S, p_S) + torch.special.xlogy(q_S, q_S))
    return nats_S.masked_fill((p_S <= 0) | (q_S <= 0), 0.0), p_S


def _effect(values_N: Tensor, far_SN: Tensor, in_N: Tensor) -> Tensor:
    """How much lower the far side is in one witness, over the spread within the sides: z, ``(S,)``."""
    standard_N = _standard(values_N, in_N)
    p_S = mean_of_all(far_SN, in_N)
    pq_S = (p_S * (1 - p_S)).clamp_min(_TINY)
    moment_S = (far_SN * in_N) @ standard_N / in_N.sum()
    return moment_S / pq_S / (1 - moment_S.square() / pq_S).clamp_min(1e-6).sqrt()


# --- the reason ---------------------------------------------------------------------------------------------------------


def _facts(witnesses: Witnesses, kept_N: Tensor, once_N: Tensor, first: _Cut, second: _Cut) -> dict[str, Tensor]:
    """What the sentence needs of the clearest cut: the first, if there is one; if there is none, of the copies."""
    any_cut = (first.nats > 0) | (second.nats > 0)
    far_N = torch.where(any_cut, torch.where(first.nats > 0, first.far_N, second.far_N), ~once_N)
    facts = {"cut off": first.far_N.sum() + second.far_N.sum()}
    for name, witness_N in (("keep", witnesses.keep_share), ("agreement", witnesses.agreement)):
        z = torch.where(first.nats > 0, getattr(first, f"{name}_z"), getattr(second, f"{name}_z"))
        if witness_N is not None:
            kept = mean_of(witness_N, kept_N)
            spread = mean_of((witness_N - kept).square(), kept_N).sqrt()
            facts |= {f"{name} z": z, f"{name} far": mean_of(witness_N, far_N), f"{name} kept": kept, f"{name} spread": spread}
    return facts


def _reason(facts: Facts) -> str:
    reasons = [_copies_reason(facts)] if facts["copies"] else []
    if facts["cut off"]:
        by_keep = facts["keep z"] <= facts.get("agreement z", 0.0)
        name, words = ("keep", "keep share") if by_keep else ("agreement", "agreement with the root direction")
        far, kept, spread = (facts[f"{name} {of}"] for of in ("far", "kept", "spread"))
        number, honest = int(facts["cut off"]), f"{kept:.2f} ± {spread:.2f}"
        reasons.append(f"{number} clients are a worse group: {words} {far:.2f} where kept clients have {honest}")
    return " and ".join(reasons) or "no group of clients is clearly worse than the others: all kept"
