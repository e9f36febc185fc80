"""``ClientHistory``: how each client agrees with the root direction, from round to round.

One round's agreement says little about a client whose data differ much from the others'. The root
direction is noisy, and so is the client's own update. Both average out over the rounds, while what
a client aims at does not. A client that comes back is therefore judged by its mean agreement.

Shapes: K clients of a round, C clients known so far.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from skymask_gpu.io.files import read_tensors, write_tensors

__all__ = ["ClientHistory", "Remembered"]

# A round's weight is multiplied by this in each later round. In trials on the demo's federation 0.8
# and 0.9 rejected the same attackers, and 0.7 kept every twelfth of those who play ``ipm``. The
# longer the memory is, the later a client that changes is found.
DECAY = 0.8
# An agreement that lies this number of a client's own spreads below its mean is no noise. The
# client has changed, and its memory begins anew. In the same trials 3 rejected half as many honest
# clients again as 4 did. The larger the number is, the fewer of those who begin to attack later are
# noticed at once.
FALL = 3.5
# The most that a client counts for in the common variance, in medians of the clients' variances. In
# a simulation of honest clients alone, some of whom vary much more than others, the common spread
# is the same as with four upper quartiles. These would be the attackers' own if more than a quarter
# of the clients go up and down.
_MOST_MEDIANS = 8.0
# The smallest effective number of rounds that tell a spread. Two rounds have 1.99.
_TWO_ROUNDS = 1.5


@dataclass(frozen=True)
class Remembered:
    """What is known of K clients, this round included.

    Attributes:
        ids: the ids of the K clients.
        means: ``(K,)`` float64, each client's mean agreement.
        errors: ``(K,)`` float64, the standard error of each mean; Inf until any client has been
            seen twice.
        sums: ``(K, 4)`` float64, what :class:`ClientHistory` remembers of them after this round.
    """

    ids: tuple[int | str, ...]
    means: Tensor
    errors: Tensor
    sums: Tensor


class ClientHistory:
    """What a server remembers of its clients. Pass it to :meth:`SkyMask.aggregate` in each round.

    Clients are told apart by their ids, which are strings or integers. A client that comes back
    under another id begins anew, so ids must be such that a client cannot choose them at will.

    Example:
        >>> history = ClientHistory()
        >>> for agreement in ([0.5, 0.4], [0.3, 0.4]):
        ...     remembered = history.recall(["a", "b"], torch.tensor(agreement).double())
        ...     history.remember(remembered)
        >>> remembered.means
        tensor([0.3889, 0.4000], dtype=torch.float64)
        >>> len(history)
        2
    """

    def __init__(self) -> None:
        self._rows: dict[int | str, int] = {}
        # For each client the sums over its rounds of w, w^2, w c and w c^2, with c the agreement
        # and w = DECAY ** (its rounds since).
        self._sums_C4 = torch.zeros(0, 4, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ClientHistory({len(self)} clients)"

    def recall(self, ids: Sequence[int | str], agreement_K: Tensor) -> Remembered:
        """What is known of the clients, with their agreement in this round; nothing is changed.

        A client whose agreement has fallen far below its mean is known by this round alone.

        Args:
            ids: K different ids.
            agreement_K: ``(K,)``, the agreement in this round.
        """
        agreement_K = agreement_K.double()
        before_K4 = self.sums(ids).to(agreement_K.device)
        one_K = torch.ones_like(agreement_K)
        added_K4 = torch.stack([one_K, one_K, agreement_K, agreement_K.square()], 1)
        decays_4 = torch.tensor([DECAY, DECAY**2, DECAY, DECAY], dtype=torch.float64, device=agreement_K.device)
        spread = _common_spread(before_K4)
        fell_K = (_rounds(before_K4) > _TWO_ROUNDS) & (agreement_K < _means(before_K4) - FALL * spread)
        sums_K4 = torch.where(fell_K[:, None], 0.0, decays_4 * before_K4) + added_K4
        return Remembered(tuple(ids), _means(sums_K4), _common_spread(sums_K4) / _rounds(sums_K4).sqrt(), sums_K4)

    def remember(self, remembered: Remembered) -> None:
        """Keep what :meth:`recall` returned."""
        new = [client for client in remembered.ids if client not in self._rows]
        first = len(self._rows)
        self._rows |= {client: first + number for number, client in enumerate(new)}
        sums_C4 = torch.cat([self._sums_C4.to(remembered.sums.device), remembered.sums.new_zeros(len(new), 4)])
        rows_K = torch.tensor([self._rows[client] for client in remembered.ids], device=sums_C4.device)
        self._sums_C4 = sums_C4.index_copy(0, rows_K, remembered.sums)

    def sums(self, ids: Sequence[int | str]) -> Tensor:
        """``(K, 4)`` float64, what is remembered of these clients; zeros for unknown ones."""
        known = torch.cat([self._sums_C4, self._sums_C4.new_zeros(1, 4)])
        return known[torch.tensor([self._rows.get(client, -1) for client in ids], device=known.device, dtype=torch.long)]

    def state(self) -> dict[str, Tensor]:
        """The history as tensors: ``clients`` ``(C,)`` int64 and ``sums`` ``(C, 4)`` float64.

        Raises:
            ValueError: an id is a string.
        """
        if not all(isinstance(client, int) for client in self._rows):
            raise ValueError("history: only integers as ids of clients can be stored as a tensor; use save()")
        return {"clients": torch.tensor(list(self._rows), dtype=torch.int64), "sums": self._sums_C4}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "ClientHistory":
        """The history whose :meth:`state` this is; an empty one if it holds nothing."""
        return cls._of(state["clients"].tolist(), state["sums"]) if state else cls()

    def save(self, path: Path | str) -> None:
        """Write the history to a safetensors file, under a temporary name first."""
        texts = {"clients": json.dumps(list(self._rows)), "decay": str(DECAY)}
        write_tensors(Path(path), {"sums": self._sums_C4}, texts)

    @classmethod
    def load(cls, path: Path | str) -> "ClientHistory":
        """The history that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        tensors, texts = read_tensors(Path(path))
        try:
            clients = json.loads(texts.get("clients", "null"))
        except (ValueError, RecursionError):
            clients = None
        sums_C4 = tensors.get("sums")
        # A repeated id would leave the clients with fewer rows than there are sums.
        are_ids = isinstance(clients, list) and all(isinstance(one, int | str) for one in clients)
        if not are_ids or len(set(clients)) < len(clients) or not _are_sums(sums_C4, len(clients)):
            raise ValueError(f"history: {path} holds no history of clients; write one with ClientHistory.save")
        return cls._of(clients, sums_C4)

    @classmethod
    def _of(cls, clients: Sequence[int | str], sums_C4: Tensor) -> "ClientHistory":
        history = cls()
        history._rows = {client: row for row, client in enumerate(clients)}
        history._sums_C4 = sums_C4.double()
        return history


