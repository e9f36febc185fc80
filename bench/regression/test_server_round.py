"""What a server does in a round with 100 clients of the paper's CNN: SkyMask by each fast solver, and plain averaging.

``pytest bench/ --benchmark-only``; ``--benchmark-save=NAME`` on one commit, ``--benchmark-compare=NAME`` on another.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from skymask_gpu.bench.cases import CASES, Model, Problem
from skymask_gpu.bench.rules import CHECKS, make_context, make_info, make_settings
from skymask_gpu.federation.rules import build_rule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    case = CASES["rules"]
    return Problem.build(case, Model.build(case, DEVICE), 100, seed=0, free_bytes=None)


@pytest.mark.parametrize(("rule", "solver"), [("fedavg", ""), ("skymask", "fused"), ("skymask", "collapsed")])
def test_a_round(benchmark: BenchmarkFixture, problem: Problem, rule: str, solver: str) -> None:
    built, info = build_rule(rule, make_context(problem), make_settings(rule, problem, solver or "auto")), make_info(problem)

    def play() -> object:
        result = built(problem.updates[:-1], info)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    check, _ = CHECKS[rule]
    assert check(problem, built(problem.updates[:-1], info)) is None
    benchmark.pedantic(play, rounds=5, warmup_rounds=1)
