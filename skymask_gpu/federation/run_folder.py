"""A run's folder: its files, its checkpoint, and the lines that a resumed run goes on from.

| file | what |
| --- | --- |
| ``config.json`` | the run's settings |
| ``metrics.jsonl`` | one line per round, the same in every repeat |
| ``times.jsonl`` | one line per round |
| ``checkpoint.safetensors`` | what the next round starts from |
| ``masks.safetensors`` | what the rule stores of the last round; SkyMask stores PCA scores and evidence |
| ``tracking.json`` | the round that each tracker has seen last, if there is one |

A file that somebody damaged is refused with an error that names it and the remedy; nothing is
dropped without a word.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.tracking.following import TRACKED
from skymask_gpu.io.files import read_lines, read_metadata, read_tensors, write_tensors

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "MASKS",
    "METRICS",
    "TIMES",
    "check_same_run",
    "clear_results",
    "damaged",
    "has_results",
    "is_whole",
    "kept_lines",
    "layout",
    "read_checkpoint",
    "read_start",
    "write_checkpoint",
]

CHECKPOINT, CONFIG, MASKS, METRICS, TIMES = (
    "checkpoint.safetensors",
    "config.json",
    "masks.safetensors",
    "metrics.jsonl",
    "times.jsonl",
)
_REMEDY = "put a sound copy in its place, or start anew with --overwrite"


def has_results(folder: Path) -> bool:
    """Whether rounds were recorded in ``folder``."""
    return (folder / METRICS).exists() or (folder / CHECKPOINT).exists()


def is_whole(folder: Path, rounds: int) -> bool:
    """Whether ``folder`` holds all rounds of a run, and the checkpoint of the last one.

    A run that was killed between the last line of its metrics and the checkpoint has to play on:
    whoever starts from its checkpoint would find an older model, or none. No tensor is read.
    """
    try:
        lines = read_lines(folder / METRICS)
        number = int(read_metadata(folder / CHECKPOINT)["round"]) if lines else -1
    except (ValueError, KeyError, OSError):
        # Something is missing or damaged. Playing on says what, and names the remedy.
        return False
    return len(lines) >= rounds and lines[-1]["round"] == number


def clear_results(folder: Path) -> None:
    """Remove what a run wrote into ``folder``, and nothing else."""
    for name in (CHECKPOINT, CONFIG, METRICS, TIMES, MASKS, TRACKED):
        (folder / name).unlink(missing_ok=True)


def write_checkpoint(folder: Path, number: int, config: RunConfig, tensors: dict[str, Tensor]) -> None:
    """Write the checkpoint from which the round after ``number`` starts."""
    about = {"round": str(number), "config": json.dumps(_settings(config)), "layout": json.dumps(layout(tensors))}
    write_tensors(folder / CHECKPOINT, tensors, about)


def read_checkpoint(
    folder: Path, config: RunConfig, known: dict[str, str], state_prefixes: tuple[str, ...]
) -> tuple[int, dict[str, Tensor]]:
    """The round after which the checkpoint was written, and its tensors.

    Args:
        known: the :func:`layout` that the model's tensors must have.
        state_prefixes: what the names of all other tensors begin with; they must be as they were
            written.

    Raises:
        ValueError: the file is damaged, or of a run with other settings than ``config``.
    """
    path = folder / CHECKPOINT
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    about = _Checkpoint.read(path, metadata)
    _refuse_other_settings(about.settings, config, folder)
    found = layout(tensors)
    state = {name: kind for name, kind in (about.layout or found).items() if name.startswith(state_prefixes)}
    wanted = known | state
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            raise damaged(path, f"{name} must be {wanted.get(name, 'absent')}, it is {found.get(name, 'missing')}")
    return about.round, tensors


def read_start(path: Path, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """The global model in the checkpoint of another run, from which a run starts.

    Args:
        path: the checkpoint; what it holds of rules and attacks is not read.
        known: the tensors of a fresh model under their names in a checkpoint.

    Raises:
        ValueError: the file is missing or damaged, or holds another model.
    """
    remedy = "give start the checkpoint.safetensors of a run with the same model and data set"
    try:
        tensors, _ = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"start: {error}; {remedy}") from error
    found = layout(tensors)
    for name, wanted in layout(known).items():
        if found.get(name) != wanted:
            raise ValueError(f"start: {name} in {path} must be {wanted}, it is {found.get(name, 'missing')}; {remedy}")
    return {name: tensors[name].to(tensor.device) for name, tensor in known.items()}


def check_same_run(config: RunConfig, folder: Path) -> None:
    """Raise a ValueError if the checkpoint in ``folder`` is damaged or has other settings."""
    path = folder / CHECKPOINT
    if path.exists():
        try:
            metadata = read_metadata(path)
        except ValueError as error:
            raise ValueError(f"{error}; {_REMEDY}") from error
        _refuse_other_settings(_Checkpoint.read(path, metadata).settings, config, folder)


def _refuse_other_settings(before: dict[str, Any], config: RunConfig, folder: Path) -> None:
    now = _settings(config)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}); use another folder or --overwrite")


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide how a run goes on."""
    settings = config.to_dict()
    del settings["rounds"], settings["checkpoint_every"], settings["plugins"], settings["data"]["data_dir"]
    # Checkpoints of versions without these settings hold none, which is the same as their defaults.
    if not settings["start"]:
        del settings["start"]
    if (settings["attack"]["first_round"], settings["attack"]["last_round"]) == (0, -1):
        del settings["attack"]["first_round"], settings["attack"]["last_round"]
    del settings["tracking"]
    return settings


