"""Screening: which rows can be judged at all, and which of them drive the masked model's loss out of range.

One pass over the rows measures their norms and two inner products. ``screen`` rejects whoever sent NaN, Inf or a norm beyond
float32, and refuses local models that were passed as updates. Rows that are longer than the model itself are then looked at
more closely by ``harmful``: whether one alone drives the root loss to NaN or Inf. What it costs is bounded, however many such
rows are sent. If mask training fails all the same, ``culprits`` says whose rows are to blame.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skymask_gpu.defence.parse import Clients, raise_none_left
from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.engine.solvers.solution import Loss
from skymask_gpu.engine.step_loop import StepLoop

__all__ = ["Screened", "culprits", "drive_loss_out_of_range", "far_out", "harmful", "screen"]

# A local model is the global model and a little more: nearly its direction, and its length. Honest updates of a model of more
# than a few parameters have neither. The cosine with the global model is taken in absolute value.
_LIKE_MODEL = 0.9
_LIKE_LENGTH = (0.5, 2.0)  # in lengths of the global model
# Clearly away from the root direction: a cosine that chance does not give.
_OPPOSED = -0.1
# The attack model allows 80% attackers: what more clients do is not an attack but a mistake of the caller. A lower limit would
# let attackers stop every round by sending multiples of the global model; "all clients" would let one of them hide the mistake.
_MOST_ATTACKERS = 0.8
# From this share on a suspicion is a warning. The attack model leaves at least this share of honest clients, so either
# attackers are behind it or all honest clients made the mistake.
_FEWEST_HONEST = 0.2
# An honest update is far shorter than the model that it changes, so a longer one, in lengths of the model, is suspicious.
_FAR_OUT = 1.0
# The number of rows, the longest first, whose loss is evaluated one by one.
_ONE_BY_ONE = 16
# Less than the length of any vector that is not 0, and not 0 in float32.
_TINY = torch.finfo(torch.float32).tiny
# The number of elements of a temporary made from rows of the updates.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Screened:
    """Clients whose rows are finite, and what is known of each row.

    Attributes:
        clients: K of them.
        norms: ``(K,)`` float32, Euclidean norms of whole rows, finite.
        alignments: ``(K,)`` float64, inner products of whole rows with the root direction.
    """

    clients: Clients
    norms: Tensor
    alignments: Tensor

    @property
    def rows(self) -> ClientBlocks:
        return self.clients.rows

    def without(self, reasons: Mapping[int, str]) -> "Screened":
        """The same without some rows, which are given by position, with the reason for each.

        Raises:
            ValueError: no row would be left.
        """
        if not reasons:
            return self
        if len(reasons) == len(self.rows):
            raise ValueError(f"updates: no client is left to aggregate; the first one: {next(iter(reasons.values()))}")
        keep_K = self.clients.kept(reasons)
        return replace(
            self, clients=self.clients.without(reasons), norms=self.norms[keep_K], alignments=self.alignments[keep_K]
        )


def screen(
    clients: Clients, direction_P: Tensor, global_params_P: Tensor, shards: ColumnShards, *, local_models: bool
) -> Screened:
    """Measure every row, and reject those that are not finite.

    Of sharded updates each rank passes its own columns, and all ranks reject the same clients.

    Args:
        clients: from :func:`skymask_gpu.defence.parse.parse`.
        direction_P: the root direction.
        global_params_P: the model before the round.
        shards: which columns the rows are of.
        local_models: whether the global parameters were subtracted, which changes the advice of the error below.

    Raises:
        ValueError: no usable client is left, or more than 80% of the rows are local models (or updates from which the global
            parameters were subtracted twice).
    """
    measured = _measure(clients.rows, direction_P, global_params_P, shards)
    # one transfer for everything that is asked about single rows
    doubtful, like, unlike, against = measured.flags(direction_P, global_params_P).tolist()
    reasons = _non_finite(clients.rows, [row for row, is_doubtful in enumerate(doubtful) if is_doubtful], shards)
    if len(reasons) == len(clients.rows):
        raise_none_left({**clients.rejected, **reasons})
    screened = Screened(clients, measured.norms, measured.alignments).without(reasons)
    _refuse_local_models(sum(like), sum(unlike), len(doubtful) - sum(doubtful), local_models)
    num_usable, num_clients, num_rejected = len(screened.rows), clients.num_clients, len(screened.clients.rejected)
    if sum(against) > _MOST_ATTACKERS * num_usable:
        warnings.warn(
            f"{sum(against)} of {num_usable} updates point away from the root direction, more than can be attackers; "
            "updates are local minus global parameters, were they subtracted the other way round? Or do the root data not fit?",
            stacklevel=5,
        )
    if 2 * num_rejected > num_clients:
        warnings.warn(f"{num_rejected} of {num_clients} clients sent an unusable update and were rejected", stacklevel=5)
    return screened


@dataclass(frozen=True)
class _Measured:
    """``norms`` ``(K,)`` float32, and inner products, ``(K,)`` float64, with the root direction and the global model's."""

    norms: Tensor
    alignments: Tensor
    along_model: Tensor  # with the global model's unit vector

    def flags(self, direction_P: Tensor, global_params_P: Tensor) -> Tensor:
        """``(4, K)`` bool: norm not finite; like the global model; like it with the opposite sign; against the root."""
        direction, length = _length(direction_P), _length(global_params_P)
        low, high = _LIKE_LENGTH
        long = (self.norms > low * length) & (self.norms < high * length)
        against = self.alignments < _OPPOSED * self.norms * direction
        like, unlike = self.along_model > _LIKE_MODEL * self.norms, self.along_model < -_LIKE_MODEL * self.norms
        return torch.stack([~torch.isfinite(self.norms), long & like, long & unlike, against])


