"""Screening: which rows can be judged at all, and which drive the masked model's loss out of range.

``screen`` measures every row (``measured.py``) and rejects each client that sent NaN, Inf, a norm
beyond float32, or an update far longer than the model and all others. It refuses local models that
were passed as updates. It then looks more closely at rows that are longer than the model itself:
whether a single one drives the root loss to NaN or Inf (``harmful``). The cost of this is bounded,
no matter how many such rows are sent. If mask training fails all the same, ``culprits`` says whose
rows are to blame.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skymask_gpu.defence.measured import measure
from skymask_gpu.defence.output_cosines import Groups
from skymask_gpu.defence.parse import Clients, raise_none_left
from skymask_gpu.defence.root import Direction, warn_of_no_gradient
from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.replayed_loss import Loss, ReplayedLoss
from skymask_gpu.engine.sharding import ColumnShards

__all__ = ["Screened", "culprits", "drive_loss_out_of_range", "harmful", "screen"]

# The attack model allows 80% attackers, so what more clients than that do is no attack but a
# mistake of the caller. With a lower limit, attackers could stop every round by sending multiples
# of the global model. With "all clients" as the limit, a single attacker could hide the mistake.
_MOST_ATTACKERS = 0.8
# From this share of suspicious updates on, there is a warning. At least this share of the clients
# is honest in the attack model, so either attackers sent them or all honest clients made the
# mistake.
_FEWEST_HONEST = 0.2
# An honest update is far shorter than the model that it changes. One that is longer than this, in
# lengths of the model, is suspicious.
_FAR_OUT = 1.0
# The number of rows, the longest first, whose loss is evaluated one by one.
_ONE_BY_ONE = 16


@dataclass(frozen=True)
class Screened:
    """The K clients whose rows are finite, and three facts about each row.

    Attributes:
        clients: the clients and their rows.
        norms: ``(K,)`` float32, the Euclidean norms of whole rows; finite.
        alignments: ``(K,)`` float64, the inner products of whole rows with the root direction.
        by_output: ``(K,)`` float64, the mean output cosine; None if no layer is linear.
        longest_honest: ``()``, the length up to which an update is not suspicious: that of the
            global model, or of the root direction if that is longer.
    """

    clients: Clients
    norms: Tensor
    alignments: Tensor
    by_output: Tensor | None
    longest_honest: Tensor

    @property
    def rows(self) -> ClientBlocks:
        return self.clients.rows

    def far_out(self) -> list[int]:
        """The positions of the rows that are longer than the model that they change."""
        return (self.norms > self.longest_honest).nonzero().flatten().tolist()

    def without(self, reasons: Mapping[int, str]) -> "Screened":
        """The same without some rows.

        Args:
            reasons: position of a row -> why it is left out.

        Raises:
            ValueError: no row would be left.
        """
        if not reasons:
            return self
        if len(reasons) == len(self.rows):
            raise ValueError(f"updates: no client is left to aggregate; the first one: {next(iter(reasons.values()))}")
        old = self.clients
        keep_K = torch.ones(len(old.rows), dtype=torch.bool, device=old.rows.device)
        keep_K[list(reasons)] = False
        clients = replace(
            old,
            rows=old.rows.select(keep_K),
            numbers=old.numbers[keep_K],
            buffers=[buffers for row, buffers in enumerate(old.buffers) if row not in reasons],
            rejected={**old.rejected, **{int(old.numbers[row]): reason for row, reason in reasons.items()}},
        )
        norms_K, alignments_K = self.norms[keep_K], self.alignments[keep_K]
        by_output_K = None if self.by_output is None else self.by_output[keep_K]
        return replace(self, clients=clients, norms=norms_K, alignments=alignments_K, by_output=by_output_K)


def screen(
    clients: Clients,
    direction: Direction,
    global_params_P: Tensor,
    loss: Loss,
    shards: ColumnShards,
    *,
    groups: Groups,
    local_models: bool,
) -> Screened:
    """Measure every row, and reject the clients whose rows are not finite or break the root loss.

    If the updates are sharded, each rank passes its own columns, and all ranks reject the same
    clients.

    Args:
        clients: from :func:`skymask_gpu.defence.parse.parse`.
        direction: the root direction; what is not known of it yet is read with the rows' facts.
        global_params_P: the model before the round.
        loss: the root loss; if the updates are sharded, as a function of this rank's own columns.
        shards: which columns the rows hold.
        groups: the groups of columns whose cosines are measured.
        local_models: whether the caller had the global parameters subtracted. The advice of the
            error below depends on it.

    Raises:
        ValueError: the root direction is not finite, no usable client is left, or more than 80% of
            the rows are local models (or updates from which the global parameters were subtracted
            twice).
    """
    measured = measure(clients.rows, direction.values, global_params_P, shards, groups)
    longest_honest = _FAR_OUT * torch.maximum(measured.model, measured.direction)
    # One transfer from the device answers everything that is asked about the root direction and
    # about single rows.
    flags_6K = measured.flags(longest_honest)
    flags, facts = torch.cat([flags_6K.flatten(), direction.facts]).cpu().tensor_split([flags_6K.numel()])
    if not direction.has_moved(facts.tolist()):
        warn_of_no_gradient()
    doubtful, like, unlike, against, far, beyond = flags.view(flags_6K.shape).tolist()
    reasons = _non_finite(clients.rows, [row for row, is_doubtful in enumerate(doubtful) if is_doubtful], shards)
    reason = "its update is more than ten times as long as the model and as the median update"
    reasons |= {row: reason for row, is_beyond in enumerate(beyond) if is_beyond}
    if len(reasons) == len(clients.rows):
        raise_none_left({**clients.rejected, **reasons})
    screened = Screened(clients, measured.norms, measured.alignments, measured.by_output, longest_honest).without(reasons)
    _refuse_local_models(sum(like), sum(unlike), len(doubtful) - sum(doubtful), local_models)
    num_usable, num_clients, num_rejected = len(screened.rows), clients.num_clients, len(screened.clients.rejected)
    num_against = sum(is_against for row, is_against in enumerate(against) if row not in reasons)
    if num_against > _MOST_ATTACKERS * num_usable:
        warnings.warn(
            f"{num_against} of {num_usable} updates point away from the root direction, more than can be attackers; "
            "updates are local minus global parameters, were they subtracted the other way round? Or do the root data not fit?",
            stacklevel=5,
        )
    if 2 * num_rejected > num_clients:
        warnings.warn(f"{num_rejected} of {num_clients} clients sent an unusable update and were rejected", stacklevel=5)
    far_rows = [row for row, is_far in enumerate(is_far for at, is_far in enumerate(far) if at not in reasons) if is_far]
    return screened.without(harmful(screened.rows, screened.norms, far_rows, shards.own(global_params_P), loss))


def _non_finite(rows: ClientBlocks, doubtful: list[int], shards: ColumnShards) -> dict[int, str]:
    """Why each row without a finite norm cannot be used: position -> reason.

    Only these rows are read a second time.
    """
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


def harmful(rows: ClientBlocks, norms_K: Tensor, candidates: list[int], params_L: Tensor, loss: Loss) -> dict[int, str]:
    """Which of the candidate rows drive the root loss out of range alone: position -> reason.

    The 16 longest candidates are tried one by one. If all of them are harmful, a search by halving
    finds how short a row can be and still be harmful, and every row that is as long is rejected.
    Attackers who send many large updates therefore cost the server at most ``16 + log2(K)`` forward
    and backward passes. Harmful rows that hide behind longer, harmless ones among these 16 are left
    to mask training, which notices if they matter.

    Args:
        rows: K rows.
        norms_K: their norms, ``(K,)``.
        candidates: the positions of the rows in question.
        params_L: the global parameters; if the updates are sharded, this rank's own.
        loss: the root loss as a function of these parameters.
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


