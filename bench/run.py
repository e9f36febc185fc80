"""The runner: cases x clients x providers. Each result is checked before it is timed; each measurement is a row."""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from skymask_gpu.bench.cases import Case, Model, Problem
from skymask_gpu.bench.checking import Checker
from skymask_gpu.bench.measure import Floor, Measured, StoppedError, free_memory, limited_memory, measure_steadily
from skymask_gpu.bench.points import Limits, points
from skymask_gpu.bench.providers import Provider, providers
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.table import CannotRunError, Row, conditions, status_of
from skymask_gpu.engine.numerics import without_tf32

__all__ = ["Runner", "count_rows", "measure_cases"]

_SEED = 0


def measure_cases(limits: Limits, device: torch.device, started: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Rows as they are measured; ``started`` is told what comes next."""
    runner = Runner(limits, device, started=started)
    for case, num_clients, dtype in points(limits):
        yield from runner.point(case, num_clients, dtype)


def count_rows(limits: Limits) -> int:
    return sum(len(providers(case)) for case, _, _ in points(limits))


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
        self._checker = Checker(limits, device)
        self._conditions = conditions(device, _SEED)

    def point(self, case: Case, num_clients: int, dtype: str) -> Iterator[Row]:
        """All rows of a case with this number of clients and updates of this type."""
        self.started(f"{_point(case, num_clients, dtype)}: updates")
        try:
            problem = self.problem(case, num_clients, dtype)
        except Exception as error:
            for provider in self._providers_of(case):
                yield self.row(case, num_clients, dtype, provider, **status_of(error))
            return
        floors: dict[str, Floor] = {}
        known: list[tuple[Provider, dict[str, Any], Callable[[], Any] | None]] = []
        for provider, columns, call in self.checked(problem):
            known.append((provider, columns, call))
            if call is not None and provider.baseline:
                floors[provider.baseline] = Floor(call, provider.parts(problem))
            if not self.limits.side_by_side:
                yield from self._timed_rows(problem, known, floors)
                known = []
            # what one provider holds must not be in the way of the next
            del call
        yield from self._timed_rows(problem, known, floors)

    def problem(self, case: Case, num_clients: int, dtype: str) -> Problem:
        """The updates, and the model, which is made once per case.

        Raises:
            NotTimedError: the time is over, or the updates are too large.
        """
        self._checker.give_back()
        if self._checker.is_over():
            raise CannotRunError(self._checker.over())
        with limited_memory(self.device), without_tf32():
            if case.name not in self._models:
                self._models[case.name] = Model.build(case, self.device)
            # on a GPU, running out of memory is an error like any other
            free = free_memory(self.device) if self.device.type == "cpu" else None
            return Problem.build(case, self._models[case.name], num_clients, _SEED, free).to(dtype)

    def checked(self, problem: Problem) -> Iterator[tuple[Provider, dict[str, Any], Callable[[], Any] | None]]:
        """Each provider, the columns that are known before it is timed, and the call if it may be timed."""
        chosen = self._providers_of(problem.case)
        truth, firsts = self._checker.truth(problem, chosen)
        for provider in chosen:
            self.started(f"{_point(problem.case, problem.num_clients, problem.dtype)}: {provider.name}")
            yield provider, *self._checker.checked(problem, provider, firsts.pop(provider.name, None), truth)

    def _timed_rows(
        self,
        problem: Problem,
        known: list[tuple[Provider, dict[str, Any], Callable[[], Any] | None]],
        floors: Mapping[str, Floor],
    ) -> Iterator[Row]:
        """Time those that may be timed side by side; then the rows of all."""
        calls = {provider.name: call for provider, _, call in known if call is not None}
        stopped: StoppedError | None = None
        measured: Mapping[str, Measured | Exception]
        point = _point(problem.case, problem.num_clients, problem.dtype)
        try:
            with limited_memory(self.device), without_tf32():
                measured = measure_steadily(
                    calls,
                    self.device,
                    self.limits.repeat_seconds,
                    floors if calls else {},
                    is_over=self._checker.is_over,
                    started=lambda name: self.started(f"{point}: {name}"),
                )
        except StoppedError as reason:
            measured, stopped = reason.measured, reason
        except Exception as error:  # of a floor
            measured = dict.fromkeys(calls, error)
        for provider, columns, call in known:
            row = self.row(problem.case, problem.num_clients, problem.dtype, provider, **columns)
            if call is not None and provider.name in measured:
                self._fill(row, provider, problem, measured)
            elif call is not None:
                row.status, row.detail = "skipped", "stopped" if stopped else self._checker.over()
            yield row
        if stopped is not None:
            raise stopped

    def _fill(self, row: Row, provider: Provider, problem: Problem, of_all: Mapping[str, Measured | Exception]) -> None:
        """The columns of a provider that was timed."""
        measured, reference = of_all[provider.name], of_all.get("reference")
        if isinstance(measured, Exception):
            row.first_s, row.compared_with = None, ""
            for column, text in status_of(measured).items():
                setattr(row, column, text)
            return
        self._checker.note_pace(problem, provider, measured.median)
        row.status = "ok"
        row.median_s, row.p20_s, row.p80_s = (measured.quantile(share) for share in (0.5, 0.2, 0.8))
        row.repeats, row.peak_bytes = len(measured.seconds), measured.peak_bytes
        for baseline in provider.baselines:
            row.set_ratio(baseline, Ratio.of(measured.ratios.get(baseline, [])))
        if provider.baseline:
            row.set_ratio(provider.baseline, Ratio(1.0, 1.0, 1.0))
        else:
            row.set_ratio("to_reference", _to_reference(measured, reference))
        if provider.moved_bytes is not None:
            row.moved_bytes = provider.moved_bytes(problem)

    def row(self, case: Case, num_clients: int, dtype: str, provider: Provider, **columns: Any) -> Row:
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


def _point(case: Case, num_clients: int, dtype: str) -> str:
    return f"{case.name}, N = {num_clients:,}, {dtype}"


def _to_reference(measured: Measured, reference: Measured | Exception | None) -> Ratio | None:
    """The ratio to reference in the same round, each in units of the passes beside it where these are a baseline."""
    if not isinstance(reference, Measured):
        return None
    own, others = (of_call.ratios.get("to_passes") for of_call in (measured, reference))
    if own is None or others is None:
        own, others = measured.seconds, reference.seconds
    return Ratio.of([mine / its for mine, its in zip(own, others, strict=False)])
