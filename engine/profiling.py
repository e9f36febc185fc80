"""Measures where a round's time, memory traffic and memory go, phase by phase.

Code that does the work says ``with phase("mask steps", updates_RP):``. While nobody records, this
costs one ``if``. Inside ``with recording(device) as record:`` it takes the time and the peak of
memory, and names the phase for torch.profiler. On a GPU, times are taken by events on the stream,
and the host waits only once, at the end. Phases nest: the time of an inner phase does not count for
the outer one, so that all times add up to the whole. On a CPU, the clock stands still while memory
is looked at.

Bytes are not measured but computed from sizes: each tensor that a phase has to read or write counts
once per read and once per write. What the phase moves beyond that (temporaries, a model's
activations) does not count, so bytes and shares of the bandwidth are lower bounds.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch

from skymask_gpu.engine.peak_memory import peak_bytes, restart_peak, start_peak

__all__ = ["OTHER", "PhaseCost", "Profile", "Recording", "copy_bandwidth", "phase", "recording"]

# The time that no phase accounts for is listed under this name.
OTHER = "other"

# The recording that phases are entered into, per thread and task; None while nobody records.
_current: "ContextVar[Recording | None]" = ContextVar("recording", default=None)
_OFF: AbstractContextManager[None] = nullcontext()

# 256 MiB do not fit in any cache, so a copy of them has to go through memory.
_COPY_BYTES = 2**28
# The bandwidth is that of the fastest of this number of copies.
_COPIES = 5


@dataclass(frozen=True)
class PhaseCost:
    """What all spans of one phase cost together. A span is one run of the phase.

    Attributes:
        seconds: the time, without that of phases inside this one.
        calls: the number of spans.
        num_bytes: the bytes that had to be moved at least, read plus written; 0 if not known.
        copy_share: bytes per second as a share of the copy bandwidth. It is a lower bound of the
            share that was reached. A value above 1 means that data stayed in the cache. None if the
            bytes are not known.
        peak_bytes: the most bytes that a span held beyond what was held when recording began,
            phases inside it included. None if the system does not tell.
    """

    seconds: float
    calls: int
    num_bytes: int
    copy_share: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Profile:
    """What was recorded.

    Attributes:
        phases: the phases by name, in the order in which they first began; the last one is
            ``"other"``, the time that no phase accounts for.
        seconds: the whole time, which is the sum over the phases; on a CPU without the time that
            looking at memory took.
        copy_bandwidth: bytes per second, read plus written, of a plain tensor copy on the same
            device in the same run.
    """

    phases: dict[str, PhaseCost]
    seconds: float
    copy_bandwidth: float

    @property
    def accounted(self) -> float:
        """The share of the whole time that phases other than ``"other"`` account for."""
        return 1 - self.phases[OTHER].seconds / self.seconds


class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


def phase(name: str, *moved: _HasBytes | int | Callable[[], int] | None) -> AbstractContextManager[None]:
    """Mark the code inside ``with phase(...):`` as one part of the work.

    Args:
        name: the name of the phase; several spans may have the same one.
        moved: what it has to read and write: tensors, or numbers of bytes, or functions that find
            such a number, which are called only while somebody records. None counts nothing.

    Example:
        >>> updates = torch.zeros(3, 5)
        >>> with recording(torch.device("cpu")) as record:
        ...     with phase("mean", updates):
        ...         mean = updates.mean(0)
        >>> cost = record.profile(bandwidth=1e10).phases["mean"]
        >>> cost.calls, cost.num_bytes
        (1, 60)
    """
    record = _current.get()
    return _OFF if record is None else record.phase(name, *moved)


def _bytes_of(moved: _HasBytes | int | Callable[[], int]) -> int:
    if isinstance(moved, int):
        return moved
    return moved() if callable(moved) else moved.nbytes


@dataclass
class _Span:
    name: str
    outer: int | None
    num_bytes: int
    begin: float | torch.cuda.Event
    end: float | torch.cuda.Event = math.nan
    peak: int = 0


@dataclass
class Recording:
    """The spans that were recorded so far. :func:`recording` makes one."""

    device: torch.device
    # The bytes held when recording began.
    _held: int | None
    _spans: list[_Span] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)
    # The time spent on looking at memory.
    _memory_seconds: float = 0.0

    @contextmanager
    def phase(self, name: str, *moved: _HasBytes | int | Callable[[], int] | None) -> Iterator[None]:
        """Record one span; see :func:`phase`."""
        # A CUDA graph that is being captured runs later, and events in it could not be read.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield
            return
        num_bytes = sum(_bytes_of(x) for x in moved if x is not None)
        self._note_peak()
        span = _Span(name, self._open[-1] if self._open else None, num_bytes, self._now())
        self._spans.append(span)
        self._open.append(len(self._spans) - 1)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            span.end = self._now()
            self._note_peak()
            self._open.pop()
            if span.outer is not None:
                outer = self._spans[span.outer]
                outer.peak = max(outer.peak, span.peak)

    def profile(self, bandwidth: float) -> Profile:
        """What all spans cost. To be called after they have ended; it waits for the device.

        Args:
            bandwidth: bytes per second of a plain copy, from :func:`copy_bandwidth`.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        own = [_seconds_between(span) for span in self._spans]
        total = own[0]
        for span in self._spans:
            if span.outer is not None:
                own[span.outer] -= _seconds_between(span)
        names = [*dict.fromkeys(span.name for span in self._spans if span.name != OTHER), OTHER]
        phases = {}
        for name in names:
            spans = [(span, seconds) for span, seconds in zip(self._spans, own, strict=True) if span.name == name]
            seconds = sum(seconds for _, seconds in spans)
            num_bytes = sum(span.num_bytes for span, _ in spans)
            share = num_bytes / seconds / bandwidth if num_bytes and seconds > 0 else None
            peak = None if self._held is None else max(0, max(span.peak for span, _ in spans) - self._held)
            phases[name] = PhaseCost(seconds, len(spans), num_bytes, share, peak)
        return Profile(phases, total, bandwidth)

    def _note_peak(self) -> None:
        """Credit the peak since the last change of phases to the innermost open phase."""
        if self._held is None:
            return
        start = time.perf_counter()
        if self._open:
            span = self._spans[self._open[-1]]
            span.peak = max(span.peak, peak_bytes(self.device))
        restart_peak(self.device)
        self._memory_seconds += time.perf_counter() - start

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter() - self._memory_seconds
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@contextmanager
def recording(device: torch.device, *, memory: bool = True) -> Iterator[Recording]:
    """Record the phases of the work inside, which runs on ``device``.

    Afterwards, :meth:`Recording.profile` tells what they cost; :func:`phase` has an example.
    Without ``memory``, only times are taken, and a peak that somebody else measures stays right.
    """
    record = Recording(device, start_peak(device) if memory else None)
    token = _current.set(record)
    try:
        with record.phase(OTHER):
            yield record
    finally:
        _current.reset(token)


def copy_bandwidth(device: torch.device) -> float:
    """The bytes per second, read plus written, of the fastest of five plain copies of 256 MiB."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    record = Recording(device, None)
    for _ in range(_COPIES + 1):
        with record.phase("copy"):
            target.copy_(source)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # The first copy does not count: it also pays for mapping the pages of the target.
    return 2 * _COPY_BYTES / min(_seconds_between(span) for span in record._spans[1:])


def _seconds_between(span: _Span) -> float:
    begin, end = span.begin, span.end
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return begin.elapsed_time(end) / 1000
