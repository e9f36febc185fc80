"""Parsing: from what the clients sent to rows that the engine can take.

Each client that sent no usable row is rejected with a reason. Values are not looked at here;
whether they can be used is the next question, see ``screen.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from skymask_gpu.engine import ClientBlocks, FlatModel

__all__ = ["Clients", "Updates", "check_form", "parse", "raise_none_left", "state_dict_fault"]

Updates = Tensor | ClientBlocks | Sequence[Mapping[str, Tensor]]

# The dtypes that a client's tensors may have. Every operation here supports them.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# State dicts that are read anew whenever they are needed are read for this number of clients at a
# time.
_CLIENTS_PER_BLOCK = 64


@dataclass(frozen=True)
class Clients:
    """The K clients that are still in the round, and why the others are not.

    Attributes:
        rows: K rows of P values each; if columns are sharded, of this rank's own L values.
        numbers: ``(K,)`` int64, for each row the number of its client; on the rows' device.
        buffers: one dict per row; it is empty if the client sent no buffers.
        rejected: client -> reason.
        num_clients: N, the number of all clients, rejected ones included.
    """

    rows: ClientBlocks
    numbers: Tensor
    buffers: list[dict[str, Tensor]]
    rejected: dict[int, str]
    num_clients: int


def check_form(updates: object, num_params: int) -> None:
    """Check the form of the updates as a whole, before any work.

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


def parse(
    updates: Updates, model: FlatModel, module: nn.Module, subtracted_L: Tensor | None, *, in_memory: bool = False
) -> Clients:
    """Make rows from a stacked tensor, blocks or state dicts, on the device of ``model``.

    A client whose state dict is malformed is rejected.

    Args:
        updates: what :func:`check_form` has checked; if they are sharded, this rank's own columns.
        model: it tells names, shapes and device of the parameters.
        module: it tells names and kinds of the buffers.
        subtracted_L: what is subtracted from every row: the global parameters if clients sent their
            local models, None for nothing. If the updates are sharded, only this rank's columns.
        in_memory: whether the state dicts of a sequence other than a list are read once, into one
            tensor. Otherwise a block of them is read each time it is needed.

    Raises:
        ValueError: no client sent a state dict that can be used.
    """
    if not isinstance(updates, Tensor | ClientBlocks):
        return _from_state_dicts(updates, model, module, subtracted_L, in_memory or isinstance(updates, list | tuple))
    moved = updates.to(model.initial_params.device)
    rows = ClientBlocks([moved]) if isinstance(moved, Tensor) else moved
    if subtracted_L is not None:
        rows = rows.minus(subtracted_L)
    return Clients(rows, torch.arange(len(rows), device=rows.device), [{} for _ in range(len(rows))], {}, len(rows))


def raise_none_left(rejected: Mapping[int, str]) -> NoReturn:
    """Raise the error of a round in which no update can be used."""
    first = next(iter(rejected.values()))
    raise ValueError(f"updates: none of {len(rejected)} clients sent a usable update; the first one: {first}")


def _from_state_dicts(
    updates: Sequence[Mapping[str, Tensor]],
    model: FlatModel,
    module: nn.Module,
    subtracted_P: Tensor | None,
    in_memory: bool,
) -> Clients:
    """The rows of state dicts, in memory, or read anew each time a block of them is needed."""
    known, device = module.state_dict(), model.initial_params.device
    buffer_names = {name for name, _ in module.named_buffers()}
    clients: list[int] = []
    rejected: dict[int, str] = {}
    buffers: list[dict[str, Tensor]] = []
    for client, state in enumerate(updates):
        reason = state_dict_fault(state, model, known)
        if reason is not None:
            rejected[client] = reason
            continue
        clients.append(client)
        buffers.append({name: state[name].detach().to(device, known[name].dtype) for name in buffer_names if name in state})
    if not clients:
        raise_none_left(rejected)
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

    if in_memory:
        stacked_KP = torch.empty(len(clients), model.num_params, device=device)
        for row_P, client in zip(stacked_KP, clients, strict=True):
            row_P.copy_(flat(client))
        rows = ClientBlocks([stacked_KP])
    else:
        groups = [clients[first : first + _CLIENTS_PER_BLOCK] for first in range(0, len(clients), _CLIENTS_PER_BLOCK)]

        def read(number: int) -> Tensor:
            return torch.stack([flat(client) for client in groups[number]])

        rows = ClientBlocks.from_reader([len(group) for group in groups], model.num_params, torch.float32, read, device)
    return Clients(rows, torch.tensor(clients, dtype=torch.long, device=device), buffers, rejected, len(updates))


def state_dict_fault(state: object, model: FlatModel, known: Mapping[str, Tensor]) -> str | None:
    """Why a client's state dict cannot be used; None if it can.

    The values of parameters are not looked at, those of buffers are.
    """
    if not isinstance(state, Mapping):
        return f"sent a {type(state).__name__} instead of a state dict"
    missing = [name for name in model.shapes if name not in state]
    unknown = [str(name) for name in state if name not in known]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"has unknown {', '.join(unknown[:3])}"] if unknown else []
        return f"its state dict {' and '.join(parts)}"
    faults = (_tensor_fault(name, value, known[name], name in model.shapes) for name, value in state.items())
    return next((fault for fault in faults if fault is not None), None)


def _tensor_fault(name: str, value: object, wanted: Tensor, is_parameter: bool) -> str | None:
    if not isinstance(value, Tensor):
        return f"{name} is a {type(value).__name__} instead of a tensor"
    if value.is_nested:
        return f"{name} must be a plain dense tensor, got a nested tensor"
    if value.shape != wanted.shape:
        return f"{name} must have shape {tuple(wanted.shape)}, got {tuple(value.shape)}"
    if value.layout != torch.strided or value.is_meta:
        return f"{name} must be a plain dense tensor, got a {'meta' if value.is_meta else value.layout} tensor"
    floating = wanted.is_floating_point()
    if value.dtype not in (_FLOATS if floating else _INTEGERS):
        return f"{name} must be {'floating point' if floating else 'an integer'}, got {value.dtype}"
    if floating and not is_parameter and not torch.isfinite(value.to(wanted.dtype)).all():
        return f"{name} contains NaN or Inf"
    return None
