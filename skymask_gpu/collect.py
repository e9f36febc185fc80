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

# An honest update is far shorter than the model it changes; a longer one is looked at more closely.
_FAR_OUT = 1.0
# What a client's tensors may be stored in: kinds that every operation here supports.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
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


def collect(updates: Updates, model: FlatModel, module: nn.Module, direction_P: Tensor, shards: ColumnShards) -> Collected:
    """Rows from a stacked tensor, blocks or state dicts; whatever is malformed or not finite is rejected by name.

    Of sharded updates each rank passes its own columns, and all reject the same clients.

    Raises:
        ValueError: no usable client is left.
    """
    rejected: dict[int, str] = {}
    if isinstance(updates, Tensor | ClientBlocks):
        rows: ClientBlocks | None = updates if isinstance(updates, ClientBlocks) else ClientBlocks([updates])
        clients = list(range(len(updates)))
        buffers: list[dict[str, Tensor]] = [{} for _ in clients]
    else:
        rows, clients, buffers = _from_state_dicts(updates, model, module, rejected)
    if rows is None:
        raise_none_left(rejected)
    norms_K, alignments_K = _measure(rows, direction_P, shards)
    numbers_K = torch.tensor(clients, dtype=torch.long, device=rows.device)
    collected = Collected(rows, norms_K, alignments_K, numbers_K, len(updates), buffers, rejected)
    _reject_non_finite(collected, shards)
    if 2 * len(rejected) > len(updates):
        warnings.warn(f"{len(rejected)} of {len(updates)} clients sent an unusable update and were rejected", stacklevel=4)
    return collected


def raise_none_left(rejected: dict[int, str]) -> NoReturn:
    first = next(iter(rejected.values()))
    raise ValueError(f"updates: none of {len(rejected)} clients sent a usable update; the first one: {first}")


def _measure(rows: ClientBlocks, direction_P: Tensor, shards: ColumnShards) -> tuple[Tensor, Tensor]:
    """Norms, ``(K,)`` float32, and inner products with the direction, ``(K,)`` float64.

    A norm is NaN or Inf where a row has one, Inf also where its square overflows.
    """
    length = torch.linalg.vector_norm(direction_P.double())
    unit_L = shards.own((direction_P / length).float() if length > 0 else direction_P.float())
    chunk = max(1, _CHUNK_ELEMENTS // rows.num_params)
    norms, products = [], []
    for block in rows:
        for part in block.split(chunk):
            part = part.float()
            norms.append(torch.linalg.vector_norm(part, dim=1))
            products.append(part @ unit_L)
    return shards.norms(torch.cat(norms)), shards.sum(torch.cat(products).double()) * length


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
    if not candidates:
        return {}
    # a candidate's update and the parameters are read, the gradient is written
    with phase("suspects", 3 * len(candidates) * global_params_P.nbytes):
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
    shape = (len(updates), updates.num_params) if isinstance(updates, ClientBlocks) else tuple(updates.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] != num_params:
        raise ValueError(
            f"updates must have shape (N, {num_params}) with N >= 1 clients, one column for each trainable parameter of the "
            f"module, got {shape}; stack the flattened updates (local minus global), or pass state dicts"
        )
    if updates.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"updates must be float32 or bfloat16, got {updates.dtype}; cast with updates.float()")


def _from_state_dicts(
    updates: Sequence[Mapping[str, Tensor]], model: FlatModel, module: nn.Module, rejected: dict[int, str]
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

    def flat(client: int) -> Tensor:
        state = updates[client]
        return model.flatten({name: state[name].to(device, torch.float32) for name in model.shapes})

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


def _reject_non_finite(collected: Collected, shards: ColumnShards) -> None:
    # the norm is finite for almost every row; only the others are read a second time
    doubtful = (~torch.isfinite(collected.norms)).nonzero().flatten().tolist()
    reasons = {}
    for row, update_L in collected.rows.each(doubtful):
        num_bad = int(shards.sum((~torch.isfinite(update_L)).sum()))
        if num_bad:
            reasons[row] = f"its update contains NaN or Inf ({num_bad} of {shards.num_params} values)"
    if len(reasons) == len(collected.rows):
        raise_none_left({**collected.rejected, **reasons})
    collected.reject(reasons)
