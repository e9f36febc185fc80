"""What a tracker is: three methods, how it is registered, and what it is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.choices import Choice, Choices
from skymask_gpu.federation.tables import read_table

__all__ = ["TRACKERS", "Tracker", "TrackerContext", "TrackingConfig", "needed", "numbers", "tracking_for"]

# Every tracker by name. An entry is a class that is made once per run as tracker(context[,
# settings]), and has the methods of Tracker.
TRACKERS = Choices("tracking.tracker", common=("tracker",))


@dataclass(frozen=True, kw_only=True)
class TrackerContext:
    """The run that a tracker follows.

    Attributes:
        folder: the run's folder; a tracker that writes files puts them into a folder of it.
        name: the run's name.
        run_id: 16 hexadecimal digits, the same after each resume, and others for each new run.
        first_round: the first round that will be logged; above 0 after a resume.
    """

    folder: Path
    name: str
    run_id: str
    first_round: int


class Tracker(Protocol):
    """A tracker. An error in any of its methods ends tracking with a warning, and not the run.

    Example, a plugin that writes a line per round:
        >>> from skymask_gpu.federation.tracking import TRACKERS
        >>> @TRACKERS.register("accuracies")
        ... class Accuracies:
        ...     def __init__(self, context):
        ...         self.path = context.folder / "accuracies.txt"
        ...     def start(self, settings):
        ...         self.file = self.path.open("a")
        ...     def log(self, round, metrics):
        ...         print(round, metrics["accuracy"], file=self.file, flush=True)
        ...     def finish(self):
        ...         self.file.close()
        >>> TRACKERS.remove("accuracies")
    """

    def start(self, settings: dict[str, Any]) -> None:
        """Begin, or go on after a resume, with the run's settings as nested tables."""
        ...

    def log(self, round: int, metrics: dict[str, Any]) -> None:
        """Take one round, numbered from 0. No round comes twice, not even after a resume.

        ``metrics`` is the round's line of ``metrics.jsonl``, and under ``"seconds"`` that of
        ``times.jsonl``. :func:`numbers` makes a flat table of numbers of it.
        """
        ...

    def finish(self) -> None:
        """The run has ended, or was stopped."""
        ...


@TRACKERS.register("none")
class _NoTracker:
    """It is never made: nobody follows the run."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Choice):
    """``[tracking]``: who follows the run. It changes no result, and a resume may change it.

    Attributes:
        tracker: key of :data:`TRACKERS`.
        settings: the tracker's own keys; None means their defaults.
    """

    registry: ClassVar[Choices] = TRACKERS
    key: ClassVar[str] = "tracker"
    table: ClassVar[str] = "tracking"

    tracker: str = "none"


def tracking_for(name: str, settings: dict[str, Any]) -> TrackingConfig:
    """The tracker ``name`` with the settings of a run that has chosen it, or else its defaults.

    Raises:
        ValueError: there is no such tracker.
    """
    if name not in TRACKERS or name == "none":
        one_of("--to", name, [one for one in TRACKERS if one != "none"])
    chosen = settings.get("tracking", {})
    same = isinstance(chosen, dict) and chosen.get("tracker") == name
    return read_table(TrackingConfig, chosen if same else {"tracker": name}, "the run's settings", "tracking.")


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a round by name: those of inner tables, and how many clients were rejected.

    Texts, lists of values per client, and what was not measured are left out.

    Example:
        >>> numbers({"accuracy": 0.5, "rejected": [4, 7], "seconds": {"aggregation": 0.1}})
        {'accuracy': 0.5, 'rejected': 2.0, 'seconds/aggregation': 0.1}
    """
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": number for inner, number in numbers(value).items()}
        elif key == "rejected" and isinstance(value, list):
            flat[key] = float(len(value))
        elif isinstance(value, bool | int | float) and key != "round":
            flat[key] = float(value)
    return flat


def needed(package: str, remedy: str) -> ValueError:
    """The error of a tracker whose package is missing."""
    return ValueError(f"it needs the package {package}: {remedy}")