def culprits(screened: Screened, params_L: Tensor, loss: Loss, *, again: bool) -> dict[int, str]:
    """Which rows made the masked model's root loss NaN or Inf: position -> reason.

    First, the longest rows are tried for some that do so alone; see :func:`harmful`. If there are
    none, all rows that are longer than the model are blamed, because they do it together. If there
    are none of those either, every row is tried, at the cost of one forward and backward pass per
    row. Only a model whose loss breaks with updates that are shorter than itself comes to that.

    Args:
        screened: the clients whose masks were trained.
        params_L: the global parameters; if the updates are sharded, this rank's own.
        loss: the root loss as a function of these parameters.
        again: whether rows were rejected for this before. Then all rows that are longer than the
            model go at once, because attackers who are found one by one could make the server
            train without end.
    """
    far_rows, everybody = screened.far_out(), list(range(len(screened.rows)))
    if again and far_rows:
        reason = "its update is longer than the model, and such updates drive the root loss to NaN or Inf"
        return dict.fromkeys(far_rows, reason)
    reasons = harmful(screened.rows, screened.norms, everybody, params_L, loss)
    if not reasons:
        reason = "its update, together with others as large, drives the root loss to NaN or Inf"
        reasons = dict.fromkeys(far_rows, reason)
    return reasons or drive_loss_out_of_range(screened.rows, everybody, params_L, loss)


def drive_loss_out_of_range(rows: ClientBlocks, candidates: list[int], params_L: Tensor, loss: Loss) -> dict[int, str]:
    """Which candidate rows make the root loss or its gradient NaN or Inf alone: position -> reason.

    Each candidate costs one forward and one backward pass, which on a GPU is replayed from a graph.
    All candidates together cost one wait for the device.
    """
    ascending = sorted(candidates)
    # For each candidate, its update and the parameters are read, and the gradient is written.
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
    """For each candidate, what its update alone does to the root loss: ``(C, 2)`` float64.

    The first column is the root loss. The second is 1 if its gradient is finite, and 0 otherwise.
    """
    replayed, facts = ReplayedLoss.of(loss), []
    for _, update_L in rows.each(candidates):
        value, grad_L = replayed.value_and_gradient(params_L + update_L.to(params_L.dtype))
        # If one element is NaN, both the least and the greatest are NaN.
        lowest, highest = grad_L.aminmax()
        is_finite = lowest.isfinite() & highest.isfinite()
        facts.append(torch.stack([value.reshape(()).double(), is_finite.double()]))
    return torch.stack(facts) if facts else torch.empty(0, 2)
