"""The runner: every result is checked first, every failure is a row with the reason, and time and memory are limited."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from skymask_gpu.bench import run
from skymask_gpu.bench.cases import CASES, Model, Problem, TooLargeError
from skymask_gpu.bench.measure import Measured, free_memory
from skymask_gpu.bench.points import Limits, points
from skymask_gpu.bench.providers import MEAN, PASSES, Provider
from skymask_gpu.bench.ratio import Ratio
from skymask_gpu.bench.table import Row

CPU = torch.device("cpu")


def fail(problem: Problem) -> None:
    raise IndexError("no such thing")


def exhaust(*_: Any) -> None:
    """As a GPU does."""
    raise torch.OutOfMemoryError("no more")


@pytest.mark.usefixtures("few_repeats")
def test_results_are_checked_and_timed_without_tf32(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions, seen = torch.backends.cudnn.conv, []

    def check(*_: Any) -> str:
        seen.append(f"checked in {convolutions.fp32_precision}")
        return "nothing"

    noting = Provider("noting", lambda problem: lambda: seen.append(convolutions.fp32_precision), check)
    monkeypatch.setattr(run, "providers", lambda case: [noting])
    assert convolutions.fp32_precision == "tf32"
    assert small.rows(small.limits(5))[5, "noting"].status == "ok"
    assert len(seen) > 3
    assert set(seen) == {"ieee", "checked in ieee"}
    assert convolutions.fp32_precision == "tf32"


def test_a_ratio_to_reference_is_of_the_same_round_and_unit() -> None:
    """The machine slows down; the reference takes part in fewer rounds; without both in passes it is seconds."""
    own = Measured([1.0, 2.0, 4.0, 80.0], None, {"to_passes": [3.0, 6.0, 9.0, 90.0]})
    reference = Measured([4.0, 8.0, 16.0], None, {"to_passes": [6.0, 12.0, 18.0]})
    assert run._to_reference(own, reference) == Ratio(0.5, 0.5, 0.5)
    assert run._to_reference(own, replace(reference, ratios={})) == Ratio(0.25, 0.25, 0.25)
    assert run._to_reference(replace(own, ratios={}), reference) == Ratio(0.25, 0.25, 0.25)
    assert run._to_reference(own, None) is run._to_reference(own, IndexError()) is None


@pytest.mark.usefixtures("few_repeats")
def test_what_fails_or_runs_out_of_memory_is_a_row_and_the_next_goes_on(small: Any, play: Callable[..., None]) -> None:
    all_that_is_free = free_memory(CPU)
    if all_that_is_free is None:
        pytest.skip("this system does not tell how much memory is free")
    play(
        greedy=lambda problem: torch.empty(all_that_is_free, dtype=torch.uint8),
        failing=fail,
        exhausting=exhaust,
        modest=lambda problem: torch.empty(2**20),
    )
    rows = small.rows(small.limits(5))
    assert rows[5, "greedy"].status == "out of memory"
    assert "allocate" in rows[5, "greedy"].detail
    assert (rows[5, "failing"].status, rows[5, "failing"].detail) == ("failed", "IndexError: no such thing")
    assert (rows[5, "exhausting"].status, rows[5, "exhausting"].detail) == ("out of memory", "no more")
    assert rows[5, "modest"].status == "ok"


def test_without_updates_every_row_says_why(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "build", exhaust)
    rows = small.rows(small.limits(5))
    assert len(rows) == run.count_rows(small.limits(5))
    assert {(row.status, row.detail) for row in rows.values()} == {("out of memory", "no more")}


@pytest.mark.usefixtures("few_repeats")
@pytest.mark.parametrize("is_baseline", [True, False])
def test_what_fails_only_later_has_no_time(is_baseline: bool, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a baseline nobody has one. A baseline is timed before it is measured itself."""
    calls: list[int] = []

    def at_last() -> None:
        calls.append(0)
        if len(calls) == (2 if is_baseline else 3):
            fail(small)

    failing = Provider("failing", lambda problem: at_last, lambda *_: "", baseline="to_mean" if is_baseline else "")
    always = Provider("always", lambda problem: lambda: None, lambda *_: "")
    monkeypatch.setattr(run, "providers", lambda case: [failing, always])
    rows = small.rows(small.limits(5))
    row = rows[5, "failing"]
    assert (row.status, row.detail) == ("failed", "IndexError: no such thing")
    assert not any((row.median_s, row.repeats, row.first_s, row.compared_with, row.to_mean))
    assert rows[5, "always"].status == ("failed" if is_baseline else "ok")


@pytest.mark.usefixtures("few_repeats")
def test_slow_calls_are_stopped_and_not_tried_with_more_clients(small: Any, play: Callable[..., None]) -> None:
    calls = []

    def linear(problem: Problem) -> None:
        calls.append(problem.num_clients)
        time.sleep(0.004 * problem.num_clients)

    def endless(problem: Problem) -> None:
        while True:
            time.sleep(0.01)

    play(linear=linear, endless=endless)
    rows = small.rows(small.limits(5, 10, 100, call_seconds=0.2))
    assert rows[10, "linear"].status == "ok"
    assert rows[100, "linear"].status == "skipped"
    assert re.fullmatch(r"about 0.\d+ s a call expected from N = 10, the limit is 0.2 s", rows[100, "linear"].detail)
    assert 100 not in calls
    assert rows[5, "endless"].detail == "stopped after 0.6 s"
    assert rows[10, "endless"].detail.startswith("about 1.2 s a call expected from N = 5")


