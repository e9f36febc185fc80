"""Small problems, providers that do what a test says, and a clock that only goes on when somebody spends time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from skymask_gpu.bench import providers, run
from skymask_gpu.bench.cases import CASES, Case, Model, Problem
from skymask_gpu.bench.points import Limits
from skymask_gpu.bench.providers import COMPILED, Provider
from skymask_gpu.bench.table import Row

CPU = torch.device("cpu")


class Small:
    """Problems, limits and runs of a model with 3,372 parameters."""

    def problem(self, case: Case = CASES["logreg"], num_clients: int = 30) -> Problem:
        return Problem.build(case, Model.build(case, CPU), num_clients)

    def limits(self, *clients: int, case: str = "logreg", **settings: Any) -> Limits:
        return Limits(clients, (case,), ("float32",), repeat_seconds=0.0, left_out=(COMPILED,), **settings)

    def rows(self, limits: Limits) -> dict[tuple[int, str], Row]:
        return {(row.clients, row.provider): row for row in run.measure_cases(limits, CPU)}


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the runner measure these functions of a problem, by name, in place of the solvers."""

    def use(**calls: Callable[[Problem], Any]) -> None:
        chosen = [
            Provider(name, lambda problem, call=call: lambda: call(problem), lambda *_: "nothing")
            for name, call in calls.items()
        ]
        monkeypatch.setattr(run, "providers", lambda case: chosen)

    return use


@pytest.fixture
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest repeats that give a ratio, of one call each, whatever is in the caches and was freed."""
    for name, value in (("_LEAST_REPEATS", 3), ("_MOST_SAMPLES", 1), ("_SHORTEST_FLOOR", 0.0)):
        monkeypatch.setattr(f"skymask_gpu.bench.measure.{name}", value)
    monkeypatch.setattr("skymask_gpu.bench.measure._empty_caches", lambda device: None)
    monkeypatch.setattr("skymask_gpu.bench.measure.start_peak", lambda device: None)
    monkeypatch.setattr("skymask_gpu.bench.run.give_back_freed", lambda: None)


@pytest.fixture
def sloppy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a solver flip bits (by default one in 843) where ``when`` says so."""
    honest = providers.train_masks

    def spoil(which: str, bytes_of_a_row: slice = slice(None, None, 125), when: Callable[..., bool] = lambda *_: True) -> None:
        def train(updates_RP: torch.Tensor, *arguments: Any, config: Any, solver: str) -> Any:
            masks = honest(updates_RP, *arguments, config=config, solver=solver)
            if solver == which and when(updates_RP.dtype, config.steps):
                bits = masks.bits.clone()
                bits[:, bytes_of_a_row] ^= 1
                return replace(masks, bits=bits)
            return masks

        monkeypatch.setattr(providers, "train_masks", train)

    return spoil


class Clock:
    """Time that goes on only when somebody spends it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spending(self, seconds: float) -> Callable[[], None]:
        def spend() -> None:
            self.now += seconds

        return spend


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("skymask_gpu.bench.measure.time", clock)
    # overwriting the cache takes real time, 20 ms for each of some hundred calls that take none
    monkeypatch.setattr("skymask_gpu.bench.measure._empty_caches", lambda device: None)
    return clock


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test found out about a model is no business of the next."""
    yield
    providers._wrong_with_few_clients.cache_clear()
