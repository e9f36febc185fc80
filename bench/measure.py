"""Time and peak memory of a call."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch

from skymask_gpu.engine.peak_memory import peak_bytes, proc_field, resident, start_peak

__all__ = ["Measured", "free_memory", "freed_memory_kept", "limited_memory", "measure", "measure_steadily"]

T = TypeVar("T")

_MEMINFO = Path("/proc/meminfo")

# Shorter calls are timed several times for one repeat: on a CPU one by one, at most so often, on a GPU together.
_SHORTEST, _MOST_SAMPLES = 0.01, 9
# A call longer than the first is not repeated, one longer than the second less often.
_LONG, _LESS_OFTEN = 5.0, 0.2
_LEAST_REPEATS, _FEWER_REPEATS, _MOST_REPEATS = 5, 3, 50
# Of a call's time: how long a floor is timed beside it. A floor shorter than a millisecond is threads waking up, no yardstick.
_FLOOR_SHARE, _SHORTEST_FLOOR = 0.1, 1e-3
_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


@dataclass(frozen=True)
class Measured:
    """``seconds`` of each repeat, and the peak of memory in bytes above what was held before the first (None: unknown).

    ``ratios``: by the name of each floor, the seconds of each repeat over those of the floor right before and after it.
    """

    seconds: list[float]
    peak_bytes: int | None
    ratios: dict[str, list[float]] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


def measure(call: Callable[[], T], repeats: int, device: torch.device) -> tuple[T, Measured]:
    """The result of the last call, and what the calls cost; warm up before, and compare the result before using the times."""
    seconds = []
    held = start_peak(device)
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        result = call()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return result, Measured(seconds, _peak_above(held, device))


def measure_steadily(
    call: Callable[[], object],
    device: torch.device,
    seconds: float,
    floors: Mapping[str, Callable[[], object]] = MappingProxyType({}),
) -> Measured:
    """What a call costs, repeated until that took so many seconds: at least 5 times, 3 from 0.2 s on, a long one not.

    Before and after each repeat each floor is timed too, for a tenth of the call: what else a machine does comes and goes, and
    ratios are of what lies side by side.
    On a CPU each call begins with empty caches: whether the updates are still there from the call before is chance.
    """
    beside = {name: [_sample(floor, device)] for name, floor in floors.items()}
    _empty_caches(device)
    held = start_peak(device)
    first = _time(call, device)
    peak = _peak_above(held, device)  # before a floor could raise it
    times: list[float] = []

    def note(seconds_of_call: float) -> None:
        times.append(seconds_of_call)
        for name, floor in floors.items():
            beside[name].append(_sample(floor, device, first * _FLOOR_SHARE))

    if first > _LESS_OFTEN:
        note(first)
    least = 1 if first > _LONG else _FEWER_REPEATS if first > _LESS_OFTEN else _LEAST_REPEATS
    start = time.perf_counter()
    while len(times) < least or (first <= _LONG and len(times) < _MOST_REPEATS and time.perf_counter() - start < seconds):
        note(_sample(call, device))
    ratios = {
        name: [2 * own / (before + after) for own, (before, after) in zip(times, pairwise(found), strict=True)]
        for name, found in beside.items()
        if statistics.median(found) >= _SHORTEST_FLOOR
    }
    return Measured(times, peak, ratios)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have glibc keep what this process frees meanwhile; elsewhere nothing happens.

    By default large blocks go back to Linux at once, and the next call pays for each page of new ones, in a virtual machine
    sometimes more than for its work; how many they are depends on what was freed before. Peaks of memory stay what they are:
    :func:`measure_steadily` gives back what is free before it looks.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for option, default in ((_M_MMAP_MAX, 2**16), (_M_TRIM_THRESHOLD, 2**17), (_M_MMAP_THRESHOLD, 2**17)):
            mallopt(option, default)
        trim(0)


def _sample(call: Callable[[], object], device: torch.device, least_seconds: float = 0.0) -> float:
    """Seconds of a call; short ones are called several times: on a CPU each with empty caches, on a GPU all together."""
    wanted = max(_SHORTEST, least_seconds)
    if device.type != "cpu":
        seconds = _time(call, device)
        return seconds if seconds >= wanted else _time(call, device, math.ceil(wanted / seconds))
    samples: list[float] = []
    while sum(samples) < wanted and len(samples) < _MOST_SAMPLES:
        _empty_caches(device)
        samples.append(_time(call, device))
    return statistics.median(samples)


def _empty_caches(device: torch.device) -> None:
    """Overwrite twice what the last cache of a CPU holds."""
    if device.type == "cpu":
        _filler().add_(1)


@cache
def _filler() -> torch.Tensor:
    size = _CACHE_SIZE.read_text().strip() if _CACHE_SIZE.exists() else ""
    kibibytes = int(size[:-1]) if size.endswith("K") and size[:-1].isdecimal() else 32 * 1024
    return torch.zeros(2 * kibibytes * 1024 // 4)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return proc_field(_MEMINFO, "MemAvailable")


@contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """Let allocations on a CPU fail once what is free now is used up; Linux would end the process instead."""
    import resource

    free, held = free_memory(device), resident("VmData")
    if device.type == "cuda" or free is None or held is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    # a tenth stays for others
    limit = held + free * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _time(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one of so many calls; no result outlives its call, so that none counts as the next one's memory."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / calls


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_above(held: int | None, device: torch.device) -> int | None:
    return None if held is None else max(0, peak_bytes(device) - held)
