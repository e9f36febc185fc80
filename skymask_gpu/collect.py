"""From what clients sent to the rows the engine can take: parsing, and rejecting by name what cannot be used."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from skymask_gpu.engine import ClientBlocks, FlatModel
from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.sharding import ColumnShards
from skymask_gpu.engine.solvers.solution import Loss
from skymask_gpu.engine.step_loop import StepLoop

__all__ = [
    "Collected",
    "check_form",
    "collect",
    "drives_loss_out_of_range",
    "far_out",
    "raise_none_left",
    "state_dict_fault",
]

Updates = Tensor | ClientBlocks | Sequence[Mapping[str, Tensor]]

# A local model is the global model and a little more: nearly its direction, and its length. Honest updates of a model of more
# than a few parameters have neither.
_LIKE_MODEL = 0.9  # cosine with the global model, in absolute value
_LIKE_LENGTH = (0.5, 2.0)  # of the global model's
# Clearly away from the root direction: a cosine that chance does not give.
_OPPOSED = -0.1
# The attack model allows 80% attackers: what more clients do is not an attack but a mistake of the caller. A lower limit would
# let attackers stop every round by sending multiples of the global model; "all clients" would let one of them hide the mistake.
_MOST_ATTACKERS = 0.8
# From this share on a suspicion is a warning. The attack model leaves at least this share of honest clients, so either
# attackers are behind it or all honest clients made the mistake.
_FEWEST_HONEST = 0.2

# An honest update is far shorter than the model it changes; a longer one is looked at more closely.
_FAR_OUT = 1.0
# What a client's tensors may be stored in: kinds that every operation here supports.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Less than the length of any vector that is not 0, and not 0 in float32.
_TINY = torch.finfo(torch.float32).tiny
# Elements of a temporary made from rows of the updates.
_CHUNK_ELEMENTS = 2**22
# Clients of a block whose state dicts are read when they are needed.
_CLIENTS_A_BLOCK = 64


@dataclass
class Collected:
    """Usable clients: their ``rows`` (K of P values, or of this rank's own), and who sent each, ``clients`` ``(K,)``.

    ``norms`` ``(K,)`` float32 are the Euclidean norms of whole rows, ``alignments`` ``(K,)`` float64 their inner products with
    the root direction.
    """

    rows: ClientBlocks
    norms: Tensor
    alignments: Tensor
    clients: Tensor
    num_clients: int
    buffers: list[dict[str, Tensor]]  # one a row; empty dicts if the clients sent none
    rejected: dict[int, str]

    def reject(self, reasons: dict[int, str]) -> None:
        """Drop rows (by position), not all of them, with the reason for each."""
        if not reasons:
            return
        keep_K = torch.ones(len(self.rows), dtype=torch.bool, device=self.rows.device)
        keep_K[list(reasons)] = False
        self.rejected.update({int(self.clients[row]): reason for row, reason in reasons.items()})
        self.rows = self.rows.select(keep_K)
        self.norms, self.alignments = self.norms[keep_K], self.alignments[keep_K]
        self.buffers = [buffers for row, buffers in enumerate(self.buffers) if row not in reasons]
        self.clients = self.clients[keep_K]


@dataclass(frozen=True)
class _Measured:
    """``norms`` ``(K,)`` float32, and inner products, ``(K,)`` float64, with the root direction and the global model's."""

    norms: Tensor
    alignments: Tensor
    along_model: Tensor  # with its unit vector

    def flags(self, direction_P: Tensor, global_params_P: Tensor) -> Tensor:
        """``(4, K)`` bool: norm not finite; like the global model; like it with the opposite sign; against the root."""
        direction, length = _length(direction_P), _length(global_params_P)
        low, high = _LIKE_LENGTH
        long = (self.norms > low * length) & (self.norms < high * length)
        against = self.alignments < _OPPOSED * self.norms * direction
        like, unlike = self.along_model > _LIKE_MODEL * self.norms, self.along_model < -_LIKE_MODEL * self.norms
        return torch.stack([~torch.isfinite(self.norms), long & like, long & unlike, against])


def check_form(updates: Updates, num_params: int) -> None:
    """What can be said of the updates as a whole before any work.

    Raises:
        ValueError: a stacked tensor or blocks do not fit the model, or there is no client.
    """
    if isinstance(updates, Tensor | ClientBlocks):
        _check_stacked(updates, num_params)
    elif not isinstance(updates, Sequence) or isinstance(updates, str | bytes):
        raise ValueError(
            f"updates must be an (N, P) tensor, a list of state dicts or ClientBlocks, got {type(updates).__name__}"
        )
    elif len(updates) == 0:
        raise ValueError("updates must hold at least one client's state dict, got an empty list")


def collect(
    updates: Updates,
    model: FlatModel,
    module: nn.Module,
    direction_P: Tensor,
    global_params_P: Tensor,
    shards: ColumnShards,
    local_models: bool = False,
) -> Collected:
    """Rows from a stacked tensor, blocks or state dicts; whatever is malformed or not finite is rejected by name.

    Of sharded updates each rank passes its own columns, and all reject the same clients. From local models the global
    parameters are subtracted.

    Raises:
        ValueError: no usable client is left, or more than 80% of them are local models (or updates where those were announced).
    """
    rejected: dict[int, str] = {}
    rows: ClientBlocks | None
    if isinstance(updates, Tensor | ClientBlocks):
        rows = updates if isinstance(updates, ClientBlocks) else ClientBlocks([updates])
        if local_models:
            rows = rows.minus(shards.own(global_params_P))
        clients = list(range(len(updates)))
        buffers: list[dict[str, Tensor]] = [{} for _ in clients]
    else:
        rows, clients, buffers = _from_state_dicts(updates, model, module, rejected, global_params_P if local_models else None)
    if rows is None:
        raise_none_left(rejected)
    measured = _measure(rows, direction_P, global_params_P, shards)
    numbers_K = torch.tensor(clients, dtype=torch.long, device=rows.device)
    collected = Collected(rows, measured.norms, measured.alignments, numbers_K, len(updates), buffers, rejected)
    # all that is asked about single rows in one transfer
    doubtful, like, unlike, against = measured.flags(direction_P, global_params_P).tolist()
    _reject_non_finite(collected, [row for row, is_doubtful in enumerate(doubtful) if is_doubtful], shards)
    _refuse_local_models(sum(like), sum(unlike), len(doubtful) - sum(doubtful), local_models)
    if sum(against) > _MOST_ATTACKERS * len(collected.rows):
        warnings.warn(
            f"{sum(against)} of {len(collected.rows)} updates point away from the root direction, more than can be attackers; "
            "updates are local minus global parameters, were they subtracted the other way round? Or do the root data not fit?",
            stacklevel=6,
        )
    if 2 * len(rejected) > len(updates):
        warnings.warn(f"{len(rejected)} of {len(updates)} clients sent an unusable update and were rejected", stacklevel=6)
    return collected


def raise_none_left(rejected: dict[int, str]) -> NoReturn:
    first = next(iter(rejected.values()))
    raise ValueError(f"updates: none of {len(rejected)} clients sent a usable update; the first one: {first}")


def _measure(rows: ClientBlocks, direction_P: Tensor, global_params_P: Tensor, shards: ColumnShards) -> _Measured:
    """Norms and inner products, in one pass over the rows.

    A norm is NaN or Inf where a row has one, Inf also where its square overflows.
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
        warnings.warn(f"{what}; if these are the honest ones, {remedy}", stacklevel=7)


def far_out(collected: Collected, global_params_P: Tensor, direction_P: Tensor) -> list[int]:
    """Rows (by position) so long that their effect on the loss must be looked at one by one."""
    scale = torch.maximum(torch.linalg.vector_norm(global_params_P), torch.linalg.vector_norm(direction_P))
    return (collected.norms > _FAR_OUT * scale).nonzero().flatten().tolist()


def drives_loss_out_of_range(
    collected: Collected, candidates: list[int], global_params_P: Tensor, loss: Loss
) -> dict[int, str]:
    """Those of the candidate rows that alone make the root loss or its gradient Inf or NaN, with the reason.

    A candidate costs a forward and a backward pass, on a GPU replayed from a graph, and all of them together one wait for the
    device: whoever sends many scaled updates does not make the server wait for each.

    Of sharded updates, parameters and loss are those of this rank's own columns.
    """
    # a candidate's update and the parameters are read, the gradient is written
    with phase("suspects", 3 * len(candidates) * global_params_P.nbytes):
        if not candidates:
            return {}
        found_K2 = _losses_alone(collected.rows, candidates, global_params_P, loss)
        norms_K1 = collected.norms[candidates].to(found_K2.dtype)[:, None]
        facts = torch.cat([found_K2, norms_K1], 1).tolist()
    reasons = {}
    for row, (value, is_finite, norm) in zip(candidates, facts, strict=True):
        if not math.isfinite(value):
            reasons[row] = f"its update drives the root loss to {value}"
        elif not is_finite:
            reasons[row] = "its update drives the gradient of the root loss to NaN or Inf"
        elif not math.isfinite(norm):
            reasons[row] = "its update is so large that its norm overflows float32"
    return reasons


def _losses_alone(rows: ClientBlocks, candidates: list[int], global_params_P: Tensor, loss: Loss) -> Tensor:
    """The root loss with each candidate's update alone, and 1 where its gradient is finite, else 0: ``(K, 2)`` float64."""
    device = global_params_P.device
    found_K2 = torch.zeros(len(candidates), 2, dtype=torch.float64, device=device)
    # which candidate it is, and its parameters, are where a replayed graph finds them
    number_1 = torch.zeros(1, dtype=torch.int64, device=device)
    params_P = torch.empty_like(global_params_P)

    def evaluate() -> None:
        leaf_P = params_P.detach().requires_grad_()
        value = loss(leaf_P)
        (grad_P,) = torch.autograd.grad(value, leaf_P)
        lowest, highest = grad_P.aminmax()  # both NaN where an element is
        is_finite = lowest.isfinite() & highest.isfinite()
        fact_2 = torch.stack([value.detach().reshape(()).double(), is_finite.double()])
        found_K2.index_copy_(0, number_1, fact_2[None])
        number_1.add_(1)

    loop = StepLoop(evaluate, device)
    for _, update_P in rows.each(candidates):
        torch.add(global_params_P, update_P.to(global_params_P.dtype), out=params_P)
        loop.run(1)
    return found_K2


def _check_stacked(updates: Tensor | ClientBlocks, num_params: int) -> None:
    if isinstance(updates, Tensor) and (updates.is_nested or updates.layout != torch.strided or updates.is_meta):
        kind = "nested" if updates.is_nested else "meta" if updates.is_meta else updates.layout
        raise ValueError(f"updates must be a plain dense (N, P) tensor, got a {kind} tensor; call .to_dense() if it is sparse")
    shape = (len(updates), updates.num_params) if isinstance(updates, ClientBlocks) else tuple(updates.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != num_params:
        raise ValueError(
            f"updates must have shape (N, {num_params}) with N >= 1 clients, one column for each trainable parameter of the "
            f"module, got {shape}; stack the flattened updates (local minus global), or pass state dicts"
        )
    if updates.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"updates must be float32 or bfloat16, got {updates.dtype}; cast with updates.float()")


def _from_state_dicts(
    updates: Sequence[Mapping[str, Tensor]],
    model: FlatModel,
    module: nn.Module,
    rejected: dict[int, str],
    subtracted_P: Tensor | None,
) -> tuple[ClientBlocks | None, list[int], list[dict[str, Tensor]]]:
    """Rows (None: there is none), who sent each, and the buffers sent; faults go to ``rejected``.

    Dicts in a list are stacked; of any other sequence they are read again each time a block is needed.
    """
    known = module.state_dict()
    device = model.initial_params.device
    clients: list[int] = []
    buffers: list[dict[str, Tensor]] = []
    names = {name for name, _ in module.named_buffers()}
    for client, state in enumerate(updates):
        reason = state_dict_fault(state, model, known)
        if reason is not None:
            rejected[client] = reason
            continue
        clients.append(client)
        buffers.append({name: state[name].detach().to(device, known[name].dtype) for name in names if name in state})
    if not clients:
        return None, clients, buffers

    subtracted = None if subtracted_P is None else model.unflatten(subtracted_P)

    def flat(client: int) -> Tensor:
        state = updates[client]
        reason = state_dict_fault(state, model, known)
        if reason is not None:
            raise ValueError(f"updates: client {client}'s state dict changed after it was first read: {reason}")
        tensors = {name: state[name].to(device) for name in model.shapes}
        if subtracted is not None:
            tensors = {name: value.double() - subtracted[name] for name, value in tensors.items()}
        return model.flatten({name: value.float() for name, value in tensors.items()})

    if isinstance(updates, list | tuple):
        return ClientBlocks([torch.stack([flat(client) for client in clients])]), clients, buffers
    groups = [clients[first : first + _CLIENTS_A_BLOCK] for first in range(0, len(clients), _CLIENTS_A_BLOCK)]

    def read(number: int) -> Tensor:
        return torch.stack([flat(client) for client in groups[number]])

    sizes = [len(group) for group in groups]
    return ClientBlocks.from_reader(sizes, model.num_params, torch.float32, read, device), clients, buffers


def state_dict_fault(state: Mapping[str, Tensor], model: FlatModel, known: Mapping[str, Tensor]) -> str | None:
    if not isinstance(state, Mapping):
        return f"sent a {type(state).__name__} instead of a state dict"
    missing = [name for name in model.shapes if name not in state]
    unknown = [str(name) for name in state if name not in known]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"has unknown {', '.join(unknown[:3])}"] if unknown else []
        return f"its state dict {' and '.join(parts)}"
    for name, value in state.items():
        if not isinstance(value, Tensor):
            return f"{name} is a {type(value).__name__} instead of a tensor"
        if value.is_nested:
            return f"{name} must be a plain dense tensor, got a nested tensor"
        if value.shape != known[name].shape:
            return f"{name} must have shape {tuple(known[name].shape)}, got {tuple(value.shape)}"
        if value.layout != torch.strided or value.is_meta:
            return f"{name} must be a plain dense tensor, got a {'meta' if value.is_meta else value.layout} tensor"
        floating = known[name].is_floating_point()
        if value.dtype not in (_FLOATS if floating else _INTEGERS):
            return f"{name} must be {'floating point' if floating else 'an integer'}, got {value.dtype}"
        if floating and name not in model.shapes and not torch.isfinite(value.to(known[name].dtype)).all():
            return f"{name} contains NaN or Inf"
    return None


def _reject_non_finite(collected: Collected, doubtful: list[int], shards: ColumnShards) -> None:
    """``doubtful`` are the rows (by position) without a finite norm: only these are read a second time."""
    reasons = {}
    for row, update_L in collected.rows.each(doubtful):
        num_bad = int(shards.sum((~torch.isfinite(update_L)).sum()))
        if num_bad:
            reasons[row] = f"its update contains NaN or Inf ({num_bad} of {shards.num_params} values)"
    if len(reasons) == len(collected.rows):
        raise_none_left({**collected.rejected, **reasons})
    collected.reject(reasons)
