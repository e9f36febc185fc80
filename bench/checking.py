"""First calls and checks: which providers of a problem may be timed, and why the others may not."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from skymask_gpu.bench.cases import Problem
from skymask_gpu.bench.measure import limited_memory
from skymask_gpu.bench.points import Limits
from skymask_gpu.bench.providers import Provider, Truth, establish_truth
from skymask_gpu.bench.table import CannotRunError, status_of
from skymask_gpu.engine import TrainedMasks
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.peak_memory import give_back_freed

__all__ = ["Checker"]

# A first call may compile, so it is stopped only after this multiple of the longest call that is allowed.
_STOPPED_AFTER = 3

Columns = dict[str, Any]


class SlowError(BaseException):
    """The call takes too long. It is not an Exception because torch.compile catches those."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Stop what takes longer, between two lines of Python."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class First:
    """A provider's first call."""

    call: Callable[[], Any]
    result: Any
    seconds: float


class Checker:
    """Checks results, and remembers how long calls took."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.limits, self.device = limits, device
        # by case, dtype and provider: the number of clients, and the seconds of a call
        self._paces: dict[tuple[str, str, str], tuple[int, float]] = {}
        self._begin = time.monotonic()

    def truth(self, problem: Problem, chosen: list[Provider]) -> tuple[Truth, dict[str, First | Columns]]:
        """What the solvers are compared with, and the first calls that were made for it."""
        firsts: dict[str, First | Columns] = {}
        known = {provider.name: provider for provider in chosen}

        def first_result(name: str) -> TrainedMasks | None:
            if name not in known:
                return None
            firsts[name] = first = self.first(problem, known[name])
            return first.result if isinstance(first, First) else None

        try:
            with limited_memory(self.device), without_tf32():
                return establish_truth(problem, first_result), firsts
        except Exception as error:
            return Truth(error=error), firsts

    def first(self, problem: Problem, provider: Provider) -> First | Columns:
        """A provider's first call, or the columns that say why there is none."""
        if provider.name in self.limits.left_out:
            return {"status": "skipped", "detail": "it takes too long for a quick run"}
        if self.is_over():
            return {"status": "skipped", "detail": self.over()}
        clients, seconds = self._paces.get(_key(problem, provider), (1, 0.0))
        expected, limit = seconds * problem.num_clients / clients, self.limits.call_seconds
        if expected > limit:
            detail = f"about {expected:.2g} s a call expected from N = {clients:,}, the limit is {limit:g} s"
            return {"status": "skipped", "detail": detail}

        def first() -> First:
            call = provider.prepare(problem)
            return First(call, *self._call(call))

        return self._attempt(problem, provider, first)

    def checked(
        self, problem: Problem, provider: Provider, first: First | Columns | None, truth: Truth
    ) -> tuple[Columns, Callable[[], Any] | None]:
        """The columns that are known before a provider is timed, and the call if it may be timed."""
        first = first or self.first(problem, provider)
        if not isinstance(first, First):
            return first, None

        def check() -> tuple[Columns, Callable[[], Any] | None]:
            call, seconds, limit = first.call, first.seconds, self.limits.call_seconds
            self._paces[_key(problem, provider)] = (problem.num_clients, seconds)
            compared_with = provider.check(problem, first.result, truth)
            first.result = None
            if provider.timed is not None:
                call = provider.timed(problem)
                seconds = self._call(call)[1]
            # the first call may have compiled
            pace = seconds if seconds <= limit else self._call(call)[1]
            self._paces[_key(problem, provider)] = (problem.num_clients, pace)
            if pace > limit:
                raise CannotRunError(f"{pace:.2g} s a call, the limit is {limit:g} s")
            return {"first_s": first.seconds, "compared_with": compared_with}, call

        done = self._attempt(problem, provider, check)
        return (done, None) if isinstance(done, dict) else done

    def _attempt(self, problem: Problem, provider: Provider, action: Callable[[], Any]) -> Any:
        """What ``action`` returns, or the columns that say why it failed."""
        try:
            with limited_memory(self.device), without_tf32():
                return action()
        except SlowError:
            stopped = _STOPPED_AFTER * self.limits.call_seconds
            self._paces[_key(problem, provider)] = (problem.num_clients, stopped)
            return {"status": "skipped", "detail": f"stopped after {stopped:g} s"}
        except Exception as error:
            return status_of(error)

    def _call(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """A call's result and its seconds.

        Raises:
            SlowError: it takes too long.
        """
        self.give_back()
        start = time.perf_counter()
        with _at_most(_STOPPED_AFTER * self.limits.call_seconds):
            result = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return result, time.perf_counter() - start

    def note_pace(self, problem: Problem, provider: Provider, seconds: float) -> None:
        self._paces[_key(problem, provider)] = (problem.num_clients, seconds)

    def give_back(self) -> None:
        """Free memory goes back to the system: in pieces it might not do for the next call where memory is short."""
        give_back_freed()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def is_over(self) -> bool:
        return time.monotonic() - self._begin > self.limits.total_seconds

    def over(self) -> str:
        return f"the {self.limits.total_seconds:g} s of this run were spent"


def _key(problem: Problem, provider: Provider) -> tuple[str, str, str]:
    return problem.case.name, problem.dtype, provider.name