def kept_lines(folder: Path, done: int, config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics and times up to round ``done``, by file; nothing is written.

    Lines of later rounds are left out with a warning: their rounds are played again, and the same
    lines come out.

    Raises:
        ValueError: a line is damaged or missing, or the checkpoint is.
    """
    checkpoint = folder / CHECKPOINT
    metrics = read_lines(folder / METRICS)
    try:
        times = read_lines(folder / TIMES)
    except ValueError as error:
        raise ValueError(f"{error}, or remove the file: a run goes on without its times") from error
    kept = [record for record in metrics if record["round"] <= done]
    rounds = [record["round"] for record in kept]
    if rounds != list(range(done + 1)):
        lost = sorted(set(range(done + 1)) - set(rounds))
        what = f"lacks rounds that {checkpoint} has ({_some(lost)})" if lost else "has a round twice or out of order"
        raise ValueError(f"{folder / METRICS} {what}; put them back, use another folder or start anew with --overwrite")
    dropped = sorted({record["round"] for record in metrics} - set(rounds))
    if dropped and done < 0 and len(dropped) > _checkpoint_every(folder, config):
        raise ValueError(
            f"{folder / METRICS} has {len(dropped)} rounds, but {checkpoint}, which they are continued from, is missing; "
            "put it back, or start anew with --overwrite"
        )
    if dropped:
        since = f"the checkpoint of round {done}" if done >= 0 else "the first checkpoint"
        warnings.warn(
            f"{folder}: the run was stopped after {since} was due; it plays round {_some(dropped)} again", stacklevel=3
        )
    return {METRICS: kept, TIMES: [record for record in times if record["round"] <= done]}


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _checkpoint_every(folder: Path, config: RunConfig) -> int:
    """The ``checkpoint_every`` of the run that wrote the folder, which may not be this run's."""
    try:
        return int(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["checkpoint_every"])
    except (OSError, ValueError, KeyError, TypeError):
        return config.checkpoint_every


@dataclass(frozen=True)
class _Checkpoint:
    """The round after which it was written, and the settings of its run."""

    round: int
    settings: dict[str, Any]
    layout: dict[str, str] | None  # It is None in a checkpoint that an older version wrote.

    @classmethod
    def read(cls, path: Path, metadata: dict[str, str]) -> "_Checkpoint":
        """Read it from the file's metadata.

        Raises:
            ValueError: the metadata are not those of a checkpoint.
        """
        try:
            number, settings = int(metadata["round"]), json.loads(metadata["config"])
            layout = json.loads(metadata["layout"]) if "layout" in metadata else None
        except (KeyError, ValueError) as error:
            raise damaged(path, f"its metadata must hold a round and the run's settings ({error!r})") from error
        if number < 0:
            raise damaged(path, f"its round must be at least 0, got {number}")
        if not isinstance(settings, dict) or not isinstance(layout, dict | None):
            raise damaged(path, "its metadata must hold the run's settings as a JSON object")
        return cls(number, settings, layout)


def damaged(path: Path, what: str) -> ValueError:
    """The error, with its remedy, of a checkpoint from which a run cannot go on."""
    return ValueError(f"{path} is damaged: {what}; {_REMEDY}")


def layout(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The type and shape of each tensor, by name; with them, a lost tensor is noticed."""
    return {name: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
