"""``Clock``: the wall time of each phase of a round, logged and recorded for the profile."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from skymask_gpu.engine.profiling import phase

__all__ = ["Clock"]

_log = logging.getLogger(__name__)


@dataclass
class Clock:
    """The wall time of each phase, as the host sees it. A phase that comes again adds to its time.

    The clock never waits for the device. It need not, because each phase of a round but one ends
    with the host reading something that the device computed last. On a GPU, the host leaves the
    other one while the device still works. Its time is that between two events of the stream, and
    the next phase, whose last reading comes after both events, has only what is left of both.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    # The phase that was left before it was done: its name, the time until then, and its events.
    _left: tuple[str, float, torch.cuda.Event, torch.cuda.Event] | None = None

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time what runs inside, without making it a phase of the profile."""
        start = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - start)

    @contextmanager
    def phase(self, name: str, num_bytes: int = 0, *, is_read: bool = True) -> Iterator[None]:
        """Time a part of the round, and record it for the profile.

        Args:
            name: the name of the phase.
            num_bytes: the number of bytes that it has to read and write.
            is_read: whether it ends with the host reading what the device computed last. If not,
                the next phase has to.
        """
        begin = None if is_read or self.device.type != "cuda" else self._event()
        start = time.perf_counter()
        with phase(name, num_bytes):
            yield
        took = time.perf_counter() - start
        if begin is not None:
            self._left = name, took, begin, self._event()
            return
        if self._left is not None:
            left, host, first, last = self._left
            device = first.elapsed_time(last) / 1000
            self._add(left, device)
            took, self._left = took + host - device, None
        self._add(name, took)

    def _add(self, name: str, took: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        _log.debug("%s: %.3f s", name, took)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