def _are_sums(sums: Tensor | None, num_clients: int) -> TypeGuard[Tensor]:
    return sums is not None and sums.dtype == torch.float64 and tuple(sums.shape) == (num_clients, 4)


def _means(sums_K4: Tensor) -> Tensor:
    return sums_K4[:, 2] / sums_K4[:, 0].clamp_min(torch.finfo(torch.float64).tiny)


def _rounds(sums_K4: Tensor) -> Tensor:
    """The effective number of rounds of each client, ``(sum w)^2 / sum w^2`` (Kish 1965)."""
    return sums_K4[:, 0].square() / sums_K4[:, 1].clamp_min(torch.finfo(torch.float64).tiny)


def _common_spread(sums_K4: Tensor) -> Tensor:
    """The standard deviation of the agreement around each client's own mean, ``()``.

    It is pooled over the clients, and Inf if no client has been seen twice. No client counts for
    more than eight times the median: otherwise attackers whose agreement goes up and down would
    make the errors of all means so large that nobody opposes the root data any more.
    """
    rounds_K = _rounds(sums_K4)
    known_K = rounds_K > _TWO_ROUNDS
    biased_K = (sums_K4[:, 3] / sums_K4[:, 0].clamp_min(torch.finfo(torch.float64).tiny) - _means(sums_K4).square()).clamp_min(
        0
    )
    unbiased_K = biased_K * rounds_K / (rounds_K - 1).clamp_min(_TWO_ROUNDS - 1)
    most = _MOST_MEDIANS * torch.where(known_K, unbiased_K, torch.nan).nanmedian().nan_to_num()
    pooled = (unbiased_K.minimum(most) * known_K).sum() / known_K.sum()
    return torch.where(known_K.any(), pooled, torch.inf).sqrt()
