"""SkyMask's round, phase by phase, and the checks that a wrong round does not pass."""

import time
from dataclasses import replace
from typing import Any

import pytest

from skymask_gpu import SkyMask
from skymask_gpu.bench import run
from skymask_gpu.bench.cases import CASES, Problem
from skymask_gpu.bench.rounds import PHASES, TimedRound, wrong_round

SMALL = replace(CASES["round"], model="logreg", input_shape=(561,), num_classes=6)


@pytest.fixture(scope="module")
def problem(small: Any) -> Problem:
    return small.problem(SMALL, 20)


@pytest.mark.usefixtures("few_repeats")
def test_a_round_and_each_of_its_phases_have_a_row(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "round", SMALL)
    limits = small.limits(20, case="round")
    rows = small.rows(limits)
    assert len(rows) == run.count_rows(limits)
    assert {row.status for row in rows.values()} == {"ok"}
    for name in ("SkyMask", "SkyMask, prepared", "SkyMask, root_update"):
        whole, *phases = [rows[20, name], *[rows[20, f"{name}: {phase}"] for phase in PHASES]]
        assert whole.first_s
        assert whole.to_mean
        for row in phases:
            assert (row.repeats, row.first_s, row.peak_bytes, row.params) == (whole.repeats, None, None, 3372)
            assert row.to_mean_low <= row.to_mean <= row.to_mean_high
            assert row.compared_with == whole.compared_with


def test_each_phase_of_a_profile_belongs_to_one_row(problem: Problem) -> None:
    call = TimedRound(problem, given=False)
    start = time.perf_counter()
    call()
    assert 0 < sum(call.phases.values()) <= time.perf_counter() - start
    assert min(call.phases.values()) > 0
    model = problem.model
    defence = SkyMask(model.module, model.inputs, model.labels, solver="collapsed", profile=True)
    profile = defence.aggregate(problem.updates[:-1]).profile
    assert profile is not None
    # Only rounds with updates that are longer than the model have suspects.
    assert sorted([*profile.phases, "suspects"]) == sorted(name for names in PHASES.values() for name in names)


@pytest.mark.parametrize("given", [False, True])
def test_a_wrong_round_is_found(problem: Problem, given: bool) -> None:
    right = TimedRound(problem, given=given)()
    assert wrong_round(problem, right, given=given) is None
    kept = right.benign.clone()
    kept[0] = True
    assert "the verdict differs" in wrong_round(problem, replace(right, benign=kept), given=given)
    assert "the update is off" in wrong_round(problem, replace(right, update=1.01 * right.update), given=given)
    assert "a norm is off" in wrong_round(problem, replace(right, norms=1.001 * right.norms), given=given)
    cosines = right.cosines.roll(1)
    assert "a cosine with the root direction is off" in wrong_round(problem, replace(right, cosines=cosines), given=given)


def test_a_verdict_that_all_solvers_share_must_reject_the_attackers(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TimedRound(problem, given=False)()
    monkeypatch.setattr(Problem, "num_malicious", 5)
    assert "not the 5 attackers" in wrong_round(problem, right, given=False)
