"""Time and peak memory of a call."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch

from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.engine.peak_memory import peak_bytes, proc_field, resident, start_peak

__all__ = [
    "Floor",
    "Measured",
    "Phased",
    "StoppedError",
    "free_memory",
    "freed_memory_kept",
    "limited_memory",
    "measure_steadily",
    "sample",
]

_MEMINFO = Path("/proc/meminfo")

# A shorter call is timed several times per repeat: on a CPU one by one, at most this often; on a
# GPU all together.
_SHORTEST, _MOST_SAMPLES = 0.01, 5
_LEAST_REPEATS, _MOST_REPEATS = 7, 200
# A longer call spans both fast and slow spells of the machine, and getting back the memory that was
# given back is a small part of it. Its first time therefore counts, and fewer repeats do.
_LONG, _LEAST_LONG_REPEATS = 3.0, 5
# A ratio that is known to within this share is not measured any further.
_KNOWN_WITHIN = 0.05
# Each baseline takes at most this share of the time. On a CPU, a call shorter than one millisecond
# measures mostly how its threads wake up. A ratio to it would say little, so it is not used as a
# baseline.
_FLOOR_SHARE, _SHORTEST_FLOOR = 0.2, 1e-3
_CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


@dataclass(frozen=True)
class Measured:
    """What a call cost.

    Attributes:
        seconds: of each repeat.
        peak_bytes: the peak of memory above what was held before the first call; None: unknown.
        ratios: by baseline, the seconds of each repeat over those of the baseline before and after
            it.
        phases: the same of each phase of a call that knows its phases, without peaks.
    """

    seconds: list[float]
    peak_bytes: int | None
    ratios: dict[str, list[float]] = field(default_factory=dict)
    phases: "dict[str, Measured]" = field(default_factory=dict)


@runtime_checkable
class Phased(Protocol):
    """A call that knows what its phases took."""

    @property
    def phases(self) -> Mapping[str, float]:
        """The seconds of each phase of the latest call."""
        ...

    def __call__(self) -> object: ...


@dataclass(frozen=True)
class Floor:
    """A baseline: a call that does the same thing ``parts`` times.

    On a CPU, each of them must take a millisecond.
    """

    call: Callable[[], object]
    parts: int = 1


class StoppedError(KeyboardInterrupt):
    """Somebody pressed Ctrl-C; ``measured`` is what was measured until then."""

    def __init__(self, measured: "dict[str, Measured | Exception]") -> None:
        super().__init__()
        self.measured = measured


def measure_steadily(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    floors: Mapping[str, Floor] = MappingProxyType({}),
    *,
    is_over: Callable[[], bool] = lambda: False,
    started: Callable[[str], None] = lambda name: None,
) -> dict[str, Measured | Exception]:
    """What each call costs, or what it raised.

    The calls are repeated in rounds, so that no call's repeats all fall into one slow spell of the
    machine. A call takes part in at least 7 rounds (a long one in 5), and then until its ratios are
    known to within 5%, or its repeats took ``seconds``, or as long as the longest call. Once
    ``is_over()``, no repeat begins; calls without a repeat are missing in what is returned. The
    baselines ``floors`` are timed in between, each for at most a fifth of the time, and each repeat
    is divided by what they took before and after it, because other load comes and goes. On a CPU
    each call begins with empty caches, because it is chance whether the call before has left the
    updates there. ``started`` is told each call's name.

    Raises:
        StoppedError: a Ctrl-C meanwhile.
    """
    timings: dict[str, _Timing] = {}

    def measured() -> dict[str, Measured | Exception]:
        begun = {name: t for name, t in timings.items() if t.error or t.seconds}
        return {name: t.error or t.measured() for name, t in begun.items()}

    try:
        timed = [_TimedFloor(name, floor, device) for name, floor in floors.items()]
        yardsticks = [floor for floor in timed if floor.is_yardstick]
        for name, call in calls.items():
            if not is_over():
                started(name)
                timings[name] = _Timing(call, device, yardsticks)
                timings[name].begin()
        seconds = max([seconds, *(timing.first for timing in timings.values())])
        while (active := [name for name, timing in timings.items() if timing.wants_more(seconds)]) and not is_over():
            for name in active:
                if not is_over():
                    started(name)
                    timings[name].repeat()
        for floor in yardsticks:
            floor.settle()
    except KeyboardInterrupt:
        raise StoppedError(measured()) from None
    return measured()


@dataclass
class _Timing:
    """One call, the first time and its repeats."""

    call: Callable[[], object]
    device: torch.device
    yardsticks: "list[_TimedFloor]"
    first: float = 0.0
    peak: int | None = None
    spent: float = 0.0
    seconds: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, Measured] = field(default_factory=dict)
    error: Exception | None = None

    def measured(self) -> Measured:
        return Measured(self.seconds, self.peak, self.ratios, self.phases)

    def begin(self) -> None:
        """The first call, which measures the peak of memory.

        It also pays for the pages that were given back before, so only the time of a long call
        counts.
        """
        try:
            _empty_caches(self.device)
            held = start_peak(self.device)
            self.first = _time(self.call, self.device)
            self.peak = None if held is None else max(0, peak_bytes(self.device) - held)
        except Exception as error:
            self.error = error
        if self.first > _LONG:
            self._note(self.first)

    def repeat(self) -> None:
        start = time.perf_counter()
        try:
            taken = sample(self.call, self.device)
        except Exception as error:
            self.error = error
            return
        self.spent += time.perf_counter() - start
        self._note(taken)

    def _note(self, taken: float) -> None:
        self.seconds.append(taken)
        noted = [(self.ratios, taken)]
        if isinstance(self.call, Phased):
            for name, seconds in self.call.phases.items():
                phase = self.phases.setdefault(name, Measured([], None))
                phase.seconds.append(seconds)
                noted.append((phase.ratios, seconds))
        for floor in self.yardsticks:
            floor.note(noted)

    def wants_more(self, seconds: float) -> bool:
        if self.error is not None:
            return False
        repeats = len(self.seconds)
        if repeats < (_LEAST_LONG_REPEATS if self.first > _LONG else _LEAST_REPEATS):
            return True
        return repeats < _MOST_REPEATS and self.spent < seconds and not self._is_known()

    def _is_known(self) -> bool:
        known = [Ratio.of(ratios) for ratios in self.ratios.values()]
        return bool(known) and all(ratio is not None and ratio.is_within(_KNOWN_WITHIN) for ratio in known)


class _TimedFloor:
    """Times a baseline again and again, and keeps what was measured since the last time."""

    def __init__(self, name: str, floor: Floor, device: torch.device) -> None:
        self._name, self._call, self._device = name, floor.call, device
        self._waiting: list[tuple[dict[str, list[float]], float]] = []
        self._time(0.0)
        self._took_least = self._took
        self.is_yardstick = device.type != "cpu" or self._before >= floor.parts * _SHORTEST_FLOOR

    def note(self, repeat: list[tuple[dict[str, list[float]], float]]) -> None:
        """Note a repeat: the seconds of a call and its phases, and where their ratios go.

        The ratios follow when the baseline is timed next.
        """
        self._waiting += repeat
        passed = time.perf_counter() - self._end
        if passed * _FLOOR_SHARE >= self._took_least:
            self.settle(passed * _FLOOR_SHARE)

    def settle(self, least_seconds: float = 0.0) -> None:
        if self._waiting:
            before, waiting = self._before, self._waiting
            self._time(least_seconds)
            for ratios, seconds in waiting:
                ratios.setdefault(self._name, []).append(2 * seconds / (before + self._before))
            self._waiting = []

    def _time(self, least_seconds: float) -> None:
        start = time.perf_counter()
        self._before = sample(self._call, self._device, least_seconds)
        self._end = time.perf_counter()
        self._took = self._end - start


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have glibc keep what this process frees meanwhile; with other C libraries nothing happens.

    By default large blocks go back to Linux at once, and the next call pays for each page of new
    ones, in a virtual machine sometimes more than for its work. How many pages depends on what was
    freed before. Peaks of memory do not change, because :func:`measure_steadily` gives back what is
    free before it looks.
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


def sample(call: Callable[[], object], device: torch.device, least_seconds: float = 0.0) -> float:
    """Seconds of a call.

    A short one is called several times: on a CPU each time with empty caches, on a GPU together.
    """
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
    """Bytes that are free; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return proc_field(_MEMINFO, "MemAvailable")


@contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """Let allocations on a CPU fail once the memory that is free now is used up.

    Linux would end the process instead.
    """
    import resource

    free, held = free_memory(device), resident("VmData")
    if device.type == "cuda" or free is None or held is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    # A tenth of the free memory is left to other processes.
    limit = held + free * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _time(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call.

    No result outlives its call, so that it does not count as memory of the next one.
    """
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / calls


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
