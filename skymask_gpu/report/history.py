"""What happened to each client from round to round: verdicts, witnesses and where its mask lies.

Everything is read from the lines of ``metrics.jsonl``. Older versions recorded less, and then there
is less to show.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from skymask_gpu.report.summary import FinishedRun, flat_settings

__all__ = ["State", "Verdicts", "positions_by_round", "verdicts", "witness_by_round"]


class State(IntEnum):
    """What a round did with a client."""

    ABSENT = 0
    HONEST_KEPT = 1
    HONEST_REJECTED = 2
    ATTACKER_KEPT = 3
    ATTACKER_REJECTED = 4
    # An old record of a round with some of the clients names the rejected ones only.
    UNKNOWN = 5


@dataclass(frozen=True)
class Verdicts:
    """Who was rejected when.

    Attributes:
        states: ``(N, R)`` int8 of :class:`State`, one row per client and one column per round.
        malicious: the number of attackers; they are the first clients.
        rounds: the number of each round, from 0.
    """

    states: np.ndarray
    malicious: int
    rounds: list[int]


def verdicts(run: FinishedRun) -> Verdicts | None:
    """The verdicts of a run; None if its rule judges nobody, or if clients were not counted."""
    num_clients = flat_settings(run.config).get("data.clients")
    judged = [record for record in run.records if record.get("kept") is not None and "rejected" in record]
    if not isinstance(num_clients, int) or not judged:
        return None
    malicious = _num_malicious(run, num_clients)
    states = np.empty((num_clients, len(judged)), np.int8)
    kept = np.where(np.arange(num_clients) < malicious, State.ATTACKER_KEPT, State.HONEST_KEPT)
    for column, record in enumerate(judged):
        clients = _clients(record, num_clients)
        states[:, column] = State.UNKNOWN if clients is None else State.ABSENT
        if clients is not None:
            states[clients, column] = kept[clients]
        rejected = [client for client in record["rejected"] if client < num_clients]
        # The code of a rejected client is that of a kept one of its kind plus 1.
        states[rejected, column] = kept[rejected] + 1
    return Verdicts(states, malicious, [record["round"] for record in judged])


def witness_by_round(run: FinishedRun, name: str, rounds: list[int], num_clients: int) -> list[list[float | None]] | None:
    """The values of a witness, such as ``keep_share``, one list per client with a value per round.

    None if no round recorded it.
    """
    records = {record["round"]: record for record in run.records}
    table: list[list[float | None]] = [[None] * len(rounds) for _ in range(num_clients)]
    found = False
    for column, number in enumerate(rounds):
        values, clients = records[number].get(name), _clients(records[number], num_clients)
        if values is not None and clients is not None and len(values) == len(clients):
            found = True
            for client, value in zip(clients, values, strict=True):
                table[client][column] = value
    return table if found else None


def positions_by_round(run: FinishedRun, num_clients: int) -> dict[int, np.ndarray]:
    """Where the masks of each round lie, ``(N + 1, 2)`` with the root model's last, by round.

    A client without a mask has NaN. The sign of a principal component means nothing, so each round
    is mirrored to resemble the one before.
    """
    positions: dict[int, np.ndarray] = {}
    before: np.ndarray | None = None
    for record in run.records:
        values, clients = record.get("positions"), _clients(record, num_clients)
        if not isinstance(values, list) or clients is None or len(values) != len(clients) + 1:
            continue
        points = np.full((num_clients + 1, 2), np.nan)
        for row, value in zip([*clients, num_clients], values, strict=True):
            if value is not None:
                points[row] = value
        if before is not None:
            points = points * np.where(np.nansum(points * before, 0) < 0, -1, 1)
        positions[record["round"]] = before = points
    return positions


def _clients(record: dict[str, Any], num_clients: int) -> list[int] | None:
    """The clients that took part in a round; None if the record does not tell."""
    if "clients" in record:
        return list(record["clients"])
    return list(range(num_clients)) if record.get("participants") == num_clients else None


def _num_malicious(run: FinishedRun, num_clients: int) -> int:
    attack = run.config.get("attack", {})
    share = attack.get("share") or 0
    return 0 if attack.get("name", "none") == "none" or not share else max(1, round(share * num_clients))
