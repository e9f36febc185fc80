"""The audit's file of results: each batch appends its lines, and a stopped audit goes on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymask_gpu.federation.leak.attacking import Batch, attacked, batches, first_trials
from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.judging import lines
from skymask_gpu.federation.leak.thresholds import next_trials
from skymask_gpu.federation.leak.victims import Victims
from skymask_gpu.io.files import append_line, read_lines, write_text

__all__ = ["SETTINGS", "VICTIMS", "Step", "attack_all", "check_settings", "read_records"]

VICTIMS, SETTINGS = "victims.jsonl", "settings.json"


def check_settings(audit: Audit, folder: Path) -> None:
    """Refuse to go on with other settings than those of the results that are there.

    Raises:
        ValueError: the settings differ; the message names the tables.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(audit.settings()))
    if not (folder / VICTIMS).exists() or not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        raise ValueError(
            f"--resume: {folder} was made with other settings ({', '.join(differing)}); use another folder or --overwrite"
        )


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the pieces that are done.

    Raises:
        ValueError: a line is damaged; the message names it.
    """
    return read_lines(folder / VICTIMS, "block")


@dataclass(frozen=True)
class Step:
    """A batch that is about to be attacked.

    Attributes:
        turn: 0 for the first trials, then the number of the search's step.
        number: the number of the batch within the turn.
        batches: how many the turn has.
        batch: what is attacked.
    """

    turn: int
    number: int
    batches: int
    batch: Batch


def attack_all(audit: Audit, victims: Victims, folder: Path, tick: Callable[[], None] = lambda: None) -> Iterator[Step]:
    """Attack what is not in the folder yet.

    The trials of a turn follow from the results of the turns before it alone, so a stopped audit
    goes on with the same ones.

    Args:
        audit: the settings, which :func:`check_settings` has compared with those of the folder.
        victims: its victims.
        folder: where the results are appended.
        tick: is called after every evaluation of the loss.

    Yields:
        Each batch before it is attacked. When the next one comes, its lines are written.
    """
    done = {_key(record): record for record in read_records(folder)}
    _drop_half_a_line(folder / VICTIMS)
    write_text(folder / SETTINGS, json.dumps(audit.settings(), indent=1) + "\n")
    trials, before, turn = first_trials(audit), [], 0
    while trials:
        groups = batches(audit, victims, trials)
        for number, batch in enumerate(groups):
            yield Step(turn, number, len(groups), batch)
            # A batch of which a line is missing is attacked as a whole: with fewer rows, its sums
            # would be rounded in another way.
            if any(piece.key not in done for piece in batch):
                for record in attacked(audit, victims, batch, tick):
                    if _key(record) not in done:
                        append_line(folder / VICTIMS, record)
                        done[_key(record)] = record
            before += [done[piece.key] for piece in batch]
        trials, turn = next_trials(audit, lines(before)), turn + 1


def _key(record: dict[str, Any]) -> tuple[int, str, float, str]:
    return record["block"], record["obfuscation"], record["strength"], record["attacker"]


def _drop_half_a_line(path: Path) -> None:
    """Cut off what a power failure left of a line, so that the next one begins on its own."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        write_text(path, content[: content.rfind(b"\n") + 1].decode())
