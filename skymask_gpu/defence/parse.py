"""Parsing: from what the clients sent to rows that the engine can take; ``forms.py`` has the forms.

``receive`` looks at the updates as a whole, before any work, and ``parse`` at each client's.

Each client that sent no usable row is rejected with a reason. Values are not looked at here;
whether they can be used is the next question, see ``screen.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from skymask_gpu.defence.forms import Sent, client_state, stacked_rows
from skymask_gpu.engine import ClientBlocks, FlatModel
from skymask_gpu.engine.sharding import ColumnShards, own_columns

__all__ = ["Clients", "Updates", "check_form", "parse", "raise_none_left", "receive"]

Updates = Tensor | np.ndarray | ClientBlocks | Sequence[Sent]

# What clients sent is read for this number of them at a time, if it is read whenever it is needed.
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


def receive(updates: Updates, num_params: int) -> tuple[ColumnShards, Any]:
    """Check the form of the updates as a whole, and take this rank's own columns of them.

    Returns:
        How the columns are sharded, and the updates that :func:`parse` takes: an array has become a
        tensor, and a ``DTensor`` this rank's own columns.

    Raises:
        ValueError: see :func:`check_form` and :func:`own_columns`.
    """
    if isinstance(updates, np.ndarray):
        updates = stacked_rows("updates", updates)
    shards, own = own_columns(updates, num_params)
    check_form(updates, num_params)
    return shards, own


def check_form(updates: object, num_params: int) -> None:
    """Check the form of the updates as a whole, before any work.

    Raises:
        ValueError: a stacked tensor or blocks do not fit the model, or there is no client.
    """
    if isinstance(updates, Tensor | ClientBlocks):
        _check_stacked(updates, num_params)
    elif not isinstance(updates, Sequence) or isinstance(updates, str | bytes):
        raise ValueError(
            f"updates must be an (N, P) tensor or array, ClientBlocks, or a list of one state dict, (P,) tensor or list of "
            f"arrays per client, got {type(updates).__name__}"
        )
    elif len(updates) == 0:
        raise ValueError("updates must hold at least one client's update, got an empty list")


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
    updates: Tensor | ClientBlocks | Sequence[Sent],
    model: FlatModel,
    module: nn.Module,
    subtracted_L: Tensor | None,
    *,
    in_memory: bool = False,
) -> Clients:
    """Make rows from a stacked tensor, blocks or a list of updates, on the device of ``model``.

    A client in a list whose update is malformed is rejected.

    Args:
        updates: what :func:`receive` returned.
        model: it tells names, shapes and device of the parameters.
        module: it tells names and kinds of the buffers.
        subtracted_L: what is subtracted from every row: the global parameters if clients sent their
            local models, None for nothing. If the updates are sharded, only this rank's columns.
        in_memory: whether the updates of a sequence other than a list are read once, into one
            tensor. Otherwise a block of them is read each time it is needed.

    Raises:
        ValueError: no client in a list sent an update that can be used.
    """
    if not isinstance(updates, Tensor | ClientBlocks):
        return _from_list(updates, model, module, subtracted_L, in_memory or isinstance(updates, list | tuple))
    moved = updates.to(model.initial_params.device)
    rows = ClientBlocks([moved]) if isinstance(moved, Tensor) else moved
    if subtracted_L is not None:
        rows = rows.minus(subtracted_L)
    num_clients = len(updates)
    return Clients(rows, torch.arange(num_clients, device=rows.device), [{} for _ in range(num_clients)], {}, num_clients)


def raise_none_left(rejected: Mapping[int, str]) -> NoReturn:
    """Raise the error of a round in which no update can be used."""
    first = next(iter(rejected.values()))
    raise ValueError(f"updates: none of {len(rejected)} clients sent a usable update; the first one: {first}")


def _from_list(
    updates: Sequence[Sent],
    model: FlatModel,
    module: nn.Module,
    subtracted_P: Tensor | None,
    in_memory: bool,
) -> Clients:
    """The rows of a list of updates, in memory, or read anew whenever a block of them is needed."""
    known, device = module.state_dict(), model.initial_params.device
    buffer_names = {name for name, _ in module.named_buffers()}
    clients: list[int] = []
    rejected: dict[int, str] = {}
    buffers: list[dict[str, Tensor]] = []
    for client, sent in enumerate(updates):
        state = client_state(sent, model, known)
        if isinstance(state, str):
            rejected[client] = state
            continue
        clients.append(client)
        # They stay where they are, because only their mean is needed on the device.
        buffers.append({name: state[name].detach().to(known[name].dtype) for name in buffer_names if name in state})
    if not clients:
        raise_none_left(rejected)
    reader = _Reader(updates, model, known, subtracted_P)
    groups = [clients[first : first + _CLIENTS_PER_BLOCK] for first in range(0, len(clients), _CLIENTS_PER_BLOCK)]
    sizes = [len(group) for group in groups]
    if in_memory:
        stacked_KP = torch.empty(len(clients), model.num_params, device=device)
        for rows_KP, group in zip(stacked_KP.split(sizes), groups, strict=True):
            reader.read_into(rows_KP, group)
        rows = ClientBlocks([stacked_KP])
    else:

        def read(number: int) -> Tensor:
            rows_KP = torch.empty(sizes[number], model.num_params, device=device)
            reader.read_into(rows_KP, groups[number])
            return rows_KP

        rows = ClientBlocks.from_reader(sizes, model.num_params, torch.float32, read, device)
    # A list would be copied to the device, for which the host waits.
    numbers_K = torch.tensor(clients, device=device) if rejected else torch.arange(len(clients), device=device)
    return Clients(rows, numbers_K, buffers, rejected, len(updates))


@dataclass(frozen=True)
class _Reader:
    """Flattens what clients of a list sent.

    Attributes:
        updates, model, subtracted_P: as in :func:`parse`.
        known: the module's state dict.
    """

    updates: Sequence[Sent]
    model: FlatModel
    known: Mapping[str, Tensor]
    subtracted_P: Tensor | None

    def read_into(self, rows_KP: Tensor, clients: Sequence[int]) -> None:
        """Write the updates of these clients to ``rows_KP``, a row per client.

        On a GPU, state dicts that are in the host's memory are flattened there. All of these rows
        are then copied at once, instead of one parameter of one client after the other.
        """
        place_KP, subtracted = rows_KP, None
        for row, client in enumerate(clients):
            state = self._state(client)
            if row == 0:
                if rows_KP.is_cuda and all(tensor.device.type == "cpu" for tensor in state.values()):
                    place_KP = torch.empty(rows_KP.shape, pin_memory=True)
                if self.subtracted_P is not None:
                    subtracted = self.model.unflatten(self.subtracted_P.to(place_KP.device))
            tensors = {name: value.to(place_KP.device) for name, value in state.items()}
            if subtracted is not None:
                tensors = {name: value.double() - subtracted[name] for name, value in tensors.items()}
            place_KP[row].copy_(self.model.flatten({name: value.float() for name, value in tensors.items()}))
        if place_KP is not rows_KP:
            # The host goes on at once. PyTorch does not reuse the pinned memory before it is read.
            rows_KP.copy_(place_KP, non_blocking=True)

    def _state(self, client: int) -> dict[str, Tensor]:
        state = client_state(self.updates[client], self.model, self.known)
        if isinstance(state, str):
            raise ValueError(f"updates: client {client}'s update changed after it was first read: {state}")
        return {name: state[name].detach() for name in self.model.shapes}
