"""The benchmark refuses a time to a solver that is wrong, and measures what it says."""

import ctypes
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from skymask_gpu.bench import accuracy, compare, costs, large, many_clients, plots, providers, rules, run, solvers
from skymask_gpu.bench.cases import CASES, Case, Model, Problem, TooLargeError
from skymask_gpu.bench.measure import (
    Floor,
    Measured,
    StoppedError,
    _time,
    free_memory,
    freed_memory_kept,
    limited_memory,
    measure,
    measure_steadily,
)
from skymask_gpu.bench.providers import COMPILED, MEAN, PASSES, CannotRunError, Provider
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.run import Limits, Row
from skymask_gpu.bench.summary import write_summary
from skymask_gpu.cli import app
from skymask_gpu.defence import RootTraining, root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.peak_memory import give_back_freed, peak_bytes, start_peak


def small_problem(case: Case = CASES["logreg"], num_clients: int = 30) -> Problem:
    return Problem.build(case, Model.build(case, torch.device("cpu")), num_clients, seed=0, free_bytes=None)


def small_limits(*clients: int, case: str = "logreg", **settings: Any) -> Limits:
    return Limits(clients, (case,), ("float32",), repeat_seconds=0.0, left_out=(COMPILED,), **settings)


def measured(limits: Limits) -> dict[tuple[int, str], Row]:
    return {(row.clients, row.provider): row for row in run.measure_cases(limits, torch.device("cpu"))}


def make_provider(name: str, call: Callable[[Problem], Any]) -> Provider:
    return Provider(name, lambda problem: lambda: call(problem), lambda *_: None, lambda _: "nothing")


@pytest.fixture
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as give a ratio, of one call each, whatever is in the caches and was freed."""
    monkeypatch.setattr("skymask_gpu.bench.measure._LEAST_REPEATS", 3)
    monkeypatch.setattr("skymask_gpu.bench.measure._MOST_SAMPLES", 1)
    monkeypatch.setattr("skymask_gpu.bench.measure._empty_caches", lambda device: None)
    monkeypatch.setattr("skymask_gpu.bench.measure.start_peak", lambda device: None)
    monkeypatch.setattr(run, "give_back_freed", lambda: None)


@pytest.mark.usefixtures("few_repeats")
def test_results_are_checked_and_timed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions, seen = torch.backends.cudnn.conv, []

    def call(problem: Problem) -> None:
        seen.append(convolutions.fp32_precision)

    def check(problem: Problem, result: None) -> None:
        seen.append(f"checked in {convolutions.fp32_precision}")

    provider = Provider("noting", lambda problem: lambda: call(problem), check, lambda _: "nothing", floors=())
    monkeypatch.setattr(run, "providers", lambda case: [provider])
    assert convolutions.fp32_precision == "tf32"
    assert [row.status for row in run.measure_cases(small_limits(5), torch.device("cpu"))] == ["ok"]
    assert len(seen) > 3
    assert set(seen) == {"ieee", "checked in ieee"}
    assert convolutions.fp32_precision == "tf32"


# --- solvers ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_repeats")
def test_agreeing_solvers_get_times_and_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.bench.measure._SHORTEST_FLOOR", 0.0)
    monkeypatch.setitem(CASES, "logreg", replace(CASES["logreg"], dtypes=("float32", "bfloat16")))
    limits = replace(small_limits(20), dtypes=("float32", "bfloat16"))
    rows = list(run.measure_cases(limits, torch.device("cpu")))
    assert len(rows) == run.count_rows(limits)
    for dtype in ("float32", "bfloat16"):
        of_dtype = {row.provider: row for row in rows if row.dtype == dtype}
        assert set(of_dtype) == {MEAN, PASSES, "reference", "fused", "vmap", "collapsed", COMPILED}
        assert {name for name, row in of_dtype.items() if row.status != "ok"} == {COMPILED}
        for row in of_dtype.values():
            if row.status == "ok":
                assert row.median_s is not None
                assert row.p20_s <= row.median_s <= row.p80_s
                assert row.to_mean is not None
                assert (row.to_mean == 1) == (row.provider == MEAN)
        fused = of_dtype["fused"]
        assert fused.to_reference_low <= fused.to_reference <= fused.to_reference_high
        # from the ratios of each round, not of all rounds
        assert fused.to_reference == pytest.approx(fused.to_passes / of_dtype["reference"].to_passes, rel=0.5)
        assert of_dtype["reference"].to_reference == 1
        assert of_dtype[MEAN].to_reference is of_dtype[PASSES].to_reference is None
        assert of_dtype[PASSES].to_passes == 1
        assert fused.to_passes > 1
        assert fused.to_mean > fused.to_passes
        assert fused.compared_with == "reference"
        assert fused.params == 3372


@pytest.mark.usefixtures("few_repeats")
def test_passes_below_a_millisecond_are_no_yardstick_but_solvers_are_compared() -> None:
    rows = measured(small_limits(20))
    assert {row.to_passes for row in rows.values() if row.provider != PASSES} == {None}
    fused, reference = rows[20, "fused"], rows[20, "reference"]
    assert fused.to_reference == pytest.approx(fused.median_s / reference.median_s, rel=0.5)


@pytest.mark.usefixtures("few_repeats")
def test_a_wrong_solver_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit in 843 flipped."""
    honest = providers.train_masks

    def sloppy(*arguments: Any, solver: str, **settings: Any) -> Any:
        masks = honest(*arguments, solver=solver, **settings)
        if solver == "fused":
            masks.bits[:, ::125] ^= 1
        return masks

    monkeypatch.setattr(providers, "train_masks", sloppy)
    monkeypatch.setattr(run, "QUICK", small_limits(20))
    done = CliRunner().invoke(app, ["bench", "--quick", "--case", "logreg", "--out", str(tmp_path)])
    assert done.exit_code == 1
    rows = {row.provider: row for row in run.read_rows(tmp_path / "bench.csv")}
    assert rows["fused"].status == "wrong"
    assert rows["fused"].detail == "1.2e-03 of the bits differ"
    timings = ("median_s", "p20_s", "p80_s", "repeats", "first_s", "to_mean", "to_passes", "to_reference", "peak_bytes")
    assert not any(getattr(rows["fused"], column) for column in timings)
    assert rows["vmap"].status == "ok"
    assert "1.2e-03 of the bits differ" in (tmp_path / "summary.md").read_text()