def _measure(rows: ClientBlocks, direction_P: Tensor, global_params_P: Tensor, shards: ColumnShards) -> _Measured:
    """Norms and inner products, in one pass over the rows.

    A norm is NaN or Inf where a row has one, and Inf also where the square of a value overflows.
    """
    direction, model = _length(direction_P), _length(global_params_P)
    # a vector of length 0 stays one
    unit_L = shards.own((direction_P / direction.clamp_min(_TINY)).float())
    model_L = shards.own((global_params_P / model.clamp_min(_TINY)).float())
    chunk = max(1, _CHUNK_ELEMENTS // rows.num_params)
    norms, products, along = [], [], []
    for block in rows:
        for part in block.split(chunk):
            part = part.float()
            norms.append(torch.linalg.vector_norm(part, dim=1))
            products.append(part @ unit_L)
            along.append(part @ model_L)
    products_2K = torch.stack([torch.cat(products), torch.cat(along)]).double()
    alignments_K, along_K = shards.sum(products_2K)
    return _Measured(shards.norms(torch.cat(norms)), alignments_K * direction, along_K)


def _length(vector_P: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector_P.double())


def _non_finite(rows: ClientBlocks, doubtful: list[int], shards: ColumnShards) -> dict[int, str]:
    """Why each row without a finite norm (by position) cannot be used: only these rows are read a second time."""
    reasons = {}
    for row, update_L in rows.each(doubtful):
        num_bad = int(shards.sum((~torch.isfinite(update_L)).sum()))
        reasons[row] = (
            f"its update contains NaN or Inf ({num_bad} of {shards.num_params} values)"
            if num_bad
            else "its update is so large that its norm overflows float32"
        )
    return reasons


def _refuse_local_models(num_like: int, num_unlike: int, num_usable: int, local_models: bool) -> None:
    num_suspects = num_like + num_unlike
    what = f"updates: {num_suspects} of {num_usable} are as long as the global model and lie along it (cosine beyond 0.9)"
    if local_models:
        remedy = "they look like updates already: leave local_models=True out"
    elif num_like >= num_unlike:
        remedy = (
            "they look like local models: pass local_models=True (on the command line --local-models), or subtract the global "
            "parameters before"
        )
    else:
        remedy = "with the opposite sign: pass local minus global parameters, subtracted once"
    if num_suspects > _MOST_ATTACKERS * num_usable:
        raise ValueError(f"{what}; {remedy}")
    if num_suspects >= _FEWEST_HONEST * num_usable and num_suspects:
        warnings.warn(f"{what}; if these are the honest ones, {remedy}", stacklevel=6)


def far_out(screened: Screened, global_params_P: Tensor, direction_P: Tensor) -> list[int]:
    """Rows (by position) that are longer than the model that they change."""
    scale = torch.maximum(torch.linalg.vector_norm(global_params_P), torch.linalg.vector_norm(direction_P))
    return (screened.norms > _FAR_OUT * scale).nonzero().flatten().tolist()


def harmful(rows: ClientBlocks, norms_K: Tensor, candidates: list[int], params_L: Tensor, loss: Loss) -> dict[int, str]:
    """Those of the candidate rows (by position) that alone drive the root loss out of range, with the reason for each.

    The 16 longest candidates are looked at one by one. If all of them are harmful, a search by halving finds how far down
    that goes, and whoever is as long is rejected too. So attackers who send many large updates cost the server at most
    ``16 + log2(K)`` forward and backward passes. Harmful rows that hide behind 16 harmless longer ones are left to mask
    training, which notices if they matter.

    Args:
        rows: K rows.
        norms_K: their norms, ``(K,)``.
        candidates: positions of those in question.
        params_L: the global parameters, of sharded updates this rank's own.
        loss: of those parameters.
    """
    if not candidates:
        return {}
    norms = norms_K[candidates].tolist()
    order = [row for _, row in sorted(zip(norms, candidates, strict=True), key=lambda pair: (-pair[0], pair[1]))]
    reasons = drive_loss_out_of_range(rows, order[:_ONE_BY_ONE], params_L, loss)
    if len(reasons) < _ONE_BY_ONE:
        return reasons
    last, first_harmless = _ONE_BY_ONE - 1, len(order)
    while first_harmless - last > 1:
        middle = (last + first_harmless) // 2
        if drive_loss_out_of_range(rows, [order[middle]], params_L, loss):
            last = middle
        else:
            first_harmless = middle
    reason = "its update is at least as long as one that alone drives the root loss out of range"
    return {**reasons, **dict.fromkeys(order[_ONE_BY_ONE : last + 1], reason)}


def culprits(screened: Screened, far_rows: list[int], params_L: Tensor, loss: Loss) -> dict[int, str]:
    """Whose rows (by position) are to blame that the masked model's root loss became NaN or Inf, with the reason for each.

    Those of the longest rows that do it alone; else all that are far out, for they do it together; else, if there are none,
    each row is looked at, at the cost of a forward and backward pass each. Only a model in which updates that are shorter
    than itself can break the loss comes that far.
    """
    everybody = list(range(len(screened.rows)))
    reasons = harmful(screened.rows, screened.norms, everybody, params_L, loss)
    if not reasons:
        reason = "its update, together with others as large, drives the root loss to NaN or Inf"
        reasons = dict.fromkeys(far_rows, reason)
    return reasons or drive_loss_out_of_range(screened.rows, everybody, params_L, loss)


def drive_loss_out_of_range(rows: ClientBlocks, candidates: list[int], params_L: Tensor, loss: Loss) -> dict[int, str]:
    """Those of the candidate rows that alone make the root loss or its gradient Inf or NaN, with the reason for each.

    A candidate costs a forward and a backward pass, on a GPU replayed from a graph, and all of them together one wait for the
    device.
    """
    ascending = sorted(candidates)
    # a candidate's update and the parameters are read, the gradient is written
    with phase("suspects", 3 * len(ascending) * params_L.nbytes):
        facts = _losses_alone(rows, ascending, params_L, loss).tolist()
    reasons = {}
    for row, (value, is_finite) in zip(ascending, facts, strict=True):
        if not math.isfinite(value):
            reasons[row] = f"its update drives the root loss to {value}"
        elif not is_finite:
            reasons[row] = "its update drives the gradient of the root loss to NaN or Inf"
    return reasons


def _losses_alone(rows: ClientBlocks, candidates: list[int], params_L: Tensor, loss: Loss) -> Tensor:
    """The root loss with each candidate's update alone, and 1 where its gradient is finite, else 0: ``(C, 2)`` float64."""
    device = params_L.device
    found_C2 = torch.zeros(len(candidates), 2, dtype=torch.float64, device=device)
    # a replayed graph finds here which candidate it is, and its parameters
    number_1 = torch.zeros(1, dtype=torch.int64, device=device)
    candidate_L = torch.empty_like(params_L)

    def evaluate() -> None:
        leaf_L = candidate_L.detach().requires_grad_()
        value = loss(leaf_L)
        (grad_L,) = torch.autograd.grad(value, leaf_L)
        lowest, highest = grad_L.aminmax()  # both NaN where an element is
        is_finite = lowest.isfinite() & highest.isfinite()
        fact_2 = torch.stack([value.detach().reshape(()).double(), is_finite.double()])
        found_C2.index_copy_(0, number_1, fact_2[None])
        number_1.add_(1)

    loop = StepLoop(evaluate, device)
    for _, update_L in rows.each(candidates):
        torch.add(params_L, update_L.to(params_L.dtype), out=candidate_L)
        loop.run(1)
    return found_C2
