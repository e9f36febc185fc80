"""From a round's replies to rows that a rule can judge, and a reason for each node without a row.

Nothing that a client sends is an error of the server: whoever sends something unusable is left out,
by the id of its node, and the round goes on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor, nn

from skymask_gpu.defence.tied import other_names, under_all_names
from skymask_gpu.engine.flat_model import columns_of
from skymask_gpu.integrations.flower.arrays import UnusableReplyError, WantedArray, read_array, shown

__all__ = ["Decoded", "SentModel", "decode"]


@dataclass(frozen=True)
class SentModel:
    """The model that the server sent in a round, which says what a reply must hold.

    Attributes:
        arrays: it as Flower has it.
        values: name -> value, for everything that was sent.
        columns: name -> its columns in a flat update, for each trainable parameter.
        buffers: the names of the buffers that were sent.
        other_names: further names of parameters and buffers, such as those of tied weights.
    """

    arrays: ArrayRecord
    values: dict[str, np.ndarray]
    columns: dict[str, slice]
    buffers: frozenset[str]
    other_names: dict[str, str]

    @classmethod
    def of(cls, arrays: ArrayRecord, module: nn.Module) -> "SentModel":
        """Check that ``arrays`` are the state of ``module``.

        Raises:
            ValueError: a trainable parameter is missing, an array has another shape, or the module
                does not know it.
        """
        # An entry that get_extra_state made need not be a tensor; Flower could not send it.
        known = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
        values = {name: array.numpy() for name, array in arrays.items()}
        missing = [name for name in shapes if name not in values]
        unknown = [name for name in values if name not in known]
        reshaped = [name for name in values if name in known and values[name].shape != tuple(known[name].shape)]
        if missing or unknown or reshaped:
            raise ValueError(
                "initial_arrays must be the state of the strategy's module, ArrayRecord(module.state_dict()), got "
                f"{missing[:3]} missing, {unknown[:3]} unknown, {reshaped[:3]} in another shape"
            )
        buffers = frozenset(name for name, _ in module.named_buffers()) & values.keys()
        others = {name: first for name, first in other_names(module).items() if name in values}
        return cls(arrays, values, columns_of(shapes), buffers, others)

    @cached_property
    def wanted(self) -> dict[str, WantedArray]:
        """name -> what a reply must hold under that name."""
        return {name: WantedArray.like(values) for name, values in self.values.items()}

    @cached_property
    def before(self) -> list[tuple[str, slice, np.ndarray, np.dtype[Any]]]:
        """For each trainable parameter its name and columns, its values in one row, and a dtype.

        The dtype is the one in which the values are subtracted: float32, or float64 for parameters
        in float64.
        """
        return [
            (name, columns, self.values[name].reshape(-1), np.result_type(self.values[name], np.float32))
            for name, columns in self.columns.items()
        ]

    @property
    def num_params(self) -> int:
        """P."""
        return sum(self.values[name].size for name in self.columns)

    def params(self) -> Tensor:
        """The trainable parameters, ``(P,)`` float32."""
        return torch.cat([torch.from_numpy(self.values[name]).float().flatten() for name in self.columns])

    def plus(self, update_P: Tensor, buffers: Mapping[str, Tensor]) -> ArrayRecord:
        """The model after the round: parameters plus update, and new values of some buffers.

        Every array keeps the dtype in which it was sent.
        """
        state = {name: torch.from_numpy(value) for name, value in self.values.items()}
        steps = update_P.cpu()
        for name, columns in self.columns.items():
            state[name] = (state[name] + steps[columns].view(state[name].shape)).to(state[name].dtype)
        state.update({name: value.cpu().to(state[name].dtype) for name, value in buffers.items()})
        return ArrayRecord(under_all_names(state, self.other_names))


@dataclass(frozen=True)
class Decoded:
    """The K nodes whose replies can be judged, in ascending order, and why the others' cannot.

    Attributes:
        nodes: the id of each row's node.
        updates: ``(K, P)`` float32, local minus global parameters. They may be NaN and Inf.
        buffers: for each row, the buffers that the client sent; they are finite.
        contents: for each row, the whole reply.
        malformed: node -> reason, for nodes that sent something that cannot be used.
        silent: node -> reason, for nodes that failed or did not answer.
    """

    nodes: list[int]
    updates: Tensor
    buffers: list[dict[str, Tensor]]
    contents: list[RecordDict]
    malformed: dict[int, str]
    silent: dict[int, str]


def decode(
    replies: Iterable[Message],
    asked: set[int],
    sent: SentModel,
    record_key: str,
    memory: np.ndarray,
    check_more: Callable[[RecordDict], object] = lambda content: None,
) -> Decoded:
    """Read what each node sent.

    Args:
        replies: the round's replies, in any order.
        asked: the ids of the nodes that were asked.
        sent: what the server sent them.
        record_key: the key of the arrays in a reply.
        memory: ``(A, P)`` float32 for A asked nodes; the updates are written to its first rows.
        check_more: it raises UnusableReplyError for contents that lack something else.
    """
    by_node, malformed = _by_node(replies, asked)
    silent = dict.fromkeys(asked - by_node.keys() - malformed.keys(), "did not answer")
    arrays: dict[int, dict[str, np.ndarray]] = {}
    for node, message in sorted(by_node.items()):
        # Whatever goes wrong here is this one client's doing, and must not reach the others.
        try:
            if message.has_error():
                silent[node] = f"failed: {shown(message.error.reason)}"
                continue
            found = _read_arrays(message.content, sent, record_key)
            check_more(message.content)
            arrays[node] = found
        except UnusableReplyError as error:
            malformed[node] = str(error)
        except Exception as error:
            malformed[node] = f"its reply cannot be read: {type(error).__name__}: {shown(str(error))}"
    updates_KP = memory[: len(arrays)]
    _subtract_from_all(list(arrays.values()), sent, updates_KP)
    return Decoded(
        nodes=list(arrays),
        updates=torch.from_numpy(updates_KP),
        buffers=[
            {name: torch.from_numpy(found[name].copy()) for name in found.keys() & sent.buffers} for found in arrays.values()
        ],
        contents=[by_node[node].content for node in arrays],
        malformed=malformed,
        silent=silent,
    )


def _by_node(replies: Iterable[Message], asked: set[int]) -> tuple[dict[int, Message], dict[int, str]]:
    """The one reply of each node, and why other nodes' replies are not used."""
    by_node: dict[int, Message] = {}
    malformed: dict[int, str] = {}
    for message in replies:
        node = message.metadata.src_node_id
        if node in asked:
            if node in by_node:
                malformed[node] = "replied more than once"
            by_node[node] = message
        # Errors about replies that Flower could not fetch come from the server's own node.
        elif not message.has_error():
            malformed[node] = "was not asked in this round"
    return {node: message for node, message in by_node.items() if node not in malformed}, malformed


