"""This checkout against another revision of it: ``skymask-gpu bench --against REV``.

The revision is checked out into a throw-away git worktree, and its product code runs under today's
benchmark, in a process of its own. Each result is checked and compared with that of today's code.
The calls are then timed in turn, so that a slow spell of the machine falls on both.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.bench.cases import CASES
from skymask_gpu.bench.measure import sample
from skymask_gpu.bench.points import Limits, points
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.run import Runner
from skymask_gpu.bench.solvers import MOST_DIFFERING, MOST_LOSS_ERROR
from skymask_gpu.bench.table import Row
from skymask_gpu.engine import TrainedMasks
from skymask_gpu.federation.rules import RuleResult
from skymask_gpu.io.files import read_tensors, write_tensors

__all__ = ["measure_against"]

_LEAST_REPEATS, _MOST_REPEATS, _KNOWN_WITHIN = 7, 100, 0.05


def measure_against(revision: str, limits: Limits, started: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """A row per provider, with ``to_before``: its time over that at ``revision``.

    It is missing where results differ.

    Raises:
        ValueError: git knows no such revision, or the benchmark does not run on it.
    """
    with _package_of(revision) as package, TemporaryDirectory() as folder:
        for case, clients, dtype in points(limits):
            arguments, results = [case.name, str(clients), dtype, *limits.left_out], Path(folder) / case.name
            started(f"{case.name}: results of today")
            with closing(_Side("today", arguments, results / "today", None)) as today:
                started(f"{case.name}: results of {revision}")
                with closing(_Side(revision, arguments, results / "before", package)) as before:
                    yield from _compared(today, before, limits.repeat_seconds, started)


@contextmanager
def _package_of(revision: str) -> Iterator[Path]:
    """A folder with the revision as the package ``skymask_gpu``, with today's ``bench/``.

    It is laid out as ``setup.py`` does.
    """
    bench = Path(__file__).resolve().parent
    git = ["git", "-C", str(bench.parent)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise ValueError(f"--against must be a revision of the git checkout {bench.parent}, got {revision!r}: see git log")
    with TemporaryDirectory() as folder:
        tree, package = Path(folder) / "tree", Path(folder) / "path" / "skymask_gpu"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", tree, found.stdout.strip()], check=True)
        try:
            package.mkdir(parents=True)
            parts = [*(tree / "skymask_gpu").iterdir(), tree / "kernels", tree / "engine", bench]
            for part in parts:
                (package / part.name).symlink_to(part)
            yield package.parent
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)


class _Side:
    """The process of one revision, which waits for the name of a provider to time."""

    def __init__(self, name: str, arguments: list[str], folder: Path, path: Path | None) -> None:
        self._name, self._folder = name, folder
        folder.mkdir(parents=True)
        environment = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
        command = [sys.executable, "-P", "-m", "skymask_gpu.bench.against", str(folder), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        self.rows = [Row(**columns) for columns in self._read()]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"--against: the benchmark does not run on {self._name}; its error is printed above")
        return json.loads(line)

    def seconds(self, provider: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{provider}\n")
        return float(self._read())

    def result(self, provider: str) -> dict[str, Tensor]:
        return read_tensors(self._folder / f"{provider}.safetensors")[0]

    def close(self) -> None:
        self._process.communicate()


def _compared(today: _Side, before: _Side, seconds: float, started: Callable[[str], None]) -> Iterator[Row]:
    for row, other in zip(today.rows, before.rows, strict=True):
        started(f"{row.case}: {row.provider}")
        if row.status == "ok" and other.status != "ok":
            row.status, row.detail = other.status, f"before: {other.detail}"
        if row.status == "ok":
            difference = _difference(today.result(row.provider), before.result(row.provider))
            if difference is not None:
                row.status, row.detail = "wrong", f"results differ: {difference}"
        if row.status == "ok":
            _time(row, today, before, seconds)
        yield row


def _time(row: Row, today: _Side, before: _Side, seconds: float) -> None:
    """Time the two in turn until their ratio is known."""
    begin = time.monotonic()
    own: list[float] = []
    ratios: list[float] = []
    while len(ratios) < _LEAST_REPEATS or (len(ratios) < _MOST_REPEATS and time.monotonic() - begin < seconds):
        sides = (today, before) if len(ratios) % 2 else (before, today)
        taken = {side: side.seconds(row.provider) for side in sides}
        own.append(taken[today])
        ratios.append(taken[today] / taken[before])
        ratio = Ratio.of(ratios)
        if len(ratios) >= _LEAST_REPEATS and ratio is not None and ratio.is_within(_KNOWN_WITHIN):
            break
    row.set_times(own)
    row.set_ratio("to_before", Ratio.of(ratios))


def _difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> str | None:
    """In what two results differ by more than rounding, or None."""
    for name, tensor in got.items():
        other = want[name]
        if tensor.shape != other.shape:
            return f"{name} have the shapes {tuple(tensor.shape)} and {tuple(other.shape)}"
        if name == "bits":
            error, most = float(np.unpackbits((tensor ^ other).numpy()).mean()), MOST_DIFFERING
        else:
            error, most = float((tensor.double() - other.double()).norm() / other.double().norm()), MOST_LOSS_ERROR
        if not error <= most:
            return f"{error:.1e} of the {name}"
    return None


def _tensors(result: Any) -> dict[str, Tensor]:
    """What of a result is compared."""
    if isinstance(result, TrainedMasks):
        return {"bits": result.bits.cpu(), "losses": torch.tensor(result.losses, dtype=torch.float64)}
    update = result.update if isinstance(result, RuleResult) else result
    return {"parameters": update.detach().cpu().contiguous()}


def main(arguments: list[str]) -> None:
    """One side: print the checked rows as JSON, then the seconds of each provider asked for."""
    folder, name, clients, dtype, *left_out = arguments
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # In a new worktree, the first call of each kernel compiles it, which takes long.
    runner, case = Runner(Limits(left_out=tuple(left_out), call_seconds=120.0), device), CASES[name]
    rows, calls = [], {}
    for trial in runner.trials(runner.problem(case, int(clients), dtype)):
        rows.append(trial.row)
        if trial.call is not None:
            trial.row.status = "ok"
            calls[trial.row.provider] = trial.call
            write_tensors(Path(folder) / f"{trial.row.provider}.safetensors", _tensors(trial.call()))
    print(json.dumps([asdict(row) for row in rows]), flush=True)
    for line in sys.stdin:
        print(sample(calls[line.strip()], device), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