@pytest.mark.usefixtures("few_repeats")
@pytest.mark.parametrize(
    ("wrong", "bytes_of_a_row", "detail"),
    [
        (lambda dtype, steps: dtype == torch.float32 and steps == 20, slice(100, 101), None),
        (lambda dtype, steps: dtype == torch.float32 and steps == 20, slice(None, None, 125), "1.2e-03 of the bits differ"),
        (lambda dtype, steps: steps == 20, slice(100, 101), "3.0e-04 of the bits differ"),
        (lambda dtype, steps: dtype == torch.float32, slice(100, 101), "3.0e-04 of the bits differ"),
    ],
    ids=["late and in float32", "by much", "in float64 too", "in the first steps too"],
)
def test_what_rounding_alone_explains_is_not_wrong(
    wrong: Callable[[torch.dtype, int], bool], bytes_of_a_row: slice, detail: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kink's worth of bits is 21 of 70,812."""
    honest = providers.train_masks

    def with_a_kink(updates_RP: torch.Tensor, *arguments: Any, config: Any, solver: str) -> Any:
        masks = honest(updates_RP, *arguments, config=config, solver=solver)
        if solver == "fused" and wrong(updates_RP.dtype, config.steps):
            masks.bits[:, bytes_of_a_row] ^= 1
        return masks

    monkeypatch.setattr(providers, "train_masks", with_a_kink)
    row = measured(small_limits(20))[20, "fused"]
    if detail is None:
        assert (row.status, row.compared_with) == ("ok", "reference in float64, 3 steps in float32")
    else:
        assert (row.status, row.detail) == ("wrong", detail)


def test_a_ratio_to_reference_is_of_the_same_round_and_unit() -> None:
    """The machine slows down; the reference takes part in fewer rounds; without both in passes it is seconds."""
    own = Measured([1.0, 2.0, 4.0, 80.0], None, {PASSES: [3.0, 6.0, 9.0, 90.0]})
    reference = Measured([4.0, 8.0, 16.0], None, {PASSES: [6.0, 12.0, 18.0]})
    assert run._to_reference(own, reference) == Ratio(0.5, 0.5, 0.5)
    assert run._to_reference(own, replace(reference, ratios={})) == Ratio(0.25, 0.25, 0.25)
    assert run._to_reference(replace(own, ratios={}), reference) == Ratio(0.25, 0.25, 0.25)
    assert run._to_reference(own, None) is run._to_reference(own, IndexError()) is None


@pytest.mark.usefixtures("few_repeats")
def test_a_solver_that_cannot_run_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "why_not_solver", lambda solver, *_: None if solver == "reference" else "no kernels here")
    rows = measured(small_limits(10))
    assert rows[10, "reference"].status == "ok"
    for solver in ("fused", "vmap", "collapsed"):
        assert (rows[10, solver].status, rows[10, solver].detail) == ("skipped", "no kernels here")


@pytest.mark.usefixtures("few_repeats")
def test_where_reference_is_too_slow_fused_is_the_truth_if_it_agreed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_reference(clients: int) -> Callable[[Case], list[Provider]]:
        def slow_from(problem: Problem) -> Callable[[], Any]:
            if problem.num_clients >= clients:
                raise CannotRunError("slow")
            return providers._prepare_solver("reference", problem)

        return lambda case: [replace(p, prepare=slow_from) if p.name == "reference" else p for p in providers.providers(case)]

    monkeypatch.setattr(run, "providers", without_reference(40))
    rows = measured(small_limits(20, 40))
    assert rows[40, "fused"].compared_with == "reference at N = 20"
    assert rows[40, "vmap"].compared_with == "fused"
    assert rows[40, "collapsed"].status == "ok"
    assert rows[40, "fused"].to_reference is None

    monkeypatch.setattr(run, "providers", without_reference(0))
    rows = measured(small_limits(20))
    assert {rows[20, name].status for name in ("fused", "vmap", "collapsed")} == {"no check"}
    assert rows[20, "fused"].median_s is None


@pytest.mark.usefixtures("few_repeats")
def test_torch_compile_is_compared_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would compile is run as it is: compiling takes 20 seconds."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows = measured(replace(small_limits(10), left_out=()))
    assert rows[10, COMPILED].status in ("ok", "skipped"), rows[10, COMPILED].detail
    assert rows[10, COMPILED].compared_with == "reference" or "C++ compiler" in rows[10, COMPILED].detail
    problem = small_problem(num_clients=600)
    with pytest.raises(CannotRunError, match=r"601 rows x 2 parameter tensors, at most 1,000"):
        providers._prepare_compiled(problem)


