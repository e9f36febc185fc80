"""Who is timed: the floors, the solvers, the aggregation rules and ByzFL's, each with a check of its result."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.bench.cases import Case, Problem
from skymask_gpu.bench.rules import BYZFL, CHECKS, byzfl_aggregator, make_context, make_info, make_settings
from skymask_gpu.bench.solvers import differing_share, disagreement
from skymask_gpu.engine import SOLVERS, TrainedMasks, train_masks, why_not_solver
from skymask_gpu.engine.solvers import reference
from skymask_gpu.federation.rules import RULES, Rule, RuleResult, build_rule

__all__ = ["COMPILED", "MEAN", "PASSES", "CannotRunError", "NoCheckError", "Provider", "providers"]

MEAN, PASSES, COMPILED = "mean of the rows", "model passes", "reference, torch.compile"
# The collapsed solver is approximate: its bits may differ by twice what rounding the updates to bfloat16 changes, or by this
# share if that is more; its losses by so much of the first.
_LEAST_COLLAPSED_DIFFERING, _MOST_COLLAPSED_LOSS_ERROR = 1e-4, 1e-3
# A gradient at a kink of ReLU or pooling, which rounding puts to either side, shows in all later steps and in all rows. It may
# change so many bits and so much of the losses; the first steps have to be the same.
_MOST_BY_A_KINK, _STABLE_STEPS = 1e-3, 3
# Compiling writes every row and parameter tensor out: about 20 s for so many of them.
_MOST_COMPILED = 1_000


class CannotRunError(Exception):
    """A provider cannot run here; the message says why."""


class NoCheckError(Exception):
    """There is nothing to compare a result with, so it is not timed."""


@dataclass(frozen=True)
class Provider:
    """One line of the plots.

    Attributes:
        name: its label.
        prepare: from the problem to the call that is timed; raises :class:`CannotRunError`.
        check: of a problem and a call's result: what is wrong, or None. It raises :class:`NoCheckError`; a ValueError it lets
            through is a failure.
        compared_with: with what.
        floors: what its time is held against.
    """

    name: str
    prepare: Callable[[Problem], Callable[[], Any]]
    check: Callable[[Problem, Any], str | None]
    compared_with: Callable[[Problem], str]
    floors: tuple[str, ...] = (MEAN, PASSES)


def providers(case: Case) -> list[Provider]:
    """The floors, then those of the case, `reference` and `fused` before those who are compared with them."""
    own = _solvers() if case.what == "solvers" else _rules()
    return [_mean(), _passes(), *own]


# --- floors -------------------------------------------------------------------------------------------------------------


def _mean() -> Provider:
    """What no aggregation can pass: one read of all rows."""
    check, compared_with = CHECKS["fedavg"]
    return Provider(
        MEAN,
        lambda problem: lambda: RuleResult(problem.updates[:-1].mean(0), None),
        check,
        _always(compared_with),
        floors=(MEAN,),
    )


def _passes() -> Provider:
    """What no mask training can pass: the model's own forward and backward passes."""

    def prepare(problem: Problem) -> Callable[[], Tensor]:
        loss, steps = problem.model.loss, problem.case.mask_steps

        def passes() -> Tensor:
            for _ in range(steps):
                params_P = loss.initial_params.detach().requires_grad_()
                (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
            return grad_P

        return passes

    def check(problem: Problem, grad_P: Tensor) -> str | None:
        exact = problem.model.loss.to(torch.float64)
        params_P = exact.initial_params.requires_grad_()
        (want_P,) = torch.autograd.grad(exact(params_P), params_P)
        error = float((grad_P - want_P).norm() / want_P.norm())
        return None if error <= 1e-2 else f"the gradient is off by {error:.1e}"

    return Provider(PASSES, prepare, check, _always("the gradient in float64"))


# --- solvers ------------------------------------------------------------------------------------------------------------


def _solvers() -> list[Provider]:
    """`reference`, and who is compared with it; or with `fused` where it is too slow."""
    compared_with = lambda problem: problem.truth_name  # noqa: E731
    return [
        *(Provider(name, partial(_prepare_solver, name), partial(_check_solver, name), compared_with) for name in _SOLVERS),
        Provider(COMPILED, _prepare_compiled, partial(_check_solver, COMPILED), compared_with),
    ]


_SOLVERS = tuple(SOLVERS)


def _prepare_solver(name: str, problem: Problem) -> Callable[[], TrainedMasks]:
    reason = why_not_solver(name, problem.updates.device, problem.updates.dtype)
    if reason is not None:
        raise CannotRunError(reason)
    return lambda: _train(problem.updates, problem, name)


def _train(updates_RP: Tensor, problem: Problem, solver: str) -> TrainedMasks:
    params_P, loss = problem.model.loss.initial_params, problem.model.loss
    return train_masks(updates_RP, params_P, loss, config=problem.training, solver=solver)


def _prepare_compiled(problem: Problem) -> Callable[[], TrainedMasks]:
    if problem.updates.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise CannotRunError("torch.compile needs a C++ compiler, none was found")
    rows, tensors = len(problem.updates), len(problem.model.loss.layer_sizes)
    if rows * tensors > _MOST_COMPILED:
        raise CannotRunError(
            f"compiling writes out {rows:,} rows x {tensors} parameter tensors, at most {_MOST_COMPILED:,} are tried"
        )
    if problem.dtype != "float32":
        raise CannotRunError("as in float32, to which reference converts the rows first")
    torch._dynamo.reset()
    train = torch.compile(reference.train)
    loss, config = problem.model.loss, problem.training.for_clients(problem.num_clients)

    def run() -> TrainedMasks:
        solution = train(problem.updates, loss.initial_params, loss, config, False)
        return TrainedMasks(
            solution.bits, loss.num_params, None, solution.losses, len(solution.losses), COMPILED, "asked for", {}
        )

    return run


def _check_solver(name: str, problem: Problem, masks: TrainedMasks) -> str | None:
    if problem.truth is None and name == "reference":
        problem.truth, problem.truth_name = masks, "the definition"
        return None
    if problem.truth is None and name == "fused" and name in problem.agreed:
        problem.truth, problem.truth_name = masks, f"reference at N = {problem.agreed[name]:,}"
        return None
    if problem.truth is None:
        raise NoCheckError("neither reference ran, nor fused where it had agreed with it before: nothing to compare with")
    problem.truth_name = problem.truth.solver
    if name == "collapsed":
        rounded, exact = (_train(rows, problem, "fused") for rows in (problem.exact_updates.bfloat16(), problem.exact_updates))
        allowed = max(2 * differing_share(rounded, exact), _LEAST_COLLAPSED_DIFFERING)
        return disagreement(masks, problem.truth, most_differing=allowed, most_loss_error=_MOST_COLLAPSED_LOSS_ERROR)
    reason = disagreement(masks, problem.truth)
    if reason is not None and name in ("fused", "vmap") and _is_rounding(name, problem, masks, problem.truth):
        problem.truth_name = f"{problem.truth.solver} in float64, {_STABLE_STEPS} steps in float32"
        reason = None
    if reason is None and problem.truth.solver == "reference":
        problem.agreed[name] = problem.num_clients
    return reason


def _is_rounding(name: str, problem: Problem, masks: TrainedMasks, truth: TrainedMasks) -> bool:
    """Whether rounding alone parts two solvers: not by much, not in the first steps, and in float64 in none."""

    def agree(problem: Problem, updates_RP: Tensor) -> bool:
        return disagreement(*(_train(updates_RP, problem, solver) for solver in (name, truth.solver))) is None

    few_steps = replace(problem, case=replace(problem.case, mask_steps=min(_STABLE_STEPS, problem.case.mask_steps)))
    exact = replace(problem, model=replace(problem.model, loss=problem.model.loss.to(torch.float64)))
    return (
        disagreement(masks, truth, most_differing=_MOST_BY_A_KINK, most_loss_error=_MOST_BY_A_KINK) is None
        and agree(few_steps, problem.updates)
        and agree(exact, problem.updates.double())
    )


# --- rules --------------------------------------------------------------------------------------------------------------


def _rules() -> list[Provider]:
    # others than SkyMask run no model
    floors = {"skymask": (MEAN, PASSES)}
    ours = [Provider(name, partial(_prepare_rule, name), *_checked(name), floors.get(name, (MEAN,))) for name in sorted(RULES)]
    peers = [
        Provider(f"ByzFL {name}", partial(_prepare_byzfl, name), check, _always(compared_with), (MEAN,))
        for name, (_, check, compared_with) in BYZFL.items()
    ]
    return ours + peers


def _prepare_rule(name: str, problem: Problem) -> Callable[[], RuleResult]:
    if name not in CHECKS:
        raise NoCheckError("its result is not checked here, so it is not timed")
    rule, info, rows_NP = _built_rule(name, problem), make_info(problem), problem.updates[:-1]
    return lambda: rule(rows_NP, info)


def _built_rule(name: str, problem: Problem) -> Rule:
    return build_rule(name, make_context(problem), make_settings(name, problem))


def _checked(name: str) -> tuple[Callable[[Problem, Any], str | None], Callable[[Problem], str]]:
    if name not in CHECKS:
        return lambda *_: None, _always("")
    check, compared_with = CHECKS[name]
    return check, _always(compared_with)


def _always(text: str) -> Callable[[Problem], str]:
    return lambda _: text


def _prepare_byzfl(name: str, problem: Problem) -> Callable[[], RuleResult]:
    aggregate = byzfl_aggregator(name, problem.num_malicious)
    if aggregate is None:
        raise CannotRunError("byzfl is not installed: pip install --no-deps byzfl")
    rows_NP = problem.updates[:-1]
    return lambda: RuleResult(aggregate(rows_NP), None)
