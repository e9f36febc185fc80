"""Time and peak memory of a call."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["Measured", "measure", "resident"]

T = TypeVar("T")

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measured:
    """``seconds`` of each repeat, and the peak of memory in bytes above what was held before the first (None: unknown)."""

    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def measure(call: Callable[[], T], repeats: int, device: torch.device) -> tuple[T, Measured]:
    """The result of the last call, and what the calls cost; warm up before, and compare the result before using the times."""
    seconds = []
    held = _reset_peak(device)
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        result = call()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    peak = _peak(device)
    return result, Measured(seconds, None if held is None or peak is None else max(0, peak - held))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Start counting the peak anew; returns the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # glibc keeps what was freed: without this the peak would be measured from memory that is not in use
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")  # Linux: the peak of resident memory starts from the present
    except (OSError, AttributeError):
        return None
    return resident("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