def test_losses_and_steps_and_labels_are_compared_too() -> None:
    problem = small_problem()
    masks = providers._train(problem.updates, problem, "fused")
    assert solvers.disagreement(masks, masks) is None
    losses = [*masks.losses[:-1], masks.losses[-1] + 2e-5 * masks.losses[0]]
    assert solvers.disagreement(replace(masks, losses=losses), masks) == "losses differ by 2.0e-05 of the first"
    assert solvers.disagreement(replace(masks, losses=masks.losses[:-1]), masks) == "19 steps instead of 20"
    nan = [*masks.losses[:-1], float("nan")]
    assert "losses differ" in str(solvers.disagreement(replace(masks, losses=nan), masks))
    bits = masks.bits.clone()
    bits[-2] = ~bits[-2]  # an honest client's
    bits[-2, -1] = 0
    assert solvers.disagreement(replace(masks, bits=bits), masks, most_differing=1.0) == "client labels differ"


# --- rules --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rules_problem() -> Problem:
    """With lengths so different that each neighbour counts."""
    problem = small_problem(replace(CASES["logreg"], what="rules"), 23)
    lengths_R = torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).exp()
    noise_RP = torch.randn(problem.updates.shape, generator=torch.Generator().manual_seed(1))
    return replace(problem, updates=problem.updates + 0.01 * lengths_R * noise_RP)


@pytest.mark.parametrize("name", sorted(rules.CHECKS))
def test_rules_are_checked_before_they_are_timed(name: str, rules_problem: Problem) -> None:
    """The right result passes; the mean in its place, or one with a few of its parameters doubled, does not."""
    check, _ = rules.CHECKS[name]
    result = providers._prepare_rule(name, rules_problem)()
    assert check(rules_problem, result) is None
    sloppy_P = result.update.clone()
    sloppy_P[::282] *= 2  # the coordinate-wise checks look at every sixth
    assert check(rules_problem, replace(result, update=sloppy_P)) is not None
    if name != "geometric-median":  # of which a property is checked
        nearly_P = result.update.clone()
        nearly_P[282] += 1e-4 * rules_problem.updates.abs().mean()
        assert check(rules_problem, replace(result, update=nearly_P)) is not None
    mean_P = rules_problem.updates[:-1].mean(0)
    if name != "fedavg" and not torch.allclose(result.update, mean_P, rtol=1e-3):
        assert check(rules_problem, replace(result, update=mean_P)) is not None
    if name in ("multi-krum", "bulyan", "skymask"):
        others_M = result.kept.roll(1)
        assert check(rules_problem, replace(result, kept=~others_M)) is not None


def test_the_checks_of_krum_count_neighbours_as_krum_does(rules_problem: Problem) -> None:
    """Points for which one neighbour more or less chooses others."""
    generator = torch.Generator().manual_seed(7)
    problems = [replace(rules_problem, updates=torch.randn(16, 2, generator=generator)) for _ in range(60)]
    for name, other_check in (("krum", rules._krum(1)), ("multi-krum", rules._multi_krum(1)), ("bulyan", None)):
        results = [providers._prepare_rule(name, problem)() for problem in problems]
        check, _ = rules.CHECKS[name]
        assert [check(problem, result) for problem, result in zip(problems, results, strict=True)] == [None] * 60
        if other_check is not None:
            assert any(other_check(problem, result) for problem, result in zip(problems, results, strict=True))


@pytest.mark.usefixtures("few_repeats")
def test_a_rule_without_a_check_is_never_timed(monkeypatch: pytest.MonkeyPatch, rules_problem: Problem) -> None:
    chosen = [p for p in providers.providers(CASES["rules"]) if p.name in ("flame", "krum", "ByzFL Median")]
    monkeypatch.setattr(run, "providers", lambda case: chosen)
    monkeypatch.setattr(providers, "byzfl_aggregator", lambda *_: None)
    rows = measured(small_limits(10, case="rules"))
    assert (rows[10, "flame"].status, rows[10, "flame"].median_s) == ("no check", None)
    assert rows[10, "krum"].status == "ok"
    assert rows[10, "ByzFL Median"].detail.startswith("byzfl is not installed")


def test_byzfls_aggregators_load_without_the_package_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "byzfl" / "aggregators").mkdir(parents=True)
    (tmp_path / "byzfl" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    source = "class TrMean:\n    def __init__(self, f):\n        self.f = f\n\nclass Median:\n    pass\n"
    (tmp_path / "byzfl" / "aggregators" / "__init__.py").write_text(source)
    for name in [name for name in sys.modules if name.split(".")[0] == "byzfl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        aggregator: Any = rules.byzfl_aggregator("TrMean", 3)
        assert aggregator.f == 3
        assert type(rules.byzfl_aggregator("Median", 3)).__name__ == "Median"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "byzfl"]:
            del sys.modules[name]


# --- limits -------------------------------------------------------------------------------------------------------------


def test_what_fails_or_runs_out_of_memory_is_a_row_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: Problem) -> None:
        raise IndexError("no such thing")

    all_that_is_free = free_memory(torch.device("cpu"))
    if all_that_is_free is None:
        pytest.skip("this system does not tell how much memory is free")
    monkeypatch.setattr(
        run,
        "providers",
        lambda case: [
            make_provider("greedy", lambda problem: torch.empty(all_that_is_free, dtype=torch.uint8)),
            make_provider("failing", fail),
            make_provider("modest", lambda problem: torch.empty(2**20)),
        ],
    )
    rows = measured(small_limits(5))
    assert rows[5, "greedy"].status == "out of memory"
    assert "allocate" in rows[5, "greedy"].detail
    assert (rows[5, "failing"].status, rows[5, "failing"].detail) == ("failed", "IndexError: no such thing")
    assert rows[5, "modest"].status == "ok"