@pytest.mark.usefixtures("few_repeats")
def test_a_call_over_the_limit_has_no_time_unless_it_was_compiling(small: Any, play: Callable[..., None]) -> None:
    compiled = []

    def compiling(problem: Problem) -> None:
        time.sleep(0.0 if compiled else 0.25)
        compiled.append(True)

    play(compiling=compiling, slow=lambda problem: time.sleep(0.25))
    rows = small.rows(small.limits(5, call_seconds=0.2))
    assert rows[5, "compiling"].status == "ok"
    assert rows[5, "compiling"].first_s > 0.25
    assert rows[5, "slow"].status == "skipped"
    assert rows[5, "slow"].detail.endswith("s a call, the limit is 0.2 s")


def rows_until_ctrl_c(limits: Limits) -> list[Row]:
    rows: list[Row] = []

    def collect() -> None:
        for row in run.measure_cases(limits, CPU):
            rows.append(row)

    with pytest.raises(KeyboardInterrupt):
        collect()
    return rows


@pytest.mark.usefixtures("few_repeats")
def test_rows_are_there_although_they_were_stopped_in_the_middle_of_a_table(small: Any, play: Callable[..., None]) -> None:
    """Ctrl-C while the second provider is repeated the second time, the third has one repeat."""
    calls: list[str] = []

    def call(name: str) -> None:
        calls.append(name)
        if name == "b" and calls.count("b") == 4:
            raise KeyboardInterrupt

    play(a=lambda problem: call("a"), b=lambda problem: call("b"), c=lambda problem: call("c"))
    rows = rows_until_ctrl_c(small.limits(5, 10))
    assert [(row.provider, row.clients, row.status, row.repeats) for row in rows] == [
        ("a", 5, "ok", 2),
        ("b", 5, "ok", 1),
        ("c", 5, "ok", 1),
    ]


@pytest.mark.usefixtures("few_repeats")
def test_what_was_not_repeated_when_stopped_says_so(small: Any, play: Callable[..., None]) -> None:
    calls: list[int] = []

    def stop(problem: Problem) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    play(stops=stop)
    rows = rows_until_ctrl_c(small.limits(5))
    assert [(row.status, row.detail, row.median_s) for row in rows] == [("skipped", "stopped", None)]


@pytest.mark.usefixtures("few_repeats")
def test_providers_that_are_not_side_by_side_have_their_row_before_the_next_begins(
    small: Any, play: Callable[..., None]
) -> None:
    """As on a GPU, where a row is on disk before anything else can go wrong."""
    events: list[str] = []
    play(a=lambda problem: events.append("a"), b=lambda problem: events.append("b"))
    for row in run.measure_cases(small.limits(5, side_by_side=False), CPU):
        events.append(f"row {row.provider}")
    assert [event for event, before in zip(events, [None, *events], strict=False) if event != before] == [
        "a",
        "row a",
        "b",
        "row b",
    ]


@pytest.mark.usefixtures("few_repeats")
def test_freed_memory_is_given_back_before_each_table_and_first_call(
    small: Any, play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was freed and kept in pieces, a call that takes most of the memory would fail."""
    events: list[str] = []
    monkeypatch.setattr("skymask_gpu.bench.run.give_back_freed", lambda: events.append("given back"))
    play(a=lambda problem: events.append("a"), b=lambda problem: events.append("b"))
    small.rows(small.limits(5))
    assert events[:5] == ["given back", "given back", "a", "given back", "b"]


def test_updates_that_leave_no_room_are_not_made() -> None:
    with pytest.raises(TooLargeError, match=r"the updates alone take 1,256.2 of 1.0 GiB"):
        Problem.build(CASES["logreg"], Model.build(CASES["logreg"], CPU), 10**8, free_bytes=2**30)


def test_points_come_in_the_order_that_a_reader_needs_them() -> None:
    """Few clients first, of these float32 first, but the README's points before all; over a gigabyte of updates last."""
    limits = Limits((50, 500, 5_000), ("rules", "cnn", "resnet18"), ("float32", "bfloat16"))
    assert [(case.name, clients, dtype) for case, clients, dtype in points(limits)] == [
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


def test_once_the_time_is_spent_all_rows_say_so(small: Any) -> None:
    limits = small.limits(5, 10, total_seconds=-1.0)
    rows = small.rows(limits)
    assert len(rows) == run.count_rows(limits)
    assert {(row.status, row.detail) for row in rows.values()} == {("skipped", "the -1 s of this run were spent")}
    assert {name for _, name in rows} >= {MEAN, PASSES, "reference"}
