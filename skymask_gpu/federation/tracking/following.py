"""Follow a run with its tracker: every round once, and no error of the tracker ends the run.

The run's folder remembers in ``tracking.json`` which round each tracker has seen last. Rounds that
are played again after a resume are the same to the byte, so they need not be logged again; rounds
that were played without the tracker are logged when it comes.
"""

import copy
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skymask_gpu.federation.choices import with_settings
from skymask_gpu.federation.tracking.interface import TRACKERS, Tracker, TrackerContext, TrackingConfig
from skymask_gpu.io.files import write_text

__all__ = ["TRACKED", "export", "followed"]

TRACKED = "tracking.json"

Record = dict[str, Any]
Follow = Callable[[Record, Record], None]


@contextmanager
def followed(
    config: TrackingConfig,
    settings: dict[str, Any],
    folder: Path,
    earlier: Sequence[tuple[Record, Record]],
) -> Iterator[Follow]:
    """Give a function that the round's record and times are handed to while the run plays.

    Args:
        config: which tracker follows the run.
        settings: the run's settings as nested tables.
        folder: the run's folder.
        earlier: records and times of the rounds that are there already.
    """
    if config.tracker == "none":
        yield lambda record, times: None
        return
    tracked = _Tracked(config, settings, folder)
    tracked.try_to(tracked.start)
    for record, times in earlier:
        tracked.try_to(tracked.log, record, times)
    try:
        yield lambda record, times: tracked.try_to(tracked.log, record, times)
    finally:
        tracked.try_to(tracked.finish)


def export(config: TrackingConfig, settings: dict[str, Any], folder: Path, rounds: Sequence[tuple[Record, Record]]) -> None:
    """Hand all rounds of a run to a tracker, as a new run of the tracker's.

    Raises:
        ValueError: the tracker's package is missing.
        Exception: whatever the tracker raises.
    """
    tracked = _Tracked(config, settings, folder, anew=True)
    tracked.start()
    try:
        for record, times in rounds:
            tracked.log(record, times)
    finally:
        tracked.finish()


class _Tracked:
    """A run's tracker, and the round that it has seen last."""

    def __init__(self, config: TrackingConfig, settings: dict[str, Any], folder: Path, *, anew: bool = False) -> None:
        self._config, self._settings, self._folder = config, settings, folder
        self._states = _read_states(folder / TRACKED)
        if anew or config.tracker not in self._states:
            self._states[config.tracker] = {"id": secrets.token_hex(8), "round": -1}
        self._state = self._states[config.tracker]
        self._tracker: Tracker | None = None
        self._has_failed = False

    def try_to(self, do: Callable[..., None], *arguments: Any) -> None:
        """Call a method below; after the first error, which is a warning, nothing is called."""
        if self._has_failed:
            return
        try:
            do(*arguments)
        except Exception as error:
            self._has_failed = True
            why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            warnings.warn(
                f"tracking: {self._config.tracker} is switched off for {self._folder}, and the run goes on: {why}", stacklevel=4
            )

    def start(self) -> None:
        context = TrackerContext(
            folder=self._folder,
            name=str(self._settings.get("name", self._folder.name)),
            run_id=str(self._state["id"]),
            first_round=int(self._state["round"]) + 1,
        )
        self._tracker = with_settings(TRACKERS[self._config.tracker], self._config.settings, context)
        self._tracker.start(copy.deepcopy(self._settings))

    def log(self, record: Record, times: Record) -> None:
        if self._tracker is None or record["round"] <= self._state["round"]:
            return
        # It is written first: if the process dies in between, the round is lost to the tracker,
        # but does not come twice.
        self._state["round"] = record["round"]
        write_text(self._folder / TRACKED, json.dumps(self._states, indent=1) + "\n")
        seconds = {name: value for name, value in times.items() if name != "round"}
        # A copy, because a tracker must not be able to change what the run goes on with.
        self._tracker.log(record["round"], copy.deepcopy({**record, "seconds": seconds}))

    def finish(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def _read_states(path: Path) -> dict[str, dict[str, Any]]:
    """What the file holds of each tracker; a damaged entry counts as none."""
    try:
        states = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        name: state
        for name, state in (states.items() if isinstance(states, dict) else ())
        if isinstance(state, dict) and isinstance(state.get("id"), str) and type(state.get("round")) is int
    }