@pytest.mark.parametrize("failing", [MEAN, "sometimes"])
def test_what_fails_only_later_has_no_time(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a floor nobody has one."""
    calls: list[str] = []

    def at_last(problem: Problem) -> None:
        calls.append(failing)
        if len(calls) == 3:
            raise IndexError("no such thing")

    chosen = [make_provider(failing, at_last), make_provider("always", lambda problem: None)]
    monkeypatch.setattr(run, "providers", lambda case: chosen)
    rows = measured(small_limits(5))
    row = rows[5, failing]
    assert (row.status, row.detail) == ("failed", "IndexError: no such thing")
    assert not any((row.median_s, row.repeats, row.first_s, row.compared_with, row.to_mean))
    assert rows[5, "always"].status == ("failed" if failing == MEAN else "ok")


def test_slow_calls_are_stopped_and_not_tried_with_more_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def linear(problem: Problem) -> None:
        calls.append(problem.num_clients)
        time.sleep(0.004 * problem.num_clients)

    def endless(problem: Problem) -> None:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(run, "providers", lambda case: [make_provider("linear", linear), make_provider("endless", endless)])
    rows = measured(small_limits(5, 10, 50, call_seconds=0.1))
    assert rows[10, "linear"].status == "ok"
    assert rows[50, "linear"].status == "skipped"
    assert re.fullmatch(r"about 0.\d+ s a call expected from N = 10, the limit is 0.1 s", rows[50, "linear"].detail)
    assert 50 not in calls
    assert rows[5, "endless"].detail == "stopped after 0.3 s"
    assert rows[10, "endless"].detail.startswith("about 0.6 s a call expected from N = 5")


def test_a_call_over_the_limit_has_no_time_unless_it_was_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiling(problem: Problem) -> None:
        time.sleep(0.0 if compiled else 0.2)
        compiled.append(True)

    chosen = [make_provider("compiling", compiling), make_provider("slow", lambda problem: time.sleep(0.2))]
    monkeypatch.setattr(run, "providers", lambda case: chosen)
    rows = measured(small_limits(5, call_seconds=0.15))
    assert rows[5, "compiling"].status == "ok"
    assert rows[5, "compiling"].first_s > 0.2
    assert (rows[5, "slow"].status, rows[5, "slow"].detail) == ("skipped", "0.2 s a call, the limit is 0.15 s")


def rows_until_ctrl_c(limits: Limits) -> list[Row]:
    rows: list[Row] = []
    try:
        for row in run.measure_cases(limits, torch.device("cpu")):
            rows.append(row)
    except KeyboardInterrupt:
        return rows
    raise AssertionError("nobody pressed Ctrl-C")


def test_rows_are_there_although_they_were_stopped_in_the_middle_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the second provider is repeated the second time, the third has one repeat."""
    calls: list[str] = []

    def call(problem: Problem, name: str) -> None:
        calls.append(name)
        if name == "b" and calls.count("b") == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "providers", lambda case: [make_provider(n, lambda p, n=n: call(p, n)) for n in "abc"])
    monkeypatch.setattr("skymask_gpu.bench.measure._MOST_SAMPLES", 1)
    rows = rows_until_ctrl_c(small_limits(5, 10))
    assert [(row.provider, row.clients, row.status, row.repeats) for row in rows] == [
        ("a", 5, "ok", 2),
        ("b", 5, "ok", 1),
        ("c", 5, "ok", 1),
    ]


def test_what_was_not_repeated_when_stopped_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def stop(problem: Problem) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "providers", lambda case: [make_provider("stops", stop)])
    rows = rows_until_ctrl_c(small_limits(5))
    assert [(row.status, row.detail, row.median_s) for row in rows] == [("skipped", "stopped", None)]


def test_updates_that_leave_no_room_are_not_made() -> None:
    model = Model.build(CASES["logreg"], torch.device("cpu"))
    with pytest.raises(TooLargeError, match=r"the updates alone take 1,256.2 of 1.0 GiB"):
        Problem.build(CASES["logreg"], model, 10**8, seed=0, free_bytes=2**30)


def test_points_come_in_the_order_that_a_reader_needs_them() -> None:
    """Few clients first, of these float32 first, but what most come for before all; over a gigabyte of updates last."""
    limits = Limits((50, 500, 5_000), ("rules", "cnn", "resnet18"), ("float32", "bfloat16"))
    points = [(case.name, clients, dtype) for case, clients, dtype in run._points(limits)]
    assert points == [
        ("cnn", 50, "float32"),
        ("cnn", 500, "float32"),
        ("rules", 50, "float32"),
        ("cnn", 50, "bfloat16"),
        ("rules", 500, "float32"),
        ("cnn", 500, "bfloat16"),
        ("resnet18", 50, "float32"),
        ("resnet18", 500, "float32"),
        ("rules", 5_000, "float32"),
        ("cnn", 5_000, "float32"),
        ("resnet18", 5_000, "float32"),
        ("cnn", 5_000, "bfloat16"),
    ]
    assert CASES["logreg"].num_params == Model.build(CASES["logreg"], CPU).loss.num_params


