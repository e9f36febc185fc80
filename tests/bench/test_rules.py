"""A rule's check lets the right result pass, and none that is nearly right."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skymask_gpu.bench import providers, rules, run
from skymask_gpu.bench.cases import CASES, Problem
from skymask_gpu.federation.rules import RULES


@pytest.fixture(scope="module")
def rules_problem(small: Any) -> Problem:
    """With lengths so different that each neighbour counts."""
    problem = small.problem(replace(CASES["logreg"], what="rules"), 23)
    lengths_R = torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).exp()
    noise_RP = torch.randn(problem.updates.shape, generator=torch.Generator().manual_seed(1))
    return replace(problem, updates=problem.updates + 0.01 * lengths_R * noise_RP)


@pytest.mark.parametrize("name", sorted(set(RULES) & set(rules.CHECKS)))
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
    if name in ("multi-krum", "bulyan", "skymask", "flguardian"):
        others_M = result.kept.roll(1)
        assert check(rules_problem, replace(result, kept=~others_M)) is not None


def test_the_checks_of_krum_count_neighbours_as_krum_does(rules_problem: Problem) -> None:
    """Points for which one neighbour more or less chooses others."""
    generator = torch.Generator().manual_seed(7)
    problems = [replace(rules_problem, updates=torch.randn(16, 2, generator=generator)) for _ in range(60)]
    for name, other in (("krum", "ByzFL Krum"), ("multi-krum", "ByzFL MultiKrum"), ("bulyan", None)):
        results = [providers._prepare_rule(name, problem)() for problem in problems]
        check, _ = rules.CHECKS[name]
        assert [check(problem, result) for problem, result in zip(problems, results, strict=True)] == [None] * 60
        if other is not None:
            assert any(rules.CHECKS[other][0](problem, result) for problem, result in zip(problems, results, strict=True))


@pytest.mark.usefixtures("few_repeats")
def test_a_rule_without_a_check_is_never_timed(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [p for p in providers.providers(CASES["rules"]) if p.name in ("flame", "krum", "ByzFL Median")]
    monkeypatch.setattr(run, "providers", lambda case: chosen)
    monkeypatch.setattr(providers, "byzfl_aggregator", lambda *_: None)
    rows = small.rows(small.limits(10, case="rules"))
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
