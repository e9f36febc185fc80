"""The one clock of a round: wall time by phase, which is recorded for the profile at the same time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from skymask_gpu.engine import ClientBlocks
from skymask_gpu.engine.profiling import phase

__all__ = ["Clock"]


@dataclass
class Clock:
    """Wall time by phase, as the host sees it. A phase that comes again adds to its time.

    Nothing waits for the device because of it: each phase of a round ends with the host reading something that the device
    computed last.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """The time of what runs inside, which no phase of the profile stands for."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def phase(self, name: str, *moved: Tensor | ClientBlocks | int) -> Iterator[None]:
        """The time of a part of the round that reads and writes ``moved`` (tensors, or numbers of bytes); profiled too."""
        with self.time(name), phase(name, *moved):
            yield
