"""The runner: cases x clients x providers.

Each result is checked before it is timed; each measurement is a row.
"""

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import torch

from skymask_gpu.bench.cases import Case, Model, Problem
from skymask_gpu.bench.measure import Floor, Measured, StoppedError, free_memory, limited_memory, measure_steadily
from skymask_gpu.bench.points import Limits, points
from skymask_gpu.bench.providers import Call, Provider, Truth, establish_truth, providers
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.table import CannotRunError, Row, conditions, status_of
from skymask_gpu.engine import TrainedMasks
from skymask_gpu.engine.numerics import without_tf32
from skymask_gpu.engine.peak_memory import give_back_freed

__all__ = ["Runner", "Trial", "count_rows", "measure_cases"]

# A first call may compile, so it is stopped only after this multiple of the longest call that is
# allowed.
_STOPPED_AFTER = 3


def measure_cases(limits: Limits, device: torch.device, started: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Rows as they are measured; ``started`` is told what comes next."""
    runner = Runner(limits, device, started=started)
    for case, num_clients, dtype in points(limits):
        yield from runner.point(case, num_clients, dtype)


def count_rows(limits: Limits) -> int:
    return sum(1 + len(one.phases) for case, _, _ in points(limits) for one in providers(case))


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
class Trial:
    """A provider on a problem, and its row, which is filled as more is known.

    Attributes:
        call: what is timed; None if it may not be.
        result: that of the first call, until it is checked.
    """

    problem: Problem
    provider: Provider
    row: Row
    call: Call | None = None
    result: Any = None

    @property
    def label(self) -> str:
        return f"{self.row.case}, N = {self.row.clients:,}, {self.row.dtype}: {self.row.provider}"

    def give_up(self, status: str, detail: str) -> None:
        self.call, self.result = None, None
        self.row.status, self.row.detail, self.row.first_s, self.row.compared_with = status, detail, None, ""

    def fill(self, measured: Measured, reference: Measured | Exception | None) -> None:
        """The columns of what was timed."""
        row, provider = self.row, self.provider
        row.status = "ok"
        row.set_times(measured.seconds)
        row.peak_bytes = measured.peak_bytes
        for baseline in provider.baselines:
            row.set_ratio(baseline, Ratio.of(measured.ratios.get(baseline, [])))
        if provider.baseline:
            row.set_ratio(provider.baseline, Ratio(1.0, 1.0, 1.0))
        else:
            row.set_ratio("to_reference", _to_reference(measured, reference))
        if provider.moved_bytes is not None:
            row.moved_bytes = provider.moved_bytes(self.problem)


class Runner:
    """Measures points, and remembers the models and how long calls took."""

    def __init__(
        self,
        limits: Limits,
        device: torch.device,
        providers_of: Callable[[Case], list[Provider]] | None = None,
        started: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.limits, self.device, self.started = limits, device, started
        self._providers_of = providers_of or providers
        self._models: dict[str, Model] = {}
        # by case, dtype and provider: the number of clients, and the seconds of a call
        self._paces: dict[tuple[str, str, str], tuple[int, float]] = {}
        self._begin = time.monotonic()
        self._conditions = conditions(device)

    def point(self, case: Case, num_clients: int, dtype: str) -> Iterator[Row]:
        """All rows of a case with this number of clients and updates of this type."""
        self.started(f"{case.name}, N = {num_clients:,}, {dtype}: updates")
        try:
            problem = self.problem(case, num_clients, dtype)
        except Exception as error:
            for provider in self._providers_of(case):
                yield from _with_phases(self._row(case, num_clients, dtype, provider, **status_of(error)), provider, None)
            return
        floors: dict[str, Floor] = {}
        trials: list[Trial] = []
        for trial in self.trials(problem):
            trials.append(trial)
            if trial.call is not None and trial.provider.baseline:
                floors[trial.provider.baseline] = Floor(trial.call, trial.provider.parts(problem))
            if not self.limits.side_by_side:
                yield from self._timed(trials, floors)
                trials = []
            # The next provider needs the memory that this one holds.
            del trial
        yield from self._timed(trials, floors)

    def problem(self, case: Case, num_clients: int, dtype: str) -> Problem:
        """The updates, and the model, which is made once per case.

        Raises:
            NotTimedError: the time is over, or the updates are too large.
        """
        self._give_back()
        if self._is_over():
            raise CannotRunError(self._over())
        with self._guarded():
            if case.name not in self._models:
                self._models[case.name] = Model.build(case, self.device)
            # on a GPU, running out of memory is an error like any other
            free = free_memory(self.device) if self.device.type == "cpu" else None
            return Problem.build(case, self._models[case.name], num_clients, free).to(dtype)

    def _row(self, case: Case, num_clients: int, dtype: str, provider: Provider, **columns: Any) -> Row:
        model = self._models.get(case.name)
        return Row(
            case=case.name,
            what=case.what,
            model=case.model,
            clients=num_clients,
            params=model.loss.num_params if model else None,
            dtype=dtype,
            mask_steps=case.mask_steps,
            root_samples=case.root_samples,
            provider=provider.name,
            **{"status": "", **columns},
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            **self._conditions,
        )

    # --- first calls and checks -------------------------------------------------------------------

    def trials(self, problem: Problem) -> Iterator[Trial]:
        """Each provider, checked."""
        case, clients, dtype = problem.case, problem.num_clients, problem.dtype
        chosen = self._providers_of(case)
        waiting = {one.name: Trial(problem, one, self._row(case, clients, dtype, one)) for one in chosen}

        def first_result(name: str) -> TrainedMasks | None:
            if name not in waiting:
                return None
            self._call_first(waiting[name])
            return waiting[name].result

        try:
            with self._guarded():
                truth = establish_truth(problem, first_result)
        except Exception as error:
            truth = Truth(error=error)
        for name in list(waiting):
            trial = waiting.pop(name)
            self.started(trial.label)
            if trial.call is None and not trial.row.status:
                self._call_first(trial)
            if trial.call is not None:
                self._check(trial, truth)
            yield trial

    def _call_first(self, trial: Trial) -> None:
        clients, seconds = self._paces.get(_key(trial), (1, 0.0))
        expected, limit = seconds * trial.problem.num_clients / clients, self.limits.call_seconds
        if trial.provider.name in self.limits.left_out:
            trial.give_up("skipped", "it takes too long for a quick run")
        elif self._is_over():
            trial.give_up("skipped", self._over())
        elif expected > limit:
            wanted = f"about {expected:.2g} s a call expected from N = {clients:,}"
            trial.give_up("skipped", f"{wanted}, the limit is {limit:g} s")
        else:
            with self._failures_noted(trial):
                trial.call = trial.provider.prepare(trial.problem)
                trial.result, trial.row.first_s = self._timed_call(trial.call)
                self._note_pace(trial, trial.row.first_s)

    def _check(self, trial: Trial, truth: Truth) -> None:
        """Compare the first result; then find out whether the call is short enough to be timed."""
        provider, limit = trial.provider, self.limits.call_seconds
        with self._failures_noted(trial):
            trial.row.compared_with = provider.check(trial.problem, trial.result, truth)
            trial.result = None
            seconds = trial.row.first_s or 0.0
            if provider.timed is not None:
                trial.call = provider.timed(trial.problem)
                seconds = self._timed_call(trial.call)[1]
            # The first call may have compiled kernels, so only the second shows the pace.
            if seconds > limit:
                seconds = self._timed_call(trial.call)[1]
            self._note_pace(trial, seconds)
            if seconds > limit:
                raise CannotRunError(f"{seconds:.2g} s a call, the limit is {limit:g} s")

    @contextmanager
    def _failures_noted(self, trial: Trial) -> Iterator[None]:
        try:
            with self._guarded():
                yield
        except SlowError:
            stopped = _STOPPED_AFTER * self.limits.call_seconds
            self._note_pace(trial, stopped)
            trial.give_up("skipped", f"stopped after {stopped:g} s")
        except Exception as error:
            trial.give_up(**status_of(error))

    def _timed_call(self, call: Any) -> tuple[Any, float]:
        """A call's result and its seconds.

        Raises:
            SlowError: it takes too long.
        """
        self._give_back()
        start = time.perf_counter()
        with _at_most(_STOPPED_AFTER * self.limits.call_seconds):
            result = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return result, time.perf_counter() - start

    def _note_pace(self, trial: Trial, seconds: float) -> None:
        self._paces[_key(trial)] = (trial.problem.num_clients, seconds)

    # --- times ------------------------------------------------------------------------------------

    def _timed(self, trials: list[Trial], floors: Mapping[str, Floor]) -> Iterator[Row]:
        """Time those that may be timed side by side; then the rows of all."""
        labels = {trial.provider.name: trial.label for trial in trials}
        calls = {trial.provider.name: trial.call for trial in trials if trial.call is not None}
        stopped: StoppedError | None = None
        measured: Mapping[str, Measured | Exception]
        try:
            with self._guarded():
                measured = measure_steadily(
                    calls,
                    self.device,
                    self.limits.repeat_seconds,
                    floors if calls else {},
                    is_over=self._is_over,
                    started=lambda name: self.started(labels[name]),
                )
        except StoppedError as reason:
            measured, stopped = reason.measured, reason
        except Exception as error:  # of a floor
            measured = dict.fromkeys(calls, error)
        for trial in trials:
            own = measured.get(trial.provider.name)
            if isinstance(own, Measured):
                self._note_pace(trial, statistics.median(own.seconds))
                trial.fill(own, measured.get("reference"))
            elif own is not None:
                trial.give_up(**status_of(own))
            elif trial.call is not None:
                trial.row.status, trial.row.detail = "skipped", "stopped" if stopped else self._over()
            yield from _with_phases(trial.row, trial.provider, own if isinstance(own, Measured) else None)
        if stopped is not None:
            raise stopped

    # --- memory and time --------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What takes too much memory fails, and nothing is computed in TF32."""
        with limited_memory(self.device), without_tf32():
            yield

    def _give_back(self) -> None:
        """Give free memory back to the system.

        Where memory is short, its pieces might not do for the next call.
        """
        give_back_freed()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _is_over(self) -> bool:
        return time.monotonic() - self._begin > self.limits.total_seconds

    def _over(self) -> str:
        return f"the {self.limits.total_seconds:g} s of this run were spent"


def _with_phases(row: Row, provider: Provider, measured: Measured | None) -> Iterator[Row]:
    """A row, then one per phase of its call. A phase has no first call and no peak of its own."""
    yield row
    for name in provider.phases:
        phase = replace(row.without_measurements(), provider=f"{row.provider}: {name}")
        if measured is not None:
            own = measured.phases[name]
            phase.set_times(own.seconds)
            for baseline in provider.baselines:
                phase.set_ratio(baseline, Ratio.of(own.ratios.get(baseline, [])))
        yield phase


def _key(trial: Trial) -> tuple[str, str, str]:
    return trial.row.case, trial.row.dtype, trial.row.provider


def _to_reference(measured: Measured, reference: Measured | Exception | None) -> Ratio | None:
    """The ratio to reference in the same round.

    Where the passes are a baseline, each is in units of the passes beside it.
    """
    if not isinstance(reference, Measured):
        return None
    own, others = (of_call.ratios.get("to_passes") for of_call in (measured, reference))
    if own is None or others is None:
        own, others = measured.seconds, reference.seconds
    return Ratio.of([mine / its for mine, its in zip(own, others, strict=False)])