def test_once_the_time_is_spent_all_rows_say_so() -> None:
    rows = measured(small_limits(5, 10, total_seconds=-1.0))
    assert len(rows) == run.count_rows(small_limits(5, 10))
    assert {(row.status, row.detail) for row in rows.values()} == {("skipped", "the -1 s of this run were spent")}


# --- measuring ----------------------------------------------------------------------------------------------------------


CPU = torch.device("cpu")


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
    return clock


def measured_alone(call: Callable[[], Any], seconds: float = 0.0, **floors: Callable[[], Any]) -> Measured:
    measured = measure_steadily({"call": call}, CPU, seconds, {name: Floor(floor) for name, floor in floors.items()})["call"]
    assert isinstance(measured, Measured)
    return measured


def test_a_ratio_is_to_the_floor_before_and_after_each_repeat(clock: Clock) -> None:
    """A machine that gets slower and slower: times differ threefold, ratios do not."""

    def slower(seconds: float) -> None:
        clock.now += seconds * (1 + 0.3 * clock.now)

    measured = measured_alone(lambda: slower(0.6), 8.0, floor=lambda: slower(0.02))
    assert max(measured.seconds) > 2.5 * min(measured.seconds)
    ratios = measured.ratios["floor"]
    assert len(ratios) == len(measured.seconds)
    assert max(ratios) < 1.2 * min(ratios)


def test_the_floor_of_a_ratio_is_the_mean_of_its_times_before_and_after(clock: Clock) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        clock.now += 2.0

    ratios = measured_alone(call, floor=lambda: clock.spending(0.05 * (1 + len(calls)))()).ratios["floor"]
    # before any call, after two (one is for the peak of memory), and after each more
    assert ratios[:4] == pytest.approx([2 / 0.1, 2 / 0.175, 2 / 0.225, 2 / 0.275])


def test_a_floor_below_a_millisecond_is_no_yardstick(clock: Clock) -> None:
    measured = measured_alone(clock.spending(0.02), short=clock.spending(0.0009), long=clock.spending(0.002))
    assert measured.ratios == {"long": pytest.approx([10.0] * 7)}
    floors = {"short": Floor(clock.spending(0.009), parts=10), "long": Floor(clock.spending(0.01), parts=10)}
    in_parts = measure_steadily({"call": clock.spending(0.02)}, CPU, 0.0, floors)["call"]
    assert isinstance(in_parts, Measured)
    assert in_parts.ratios == {"long": pytest.approx([2.0] * 7)}


def test_calls_are_measured_in_rounds_with_floors_in_between(clock: Clock) -> None:
    """All begin before any is repeated; a floor is timed again, for a fifth of what has passed, once that is a sample."""
    events: list[str] = []

    def calling(name: str, seconds: float) -> Callable[[], object]:
        return lambda: (events.append(name), clock.spending(seconds)())

    calls = {"a": calling("a", 0.06), "b": calling("b", 0.06)}
    floors = {"often": Floor(calling("o", 0.01)), "seldom": Floor(calling("s", 0.03))}
    measured = measure_steadily(calls, CPU, 0.0, floors, started=lambda name: events.append(f"({name})"))
    rounds = ["os(a)a(b)b", "(a)aoooooss(b)booo", *["(a)aooss(b)booo"] * 6, "s"]
    assert "".join(events) == "".join(rounds)
    for of_call in measured.values():
        assert isinstance(of_call, Measured)
        assert of_call.ratios == {"often": pytest.approx([6.0] * 7), "seldom": pytest.approx([2.0] * 7)}


def test_a_call_that_fails_later_leaves_the_others_alone(clock: Clock) -> None:
    times = iter(range(3))
    measured = measure_steadily({"fails": lambda: next(times), "works": clock.spending(0.02)}, CPU, 0.0)
    assert isinstance(measured["fails"], StopIteration)
    assert isinstance(measured["works"], Measured)
    assert len(measured["works"].seconds) == 7


def test_repeats_follow_the_time_a_call_takes(clock: Clock) -> None:
    assert len(measured_alone(clock.spending(0.3), 1.0).seconds) == 7, "at least"
    assert len(measured_alone(clock.spending(0.1), 0.95).seconds) == 10
    assert len(measured_alone(clock.spending(0.011), 3.0).seconds) == 200, "at most"
    assert len(measured_alone(clock.spending(2.9), 1.0).seconds) == 7
    start = clock.now
    assert measured_alone(clock.spending(3.1), 1.0).seconds == pytest.approx([3.1] * 5)
    assert clock.now == pytest.approx(start + 5 * 3.1), "the one for the peak of memory counts"
    start = clock.now
    assert measured_alone(clock.spending(0.003), 0.0).seconds == pytest.approx([0.003] * 7)
    assert clock.now == pytest.approx(start + 0.003 * (1 + 7 * 4)), "several calls a repeat, and one for the peak of memory"
    assert Measured([3.0, 1.0, 2.0, 5.0, 4.0], None).median == 3.0
    assert Measured([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], None).quantile(0.2) == 2.0


def test_a_short_call_is_repeated_while_a_long_one_takes_anyway(clock: Clock) -> None:
    measured = measure_steadily({"short": clock.spending(0.5), "long": clock.spending(12.0)}, CPU, 1.0)
    assert [len(of_call.seconds) for of_call in measured.values() if isinstance(of_call, Measured)] == [24, 5]