def _read_arrays(content: RecordDict, sent: SentModel, record_key: str) -> dict[str, np.ndarray]:
    """The arrays of one reply, read in place; only parameters may hold NaN and Inf.

    Raises:
        UnusableReplyError: they are not those that the server sent.
    """
    record = content.get(record_key)
    if not isinstance(record, ArrayRecord):
        raise UnusableReplyError(f"its reply must hold an ArrayRecord {record_key!r}, got {type(record).__name__}")
    # A client may leave out what the server does not average: frozen parameters, and buffers.
    missing = [name for name in sent.columns if name not in record]
    unknown = [name for name in record if name not in sent.values]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"has unknown {', '.join(map(shown, unknown[:3]))}"] if unknown else []
        raise UnusableReplyError(f"its ArrayRecord {' and '.join(parts)}")
    found = {name: read_array(array, name, sent.wanted[name]) for name, array in record.items()}
    for name in found.keys() & sent.buffers:
        if not np.isfinite(found[name]).all():
            raise UnusableReplyError(f"{name} contains NaN or Inf")
    return found


def _subtract_from_all(found: Sequence[Mapping[str, np.ndarray]], sent: SentModel, updates_KP: np.ndarray) -> None:
    """Write local minus global parameters of all clients, with as many threads as torch uses.

    One core alone cannot move data as fast as the memory does.
    """
    num_threads = torch.get_num_threads()

    def subtract(first: int) -> None:
        for number in range(first, len(found), num_threads):
            _subtract(found[number], sent, updates_KP[number])

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(subtract, range(num_threads)))


def _subtract(found: Mapping[str, np.ndarray], sent: SentModel, row_P: np.ndarray) -> None:
    """Write local minus global parameters, computed in float32 or float64, into a row."""
    # A difference beyond float32 becomes Inf, which the rule rejects.
    with np.errstate(all="ignore"):
        for name, columns, before, dtype in sent.before:
            np.subtract(found[name].reshape(-1), before, out=row_P[columns], dtype=dtype, casting="same_kind")
