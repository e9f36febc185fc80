"""What is timed, and the checks that a wrong solver or rule does not pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from skymask_gpu.bench import providers, run, solvers
from skymask_gpu.bench.cases import CASES, Case
from skymask_gpu.bench.providers import COMPILED, MEAN, PASSES, CannotRunError, Provider, Truth
from skymask_gpu.bench.table import NoCheckError

pytestmark = pytest.mark.usefixtures("few_repeats")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agreeing_solvers_get_times_and_ratios(dtype: str, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "logreg", replace(CASES["logreg"], dtypes=(dtype,)))
    limits = replace(small.limits(20), dtypes=(dtype,))
    rows = {row.provider: row for row in run.measure_cases(limits, torch.device("cpu"))}
    assert len(rows) == run.count_rows(limits)
    assert set(rows) == {MEAN, PASSES, "reference", "fused", "vmap", "collapsed", COMPILED}
    assert {name for name, row in rows.items() if row.status != "ok"} == {COMPILED}
    for row in rows.values():
        if row.status == "ok":
            assert row.median_s is not None
            assert row.p20_s <= row.median_s <= row.p80_s
            assert row.to_mean is not None
            assert (row.to_mean == 1) == (row.provider == MEAN)
    fused = rows["fused"]
    assert fused.to_reference_low <= fused.to_reference <= fused.to_reference_high
    assert rows["reference"].to_reference == 1
    assert rows[MEAN].to_reference is rows[PASSES].to_reference is None
    assert rows[PASSES].to_passes == 1
    assert fused.to_mean > fused.to_passes > 1
    assert fused.compared_with == "reference"
    assert rows["reference"].compared_with == "the definition"
    assert fused.params == 3372


def test_a_wrong_solver_gets_no_time(small: Any, sloppy: Callable[..., None]) -> None:
    sloppy("fused")
    rows = small.rows(small.limits(20))
    fused = rows[20, "fused"]
    assert (fused.status, fused.detail) == ("wrong", "1.2e-03 of the bits differ")
    timings = ("median_s", "p20_s", "p80_s", "repeats", "first_s", "to_mean", "to_passes", "to_reference", "peak_bytes")
    assert not any(getattr(fused, column) for column in timings)
    assert rows[20, "vmap"].status == "ok"


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
    wrong: Callable[..., bool], bytes_of_a_row: slice, detail: str | None, small: Any, sloppy: Callable[..., None]
) -> None:
    """A kink's worth of bits is 21 of 70,812."""
    problem = small.problem(num_clients=20)
    truth = Truth(providers.train(problem, "reference"), "reference")
    sloppy("fused", bytes_of_a_row, wrong)
    fused = providers.solver("fused")
    if detail is None:
        assert fused.check(problem, fused.prepare(problem)(), truth) == "reference in float64, 3 steps in float32"
    else:
        with pytest.raises(providers.WrongResultError, match=detail):
            fused.check(problem, fused.prepare(problem)(), truth)


def test_a_solver_that_cannot_run_is_a_row_with_the_reason(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "why_not_solver", lambda solver, *_: None if solver == "reference" else "no kernels here")
    rows = small.rows(small.limits(10))
    assert rows[10, "reference"].status == "ok"
    for name in ("fused", "vmap", "collapsed"):
        assert (rows[10, name].status, rows[10, name].detail) == ("skipped", "no kernels here")


def without_reference(case: Case) -> list[Provider]:
    def slow(problem: Any) -> Any:
        raise CannotRunError("slow")

    return [replace(p, prepare=slow) if p.name == "reference" else p for p in providers.providers(case)]


def test_where_reference_is_too_slow_fused_is_the_truth_if_it_agrees_with_few_clients(
    small: Any, sloppy: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "providers", without_reference)
    monkeypatch.setattr(providers, "FEW_CLIENTS", 10)
    rows = small.rows(small.limits(20))
    assert rows[20, "fused"].compared_with == "reference at N = 10"
    assert rows[20, "vmap"].compared_with == "fused"
    assert rows[20, "collapsed"].status == "ok"
    assert rows[20, "fused"].to_reference is None

    sloppy("fused")
    rows = small.rows(small.limits(20))
    for name in ("fused", "vmap", "collapsed"):
        assert (rows[20, name].status, rows[20, name].median_s) == ("wrong", None)
        assert rows[20, name].detail == "fused at N = 10: 1.2e-03 of the bits differ"


def test_without_any_truth_there_is_no_check(small: Any) -> None:
    problem = small.problem()
    truth = providers.establish_truth(problem, lambda name: None)
    with pytest.raises(NoCheckError, match="neither reference nor fused ran"):
        providers.solver("vmap").check(problem, None, truth)


def test_torch_compile_is_compared_as_well(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would compile is run as it is: compiling takes 20 seconds."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    row = small.rows(replace(small.limits(10), left_out=("vmap", "collapsed")))[10, COMPILED]
    assert row.status in ("ok", "skipped"), row.detail
    assert row.compared_with == "reference" or "C++ compiler" in row.detail
    with pytest.raises(CannotRunError, match=r"601 rows x 2 parameter tensors, at most 1,000|C\+\+ compiler"):
        providers._prepare_compiled(small.problem(num_clients=600))


def test_losses_and_steps_and_labels_are_compared_too(small: Any) -> None:
    masks = providers.train(small.problem(), "fused")
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
