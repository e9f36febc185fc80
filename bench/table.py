"""The benchmark's table: its rows, its CSV file, and which failure gives which status."""

import csv
import io
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.cli.info import versions
from skymask_gpu.engine.memory import is_out_of_memory
from skymask_gpu.io.files import write_text

__all__ = [
    "COPY",
    "RATIOS",
    "SEED",
    "CannotRunError",
    "NoCheckError",
    "NotTimedError",
    "Row",
    "WrongResultError",
    "conditions",
    "read_rows",
    "status_of",
    "write_rows",
]

# On a GPU, the provider whose bandwidth ``of_copy`` is relative to.
COPY = "copy"
# All that is random in a run follows from it.
SEED = 0
_KNOWN_BEFORE = ("params", "threads", "seed")
RATIOS = ("to_reference", "to_passes", "to_mean")


class NotTimedError(Exception):
    """Something is not timed; the message says why, and ``status`` is what its row says."""

    status = "failed"


class CannotRunError(NotTimedError):
    """It cannot run here."""

    status = "skipped"


class NoCheckError(NotTimedError):
    """There is nothing to compare its result with."""

    status = "no check"


class WrongResultError(NotTimedError):
    """Its result is wrong."""

    status = "wrong"


def status_of(error: Exception) -> dict[str, str]:
    """The columns ``status`` and ``detail`` of something that raised ``error``.

    >>> status_of(IndexError("no such row"))
    {'status': 'failed', 'detail': 'IndexError: no such row'}
    """
    if isinstance(error, NotTimedError):
        return {"status": error.status, "detail": str(error)}
    if is_out_of_memory(error):
        return {"status": "out of memory", "detail": str(error).splitlines()[0][:200]}
    return {"status": "failed", "detail": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


@dataclass(kw_only=True)
class Row:
    """One measurement. Seconds, bytes and ratios are None unless the status is ``"ok"``.

    Attributes:
        what: ``"solvers"``, ``"rules"``, or nothing for one that is only checked.
        provider: what was measured.
        status: ok, wrong (the result is wrong), skipped, no check, out of memory, or failed.
        detail: why the status is not ok.
        compared_with: what the result agreed with.
        first_s: seconds of the first call, compilation included.
        median_s: the median of the ``repeats``; ``p20_s`` and ``p80_s`` are the 20th and 80th
            percentile.
        peak_bytes: the peak above what was held before the call (the inputs are held before); None
            where the system does not tell.
        to_mean: the time over that of a mean of the same rows, measured before and after each
            repeat; ``to_passes`` over that of the model's forward and backward passes;
            ``to_reference`` over that of solver reference in the same round. None where the
            baseline takes less than a millisecond on a CPU, and after fewer than three repeats.
            ``..._low`` and ``..._high`` are the limits of the 95% interval.
        to_before: with ``--against REV``: the time over that of the same call at that revision.
        moved_bytes: what the operation has to read and write.
        of_copy: ``moved_bytes`` per second, relative to those of a plain copy.
        to_500: the median over that of the same provider with 500 clients.
    """

    case: str
    what: str
    model: str
    clients: int
    params: int | None
    dtype: str
    mask_steps: int
    root_samples: int
    provider: str
    status: str
    detail: str = ""
    compared_with: str = ""
    first_s: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None
    to_mean: float | None = None
    to_mean_low: float | None = None
    to_mean_high: float | None = None
    to_passes: float | None = None
    to_passes_low: float | None = None
    to_passes_high: float | None = None
    to_reference: float | None = None
    to_reference_low: float | None = None
    to_reference_high: float | None = None
    to_before: float | None = None
    to_before_low: float | None = None
    to_before_high: float | None = None
    moved_bytes: int | None = None
    of_copy: float | None = None
    to_500: float | None = None
    device: str = ""
    threads: int | None = None
    versions: str = ""
    commit: str = ""
    seed: int | None = None
    time: str = ""

    def set_times(self, seconds: list[float]) -> None:
        self.median_s, self.p20_s, self.p80_s = (float(np.quantile(seconds, share)) for share in (0.5, 0.2, 0.8))
        self.repeats = len(seconds)

    def without_measurements(self) -> Self:
        """A copy with only what is known before a call."""
        names = [f.name for f in fields(self) if f.type in (float | None, int | None) and f.name not in _KNOWN_BEFORE]
        nothing: dict[str, Any] = dict.fromkeys(names)
        return replace(self, **nothing)

    def ratio(self, name: str) -> Ratio | None:
        """A ratio (``"to_mean"``) with its interval."""
        value, low, high = (getattr(self, column) for column in (name, f"{name}_low", f"{name}_high"))
        return None if value is None else Ratio(value, low, high)

    def set_ratio(self, name: str, ratio: Ratio | None) -> None:
        if ratio is not None:
            for column, value in ((name, ratio.value), (f"{name}_low", ratio.low), (f"{name}_high", ratio.high)):
                setattr(self, column, value)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write the table, with the columns that compare rows: ``of_copy`` and ``to_500``."""
    timed = {(row.case, row.dtype, row.clients, row.provider): row for row in rows if row.median_s}
    for row in rows:
        if row.median_s:
            at_500 = timed.get((row.case, row.dtype, 500, row.provider))
            row.to_500 = row.median_s / at_500.median_s if at_500 and at_500.median_s else None
            copy = timed.get((row.case, row.dtype, row.clients, COPY))
            if row.moved_bytes and copy and copy.moved_bytes and copy.median_s:
                row.of_copy = row.moved_bytes / row.median_s / (copy.moved_bytes / copy.median_s)
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of :func:`write_rows`.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [f.name for f in fields(Row)]:
            raise ValueError(f"{path} has other columns than this benchmark writes, {reader.fieldnames}; move it away")
        return [Row(**{f.name: _parsed(record[f.name], f.type) for f in fields(Row)}) for record in reader]


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if not text:
        return None
    return float(text) if kind == float | None else int(text)


def conditions(device: torch.device) -> dict[str, Any]:
    """The columns that are the same for all rows of a run."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions() if number != "not installed"),
        "commit": _commit(),
        "seed": SEED,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors"


def _commit() -> str:
    """The commit of the checkout that this file is in; "unknown" for an installed package."""
    here = Path(__file__).resolve()
    try:
        git = ["git", "-C", str(here.parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
