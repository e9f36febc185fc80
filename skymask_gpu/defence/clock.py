"""``Clock``: the wall time of each phase of a round, logged and recorded for the profile."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from skymask_gpu.engine.profiling import phase

__all__ = ["Clock"]

_log = logging.getLogger(__name__)


@dataclass
class Clock:
    """The wall time of each phase, as the host sees it. A phase that comes again adds to its time.

    The clock never waits for the device. It need not, because each phase of a round ends with the
    host reading something that the device computed last.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time what runs inside, without making it a phase of the profile."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        _log.debug("%s: %.3f s", name, took)

    @contextmanager
    def phase(self, name: str, num_bytes: int = 0) -> Iterator[None]:
        """Time a part of the round, and record it for the profile.

        Args:
            name: the name of the phase.
            num_bytes: the number of bytes that it has to read and write.
        """
        with self.time(name), phase(name, num_bytes):
            yield
