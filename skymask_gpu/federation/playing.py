"""Play a federation's rounds and record them in a folder; a stopped run goes on where it was.

All randomness is drawn from (seed, round), so a run that was stopped and resumed is the same as one
that was not. On a CPU with the same number of threads, "the same" means to the byte. On a GPU
of the same kind with the same versions of PyTorch and cuDNN, convolutions are told to be
deterministic, and blocks of clients do not depend on what ran before, unless memory runs out; other
operations of a model of your own, and sums over more than 2,000 clients in clustering, may still
add in another order and change the last digits (not measured).
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from skymask_gpu.engine.numerics import deterministic_convolutions
from skymask_gpu.federation.record import metrics_line, times_line, write_rule_tensors
from skymask_gpu.federation.run_folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    TIMES,
    damaged,
    kept_lines,
    layout,
    read_checkpoint,
    write_checkpoint,
)
from skymask_gpu.federation.simulation import Federation, GlobalModel, Progress, RoundResult
from skymask_gpu.federation.tracking import TrackingConfig, followed
from skymask_gpu.federation.tracking.following import Follow
from skymask_gpu.io.files import append_line, write_text

__all__ = ["play"]

_Line = dict[str, Any]

# The names of a checkpoint's tensors begin with these.
_BUFFER, _RULE, _ATTACK = "buffer/", "rule/", "attack/"


def play(federation: Federation, folder: Path, progress: Progress = lambda text: None) -> Iterator[dict[str, Any]]:
    """Play the rounds that ``folder`` does not yet hold, and yield each one's record.

    Under torchrun every rank calls it; the first alone writes, and the others yield nothing.
    A record is on disk when it is yielded. A round after which the global model holds NaN or Inf is
    the last one: no later round could mend it. Its record says ``"diverged": true``. The run's
    tracker is told of every round after it is on disk.

    Args:
        federation: what plays; it may have played before.
        folder: the run's folder; :mod:`skymask_gpu.federation.run_folder` describes what it holds.
        progress: called with a text that says what is going on.

    Raises:
        ValueError: the folder holds another run, or one of its files is damaged; the error names
            the file and the remedy.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from skymask_gpu.federation import DataConfig, DefenceConfig, RunConfig
        >>> defence = DefenceConfig(rule="fedavg")
        >>> run = RunConfig(rounds=2, data=DataConfig(clients=10), defence=defence)
        >>> with TemporaryDirectory() as folder:
        ...     records = list(play(Federation.build(run), Path(folder)))
        ...     again = list(play(Federation.build(run), Path(folder)))  # nothing is left to play
        >>> len(records), len(again)
        (2, 0)
    """
    config = federation.config
    ranks = federation.ranks
    ranks.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    first, model, diverged, earlier = ranks.together(lambda: _resume(federation, folder))
    ranks.agree(first, f"{folder}: the round to go on from")
    ranks.on_first(lambda: write_text(folder / CONFIG, json.dumps(config.to_dict(), indent=2) + "\n"))
    with followed(config.tracking if ranks.is_first else TrackingConfig(), config.to_dict(), folder, earlier) as follow:
        if not diverged:
            yield from _rounds(federation, folder, first, model, progress, follow)


def _rounds(
    federation: Federation, folder: Path, first: int, model: GlobalModel, progress: Progress, follow: Follow
) -> Iterator[dict[str, Any]]:
    """Play the rounds from ``first`` on."""
    config, ranks = federation.config, federation.ranks
    for number in range(first, config.rounds):
        with deterministic_convolutions():
            played = federation.play_round(number, model, progress)
        model = played.model
        diverged = not model.is_finite()
        progress("testing")
        is_last = diverged or number + 1 == config.rounds
        times = times_line(number, played)
        record = ranks.on_first(partial(_write_lines, federation, folder, number, played, times, is_last, diverged))
        write_rule_tensors(folder, number, played, federation.malicious, writes=ranks.is_first)
        if (number + 1) % config.checkpoint_every == 0 or is_last:
            states = _prefixed(_RULE, federation.rule.state()) | _prefixed(_ATTACK, federation.attack.state())
            ranks.on_first(partial(write_checkpoint, folder, number, config, _model_tensors(model) | states))
        if record is not None:
            follow(record, times)
            yield record
        if diverged:
            return


def _write_lines(
    federation: Federation, folder: Path, number: int, played: RoundResult, times: _Line, is_last: bool, diverged: bool
) -> _Line:
    """Test the model, and write the round's lines; the round's record is returned.

    The lines are written before the checkpoint. It is then never ahead of the metrics, and lines
    ahead of the checkpoint are dropped when the run is resumed.
    """
    with deterministic_convolutions():
        record = metrics_line(federation, number, played, is_last=is_last, diverged=diverged)
    append_line(folder / TIMES, times)
    append_line(folder / METRICS, record)
    return record


def _resume(federation: Federation, folder: Path) -> tuple[int, GlobalModel, bool, list[tuple[_Line, _Line]]]:
    """The first round to play, the global model before it, and whether it has diverged.

    The last entry holds the records and times of the rounds before.
    """
    done, model = -1, federation.first_model()
    tensors: dict[str, Tensor] = {}
    if (folder / CHECKPOINT).exists():
        known = layout(_model_tensors(GlobalModel(model.params, model.buffers, previous=model.params)))
        done, tensors = read_checkpoint(folder, federation.config, known, (_RULE, _ATTACK))
        tensors = {name: tensor.to(model.params.device) for name, tensor in tensors.items()}
        model = GlobalModel(tensors["global_params"], _unprefixed(_BUFFER, tensors), tensors["previous_params"])
    # Needed without a checkpoint, too, because the federation may have played before.
    federation.rule.restore(_unprefixed(_RULE, tensors))
    federation.attack.restore(_unprefixed(_ATTACK, tensors))
    kept = kept_lines(folder, done, federation.config)
    diverged = bool(kept[METRICS]) and bool(kept[METRICS][-1].get("diverged", False))
    if not diverged and not model.is_finite():
        raise damaged(folder / CHECKPOINT, "the global model holds NaN or Inf, and no line of the metrics says so")
    for name, records in kept.items():
        if federation.ranks.is_first and (folder / name).exists():
            write_text(folder / name, "".join(json.dumps(record) + "\n" for record in records))
    times = {line["round"]: line for line in kept[TIMES]}
    return done + 1, model, diverged, [(record, times.get(record["round"], {})) for record in kept[METRICS]]


def _model_tensors(model: GlobalModel) -> dict[str, Tensor]:
    """The model's tensors as a checkpoint stores them."""
    before = {} if model.previous is None else {"previous_params": model.previous}
    return {"global_params": model.params, **before, **_prefixed(_BUFFER, model.buffers)}


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
