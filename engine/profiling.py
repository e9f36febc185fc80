"""Where a round's time, traffic and memory go: phases that are recorded while somebody asks for it, and cost one ``if`` else.

Code that does the work says ``with phase("mask steps", updates_RP):``. Inside ``with recording(device) as record:`` this takes
times (on a GPU by events on the stream; the one wait is at the end) and peaks of memory, and names the phase for
torch.profiler. Phases nest: an inner one's time is not the outer one's, so that times add up to the whole. On a CPU the clock
stands still while memory is looked at.

Bytes are computed from sizes, not measured: of the tensors that a phase has to read or write, each once for each time. What it
moves beyond that (temporaries, a model's activations) does not count, so bytes, and shares of the bandwidth, are lower bounds.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

import torch

from skymask_gpu.engine.peak_memory import peak_bytes, restart_peak, start_peak

__all__ = ["OTHER", "PhaseCost", "Profile", "Recording", "copy_bandwidth", "phase", "recording"]

# What no phase accounts for.
OTHER = "other"

# A copy of so many bytes fits in no cache; the fastest of so many is the bandwidth.
_COPY_BYTES = 2**28
_COPIES = 5


@dataclass(frozen=True)
class PhaseCost:
    """What the spans of one name cost together.

    Attributes:
        seconds: without those of phases inside it.
        calls: how many spans.
        num_bytes: that had to be moved at least, read plus written; 0: not known.
        copy_share: ``num_bytes`` a second over the copy bandwidth, a lower bound of the share that was reached; above 1 is
            what stayed in the cache. None: the bytes are not known.
        peak_bytes: the most held in one of them, phases inside it included, beyond what was held when recording began; None:
            the system does not tell.
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
        phases: by name, in the order in which they first began; the last is ``"other"``, what no phase accounts for.
        seconds: the whole, which is the sum over the phases; on a CPU without what looking at memory took.
        copy_bandwidth: bytes a second, read plus written, of a plain tensor copy on the same device in the same run.
    """

    phases: dict[str, PhaseCost]
    seconds: float
    copy_bandwidth: float

    @property
    def accounted(self) -> float:
        """The share of the whole that phases other than ``"other"`` account for."""
        return 1 - self.phases[OTHER].seconds / self.seconds


class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


def phase(name: str, *moved: _HasBytes | int | None) -> AbstractContextManager[None]:
    """A part of the work; what it has to read and write is ``moved``: tensors, or numbers of bytes."""
    record = _current.get()
    return _OFF if record is None else record.phase(name, *moved)


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
    """The spans so far; :func:`recording` makes it."""

    device: torch.device
    _held: int | None
    _spans: list[_Span] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)
    _memory_seconds: float = 0.0  # spent on looking at memory

    @contextmanager
    def phase(self, name: str, *moved: _HasBytes | int | None) -> Iterator[None]:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield  # a CUDA graph runs later, and its events could not be read
            return
        num_bytes = sum(x if isinstance(x, int) else x.nbytes for x in moved if x is not None)
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
        """What the spans cost, once all have ended; waits for the device. ``bandwidth``: see :func:`copy_bandwidth`."""
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
        """The peak since the last change of phases is that of the innermost open one."""
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
def recording(device: torch.device) -> Iterator[Recording]:
    """Record the phases of the work inside, which runs on ``device``; afterwards ask for its :meth:`Recording.profile`."""
    record = Recording(device, start_peak(device))
    token = _current.set(record)
    try:
        with record.phase(OTHER):
            yield record
    finally:
        _current.reset(token)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of a plain copy of a tensor of 256 MiB: the fastest of five."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    record = Recording(device, None)
    for _ in range(_COPIES + 1):
        with record.phase("copy"):
            target.copy_(source)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # the first one also pays for the target's pages
    return 2 * _COPY_BYTES / min(_seconds_between(span) for span in record._spans[1:])


def _seconds_between(span: _Span) -> float:
    begin, end = span.begin, span.end
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return begin.elapsed_time(end) / 1000


_current: ContextVar[Recording | None] = ContextVar("recording", default=None)
_OFF: AbstractContextManager[None] = nullcontext()
