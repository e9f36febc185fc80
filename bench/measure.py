"""Time and peak memory of a call."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch

from skymask_gpu.engine.peak_memory import peak_bytes, proc_field, resident, start_peak

__all__ = ["Measured", "free_memory", "limited_memory", "measure", "measure_steadily"]

T = TypeVar("T")

_MEMINFO = Path("/proc/meminfo")

# Shorter calls are timed several at once.
_SHORTEST = 0.01
# A call longer than this is not repeated.
_LONG = 5.0
_LEAST_REPEATS, _MOST_REPEATS = 3, 50


@dataclass(frozen=True)
class Measured:
    """``seconds`` of each repeat, and the peak of memory in bytes above what was held before the first (None: unknown).

    ``ratios``: by the name of each floor, the seconds of each repeat over those of the floor right after it.
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
    """What a call costs, repeated until that took so many seconds: 3 to 50 times, a long call not at all; warm up before.

    After each repeat each floor is timed too: what else a machine does comes and goes; ratios are of what lies side by side.
    """
    held = start_peak(device)
    times = [_time(call, 1, device)]
    peak = _peak_above(held, device)  # before a floor could raise it
    calls = _calls_at_once(call, times[0], device)
    if calls > 1:
        times = [_time(call, calls, device)]
    floor_calls = {name: _calls_at_once(floor, _time(floor, 1, device), device) for name, floor in floors.items()}
    ratios: dict[str, list[float]] = {name: [] for name in floors}

    def compare() -> None:
        for name, floor in floors.items():
            ratios[name].append(times[-1] / _time(floor, floor_calls[name], device))

    compare()
    least = 1 if times[0] > _LONG else _LEAST_REPEATS
    while len(times) < least or (len(times) < _MOST_REPEATS and sum(times) * calls < seconds):
        times.append(_time(call, calls, device))
        compare()
    return Measured(times, peak, ratios)


def _calls_at_once(call: Callable[[], object], first: float, device: torch.device) -> int:
    """How many calls to time together, so that they take long enough; ``first``: the seconds of one."""
    if first >= _SHORTEST:
        return 1
    shortest = min(first, *(_time(call, 1, device) for _ in range(3)))
    return math.ceil(_SHORTEST / max(shortest, _SHORTEST / 10_000))


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


def _time(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of one call; no result outlives its call, so that none counts as the next one's memory."""
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