def test_what_is_known_well_is_not_repeated_any_more(clock: Clock) -> None:
    """One call is as steady as its floor, the other is not; both may take three seconds."""
    shares = random.Random(0)
    measured = measure_steadily(
        {"steady": clock.spending(0.1), "restless": lambda: clock.spending(0.1 * shares.uniform(0.5, 2.0))()},
        CPU,
        3.0,
        {"floor": Floor(clock.spending(0.01))},
    )
    steady, restless = measured.values()
    assert isinstance(steady, Measured)
    assert isinstance(restless, Measured)
    assert len(steady.seconds) == 7
    assert 3.0 <= sum(restless.seconds) < 3.2


def test_once_the_time_is_over_no_repeat_begins(clock: Clock) -> None:
    def measured_until(end: float) -> dict[str, int]:
        clock.now = 0.0
        measured = measure_steadily({name: clock.spending(0.3) for name in "ab"}, CPU, 9.0, is_over=lambda: clock.now > end)
        return {name: len(of_call.seconds) for name, of_call in measured.items() if isinstance(of_call, Measured)}

    assert measured_until(1.3) == {"a": 2, "b": 1}
    assert measured_until(0.7) == {"a": 1}
    assert measured_until(0.2) == {}


def test_what_was_measured_before_a_ctrl_c_comes_with_it(clock: Clock) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(0)
        clock.now += 0.1
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(StoppedError) as stopped:
        measure_steadily({"before": clock.spending(0.2), "stops": stop}, CPU, 1.0)
    lengths = {name: len(of_call.seconds) for name, of_call in stopped.value.measured.items() if isinstance(of_call, Measured)}
    assert lengths == {"before": 3, "stops": 2}


def test_a_ratio_is_the_middle_of_its_blocks_and_its_interval_students() -> None:
    """Against scikit-learn's dependency: scipy.stats.ttest_1samp gives the same interval for up to eight repeats."""
    repeats = [2.0, 2.2, 1.9, 2.1, 2.4, 1.8, 2.0, 2.05]
    for count in (3, 5, 8):
        logs = np.log(repeats[:count])
        interval = scipy.stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
        ratio = Ratio.of(repeats[:count])
        assert ratio is not None
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
            tuple(np.exp([logs.mean(), interval.low, interval.high])), rel=1e-3
        )
    assert Ratio.of(repeats[:2]) is None
    # a spike in each block of three does no harm, alike neighbours do not make it surer
    assert Ratio.of([value for value in repeats for _ in range(3)]) == Ratio.of(repeats)
    assert Ratio.of([spiked for value in repeats for spiked in (value, 50.0, value)]) == Ratio.of(repeats)
    known = Ratio(2.0, 1.8, 2.19)
    assert known.is_within(0.1)
    assert not known.is_within(0.09)


def test_a_call_on_a_cpu_begins_with_empty_caches(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr("skymask_gpu.bench.measure._empty_caches", lambda device: events.append("empty"))
    measured = measured_alone(
        lambda: (events.append("call"), clock.spending(0.03)()),
        floor=lambda: (events.append("floor"), clock.spending(0.03)()),
    )
    assert len(measured.seconds) == 7
    assert events[::2] == ["empty"] * (len(events) // 2)
    assert set(events[1::2]) == {"call", "floor"}


def test_a_result_is_gone_before_the_next_call(touch_memory: Callable[[int], object]) -> None:
    def call() -> object:
        return touch_memory(64 * 2**20)

    held = start_peak(CPU)
    _time(call, CPU, calls=2)
    if held is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 60 * 2**20 < peak_bytes(CPU) - held < 100 * 2**20
    peak = measured_alone(call).peak_bytes
    assert peak is not None
    assert 60 * 2**20 < peak < 100 * 2**20


def test_memory_is_limited_for_a_while_only() -> None:
    import resource

    before, free = resource.getrlimit(resource.RLIMIT_DATA), free_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not tell how much memory is free")
    with limited_memory(torch.device("cpu")):
        assert torch.empty(free // 10, dtype=torch.uint8).numel() > 0
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            torch.empty(free, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_freed_memory_is_kept_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc's M_MMAP_MAX is -4 and M_TRIM_THRESHOLD -1; the defaults are mallopt(3)'s."""

    class Library:
        options: ClassVar[dict[int, int]] = {}
        trimmed = False

        def mallopt(self, option: int, value: int) -> None:
            self.options[option] = value

        def malloc_trim(self, pad: int) -> None:
            Library.trimmed = True

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    with freed_memory_kept():
        assert Library.options == {-4: 0, -1: 2**31 - 1}
        assert not Library.trimmed
    assert Library.options == {-4: 65536, -1: 128 * 1024, -3: 128 * 1024}
    assert Library.trimmed
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # no glibc
    with freed_memory_kept():
        pass


def test_freed_memory_is_given_back_before_each_table_and_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was freed and kept in pieces, a call that takes most of the memory would fail."""
    events: list[str] = []
    monkeypatch.setattr(run, "give_back_freed", lambda: events.append("given back"))
    chosen = [make_provider(name, lambda problem, name=name: events.append(name)) for name in "ab"]
    monkeypatch.setattr(run, "providers", lambda case: chosen)
    measured(small_limits(5))
    assert events[:5] == ["given back", "given back", "a", "given back", "b"]


def test_a_c_library_that_cannot_give_memory_back_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert give_back_freed() == hasattr(ctypes.CDLL(None), "malloc_trim")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not give_back_freed()
    assert start_peak(CPU) is None


def test_peak_memory_is_what_a_call_takes_beyond_what_was_held(touch_memory: Callable[[int], object]) -> None:
    held = touch_memory(32 * 2**20)
    result, measured = measure(lambda: len([held, touch_memory(64 * 2**20)]), 2, torch.device("cpu"))
    assert result == 2
    assert len(measured.seconds) == 2
    if measured.peak_bytes is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 60 * 2**20 < measured.peak_bytes < 100 * 2**20


# --- results ------------------------------------------------------------------------------------------------------------


def made_rows() -> list[Row]:
    """As of a run on three numbers of clients, of which the last is too large for reference."""
    rows = []
    for clients in (50, 500, 5000):
        for provider, share in ((MEAN, 0.001), (PASSES, 0.1), ("reference", 1.0), ("collapsed", 0.2)):
            seconds = share * clients / 500
            timed = dict(status="ok", median_s=seconds, p20_s=0.9 * seconds, p80_s=1.1 * seconds, peak_bytes=clients * 2**20)
            timed |= dict(repeats=3, first_s=seconds, compared_with="reference")
            timed |= dict(to_mean=share * 1000, to_mean_low=share * 950, to_mean_high=share * 1050)
            timed |= dict(to_passes=share * 10, to_passes_low=share * 8, to_passes_high=share * 12)
            if (clients, provider) == (5000, "reference"):
                timed = dict(status="out of memory", detail="you tried to | allocate")
            common = dict(case="cnn", what="solvers", model="cnn", clients=clients, params=139_960, dtype="float32")
            rows.append(Row(**common, mask_steps=20, root_samples=100, provider=provider, **timed, device="a CPU", threads=2))
        split = json.dumps({"root": 1.0, "mask_training": 2.0, "other": 0.5})
        rows.append(replace(rows[-1], case="rules", what="rules", provider="skymask", split=split))
    return rows


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = made_rows()
    run.write_rows(tmp_path / "bench.csv", rows)
    assert run.read_rows(tmp_path / "bench.csv") == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of this benchmark"):
        run.read_rows(tmp_path / "other.csv")


def test_the_summary_has_every_row_with_a_time_or_a_reason(tmp_path: Path) -> None:
    write_summary(made_rows(), tmp_path / "summary.md")
    text = (tmp_path / "summary.md").read_text()
    assert "## cnn, N = 500, P = 139,960, float32, model cnn, 20 mask steps, 100 root samples" in text
    assert "| collapsed | 200 ms (180 ms - 220 ms) |  | 1.6 to 2.4 | 200 | 500 | 200 ms | reference |" in text
    assert "| cnn, float32 | 5,000 | reference | out of memory | you tried to / allocate |" in text
    write_summary([], tmp_path / "summary.md")
    assert "Nothing was measured" in (tmp_path / "summary.md").read_text()


def test_runs_are_held_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What both know is compared; what only one timed, or knows, is not."""
    rows = [row for row in made_rows() if row.clients == 500 and row.case == "cnn"]
    slower = [replace(row) for row in rows if row.provider != PASSES]
    for row in slower:
        if row.provider == "collapsed":
            row.to_mean, row.to_mean_low, row.to_mean_high = 250.0, 240.0, 260.0
        if row.provider == "reference":
            row.to_mean, row.to_mean_low, row.to_mean_high = 1100.0, 1050.0, 1150.0
    run.write_rows(tmp_path / "a" / "bench.csv", rows)
    run.write_rows(tmp_path / "b" / "bench.csv", slower)
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    *table, empty, last = capsys.readouterr().out.splitlines()
    assert not empty
    assert table[2:] == [
        f"| cnn | 500 | float32 | {MEAN} |  | 0.008 to 0.012, 0.008 to 0.012 |  |",
        "| cnn | 500 | float32 | reference |  | 8 to 12, 8 to 12 | 1,000, 1,100 (10%) |",
        "| cnn | 500 | float32 | collapsed |  | 1.6 to 2.4, 1.6 to 2.4 | 200, 250 (25%) |",
    ]
    assert last == (
        "Numbers in each run: 2 ratios, at most 25% apart, 1 of them within 15%. "
        "Numbers and middles of intervals: 5 ratios, at most 25% apart, 4 of them within 15%."
    )
    run.write_rows(tmp_path / "c" / "bench.csv", [replace(row, to_passes=None) for row in rows])
    compare.main([str(tmp_path / "a"), str(tmp_path / "c")])
    assert "| reference |  | 8 to 12, none | 1,000, 1,000 (0%) |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "a"), str(tmp_path / "missing")])
    assert "name folders that `skymask-gpu bench --out DIR` wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "a")])
    assert "name two runs at least" in capsys.readouterr().err


def test_plots_are_drawn_with_a_line_a_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.plot_time(made_rows(), tmp_path / "time.png")
    solvers_axes, _ = drawn[0].axes
    lines = {line.get_label(): line for line in solvers_axes.lines}
    assert set(lines) == {MEAN, PASSES, "reference", "collapsed", "out of memory (see summary)"}
    assert lines[MEAN].get_linestyle() == lines[PASSES].get_linestyle() == "--"
    assert lines["reference"].get_xydata().tolist() == [[50, 0.1], [500, 1.0]]
    assert lines["out of memory (see summary)"].get_xdata().tolist() == [5000]
    assert (solvers_axes.get_xscale(), solvers_axes.get_yscale()) == ("log", "log")
    plots.plot_split(made_rows(), tmp_path / "split.png")
    bars = {container.get_label(): [bar.get_width() for bar in container] for container in drawn[1].axes[0].containers}
    assert bars == {"the model's passes": pytest.approx([10, 10]), "masks": pytest.approx([90, 10])}


def test_plots_are_files_and_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    for plot in (plots.plot_time, plots.plot_memory, plots.plot_split):
        plot(made_rows(), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    plots.plot_time([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_command_keeps_what_is_there_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    @contextmanager
    def memory_kept() -> Iterator[None]:
        events.append("kept")
        try:
            yield
        finally:
            events.append("given back")

    def stopped(*_: Any) -> Iterator[Row]:
        events.append("measuring")
        yield made_rows()[0]
        raise KeyboardInterrupt

    monkeypatch.setattr("skymask_gpu.bench.measure.freed_memory_kept", memory_kept)
    monkeypatch.setattr(run, "measure_cases", stopped)
    done = CliRunner().invoke(app, ["bench", "--quick", "--out", str(tmp_path / "bench")])
    assert done.exit_code == 130
    assert "x reference" in done.output
    assert "mean" in done.output, "what was measured is printed as a table"
    assert events == ["kept", "measuring", "given back"]
    assert run.read_rows(tmp_path / "bench" / "bench.csv") == made_rows()[:1]
    assert (tmp_path / "bench" / "time.png").exists()
    again = CliRunner().invoke(app, ["bench", "--quick", "--out", str(tmp_path / "bench")])
    assert "holds results already" in str(again.exception)
    unknown = CliRunner().invoke(app, ["bench", "--case", "cnm", "--out", str(tmp_path / "other")])
    assert "--case must be one of cnn, rules, logreg, resnet20, resnet18, got 'cnm'" in str(unknown.exception)


def test_the_cases_of_pytest_benchmark_run(checkout: Path) -> None:
    chosen = [f"bench/regression/test_{name}" for name in ("kernels.py", "server_round.py::test_a_round[fedavg-]")]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


# --- other measurements -------------------------------------------------------------------------------------------------


def test_clients_from_disk_are_judged_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert large.main([str(tmp_path), "--clients", "30"]) == 0
    printed = capsys.readouterr().out
    assert "0 labels wrong" in printed
    assert "auto: the updates are on disk" in printed
    (file,) = tmp_path.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    large.write_clients(tmp_path, 30)
    assert file.stat().st_mtime_ns == before, "what is there is used again"


def test_a_wrong_label_of_a_client_from_disk_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large.write_clients(tmp_path, 30)
    monkeypatch.setattr(large, "is_malicious", lambda size: torch.arange(size) < size // 5 + 1)
    assert large.judge(tmp_path, 30)["wrong_labels"] == 1


def test_a_row_of_the_accuracy_table_is_measured_and_drawn(tmp_path: Path) -> None:
    loss = FlatModel(*solvers.make_model(num_samples=20))
    updates_RP = solvers.honest_rows(loss, 31, seed=0)
    direction_P = root_direction(loss, loss.initial_params, RootTraining(steps=3))
    (row,) = accuracy.measure_case(updates_RP, loss, "sign-flip", direction_P)
    assert row["float32"] <= accuracy.FLOOR
    assert set(row["bins"]) == set(accuracy.BINS)
    assert 0 < row["bins"][64] < row["bins"][8] < 0.1
    assert 0 < row["bfloat16"] < row["8_bit"] < 0.1
    assert row["mean_error"][64] < row["mean_error"][8]
    assert row["same_labels"]
    assert row["allowed"] >= 1e-4
    accuracy._plot([row], tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert accuracy._table([row]).row_count == 1


def test_where_float32_is_not_stable_another_row_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = FlatModel(*solvers.make_model(num_samples=20))
    updates_RP = solvers.honest_rows(loss, 11, seed=0)
    monkeypatch.setattr(accuracy, "float32_error", lambda updates, loss, steps: 1e-5 if steps <= 4 else 1e-3)
    rows = accuracy.measure_case(updates_RP, loss, "none", torch.zeros(loss.num_params))
    assert [(row["steps"], row["float32"]) for row in rows] == [(20, 1e-3), (4, 1e-5)]
    assert rows[1]["bins"][8] < rows[0]["bins"][8]


def test_8_bits_keep_each_blocks_largest_value() -> None:
    updates_RP = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    rounded_RP = accuracy.in_8_bits(updates_RP)
    for part, rounded in zip(updates_RP.split(128, 1), rounded_RP.split(128, 1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        torch.testing.assert_close(rounded.abs().amax(1, keepdim=True), largest)
        assert ((rounded - part).abs() <= largest / 254 * 1.001).all()


def test_costs_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(costs, "NUM_PARAMS", 2000)
    assert costs.main() == 0
    assert capsys.readouterr().out.count("ns a column") == 4


def test_rates_of_many_clients_are_printed(
    mnist_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(many_clients, "CASES", ("none", "lie"))
    monkeypatch.setattr(many_clients, "DIVISORS", (1, 1000))
    assert many_clients.main(["--data-dir", str(mnist_dir), "--clients", "30"]) == 0
    printed = capsys.readouterr().out
    assert "none" in printed
    assert "0.00 / 1.00" in printed, "a thousandth of the learning rate finds nobody"
