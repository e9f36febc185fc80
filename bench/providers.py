"""What is timed: baselines, solvers, aggregation rules and ByzFL's, each with a check."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.bench.cases import Case, Model, Problem
from skymask_gpu.bench.rounds import PHASES, TimedRound, wrong_round
from skymask_gpu.bench.rules import BYZFL, CHECKS, byzfl_aggregator, make_info, make_rule
from skymask_gpu.bench.solvers import differing_share, disagreement
from skymask_gpu.bench.table import CannotRunError, NoCheckError, WrongResultError
from skymask_gpu.defence import Aggregation
from skymask_gpu.engine import TrainedMasks, train_masks, why_not_solver
from skymask_gpu.engine.solvers import reference
from skymask_gpu.federation.rules import RULES, RuleResult

__all__ = [
    "COMPILED",
    "FEW_CLIENTS",
    "MEAN",
    "PASSES",
    "Provider",
    "Truth",
    "check_gradient",
    "check_rule",
    "establish_truth",
    "providers",
    "solver",
    "train",
]

MEAN, PASSES, COMPILED = "mean of the rows", "model passes", "reference, torch.compile"
# Where reference takes too long, fused is the truth if it agrees with reference on this number of
# clients.
FEW_CLIENTS = 50
# The collapsed solver is approximate. Its bits may differ by twice what rounding the updates to
# bfloat16 changes, or by the first share if that is more; its losses by the second share of the
# first loss.
_LEAST_COLLAPSED_DIFFERING, _MOST_COLLAPSED_LOSS_ERROR = 1e-4, 1e-3
# Rounding may put a gradient at a kink of ReLU or pooling to either side, which shows in all later
# steps and rows. It may change this share of the bits and losses, but not the first steps.
_MOST_BY_A_KINK, _STABLE_STEPS = 1e-3, 3
# torch.compile writes out every row and parameter tensor, which takes about 20 s for this many.
_MOST_COMPILED = 1_000
# Beyond this number of clients, only rounds without a root update are measured.
_MOST_WITH_ROOT_UPDATE = 500

Call = Callable[[], Any]


@dataclass(frozen=True)
class Truth:
    """The masks that all solvers are compared with; ``error`` says why there are none.

    Attributes:
        solver: which solver trained them.
    """

    masks: TrainedMasks | None = None
    solver: str = ""
    error: Exception | None = None

    def known(self) -> TrainedMasks:
        """The masks.

        Raises:
            Exception: there are none.
        """
        if self.masks is None:
            raise self.error or NoCheckError("neither reference nor fused ran: there is nothing to compare with")
        return self.masks


@dataclass(frozen=True)
class Provider:
    """Something that is checked and timed: one line of the plots.

    Attributes:
        name: its label.
        prepare: makes the call from the problem; raises a NotTimedError if there can be none.
        check: tells what a result agrees with; raises a NotTimedError if the result is wrong or has
            no check.
        baselines: the columns of the ratios that its row has.
        baseline: the column of ratios to it, if it is a baseline itself.
        parts: makes the number of like parts of a baseline's call: each must take a millisecond on
            a CPU.
        timed: makes the call that is timed, if it is another one than the one that is checked.
        moved_bytes: makes the number of bytes that the call has to read and write.
        phases: the names of the phases that the call knows; each gets a row of its own.
    """

    name: str
    prepare: Callable[[Problem], Call]
    check: Callable[[Problem, Any, Truth], str]
    baselines: tuple[str, ...] = ("to_mean", "to_passes")
    baseline: str = ""
    parts: Callable[[Problem], int] = lambda problem: 1
    timed: Callable[[Problem], Call] | None = None
    moved_bytes: Callable[[Problem], int] | None = None
    phases: tuple[str, ...] = ()


def providers(case: Case) -> list[Provider]:
    """The two baselines, then the solvers, the rules or SkyMask's rounds."""
    baselines = [
        Provider(MEAN, _prepare_mean, partial(check_rule, "fedavg"), ("to_mean",), "to_mean"),
        Provider(PASSES, _prepare_passes, check_gradient, ("to_mean",), "to_passes", lambda problem: problem.case.mask_steps),
    ]
    return baselines + {"solvers": _solvers, "rules": _rules, "round": _rounds}[case.what]()


# --- baselines ------------------------------------------------------------------------------------


def _prepare_mean(problem: Problem) -> Call:
    """One read of all rows: no aggregation can be faster."""
    return lambda: RuleResult(problem.updates[:-1].mean(0), None)


def _prepare_passes(problem: Problem) -> Call:
    """The model's own forward and backward passes: no mask training can be faster."""
    loss, steps = problem.model.loss, problem.case.mask_steps

    def passes() -> Tensor:
        for _ in range(steps):
            params_P = loss.initial_params.detach().requires_grad_()
            (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
        return grad_P

    return passes


def check_gradient(problem: Problem, grad_P: Tensor, truth: Truth) -> str:
    exact = problem.model.loss.to(torch.float64)
    params_P = exact.initial_params.requires_grad_()
    (want_P,) = torch.autograd.grad(exact(params_P), params_P)
    error = float((grad_P - want_P).norm() / want_P.norm())
    if not error <= 1e-2:
        raise WrongResultError(f"the gradient is off by {error:.1e}")
    return "the gradient in float64"


# --- solvers --------------------------------------------------------------------------------------


def establish_truth(problem: Problem, first_result: Callable[[str], TrainedMasks | None]) -> Truth:
    """The masks that the solvers of a problem are compared with.

    They are those of reference, or of fused where it has agreed.

    Args:
        problem: the problem.
        first_result: a solver's result, or None where it does not run or takes too long.
    """
    if problem.case.what != "solvers":
        return Truth()
    for name in ("reference", "fused"):
        masks = first_result(name)
        if masks is None:
            continue
        wrong = _wrong_with_few_clients(problem.case, problem.model, problem.dtype) if name == "fused" else None
        if wrong is not None:
            return Truth(error=WrongResultError(f"fused at N = {FEW_CLIENTS}: {wrong}"))
        return Truth(masks, name)
    return Truth()


@cache
def _wrong_with_few_clients(case: Case, model: Model, dtype: str) -> str | None:
    """In what fused differs from reference."""
    problem = Problem.build(case, model, FEW_CLIENTS).to(dtype)
    truth, masks = (train(problem, name) for name in ("reference", "fused"))
    try:
        _check_solver("fused", problem, masks, Truth(truth, "reference"))
    except WrongResultError as wrong:
        return str(wrong)
    return None


def solver(name: str) -> Provider:
    """A solver of ``train_masks``."""
    return Provider(name, partial(_prepare_solver, name), partial(_check_solver, name))


def _solvers() -> list[Provider]:
    names = ("reference", "fused", "collapsed", "vmap")
    return [*map(solver, names), Provider(COMPILED, _prepare_compiled, partial(_check_solver, COMPILED))]


def _prepare_solver(name: str, problem: Problem) -> Call:
    reason = why_not_solver(name, problem.updates.device, problem.updates.dtype)
    if reason is not None:
        raise CannotRunError(reason)
    return lambda: train(problem, name)


def train(problem: Problem, solver: str, updates_RP: Tensor | None = None) -> TrainedMasks:
    """Masks of the problem's updates, or of others in their place."""
    params_P, loss = problem.model.loss.initial_params, problem.model.loss
    rows_RP = problem.updates if updates_RP is None else updates_RP
    return train_masks(rows_RP, params_P, loss, config=problem.training, solver=solver)


def _prepare_compiled(problem: Problem) -> Call:
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
    train_compiled = torch.compile(reference.train)
    loss, config = problem.model.loss, problem.training.for_clients(problem.num_clients)

    def run() -> TrainedMasks:
        solution = train_compiled(problem.updates, loss.initial_params, loss, config, False)
        return TrainedMasks(
            solution.bits, loss.num_params, None, solution.losses, len(solution.losses), COMPILED, "asked for", {}
        )

    return run


def _check_solver(name: str, problem: Problem, masks: TrainedMasks, truth: Truth) -> str:
    want = truth.known()
    if name == truth.solver:
        return "the definition" if name == "reference" else f"reference at N = {FEW_CLIENTS}"
    if name == "collapsed":
        rounded = train(problem, "fused", problem.exact_updates.bfloat16())
        exact = train(problem, "fused", problem.exact_updates)
        allowed = max(2 * differing_share(rounded, exact), _LEAST_COLLAPSED_DIFFERING)
        wrong = disagreement(masks, want, most_differing=allowed, most_loss_error=_MOST_COLLAPSED_LOSS_ERROR)
    else:
        wrong = disagreement(masks, want)
        if wrong is not None and name in ("fused", "vmap") and _is_rounding(name, problem, masks, truth):
            return f"{truth.solver} in float64, {_STABLE_STEPS} steps in float32"
    if wrong is not None:
        raise WrongResultError(wrong)
    return truth.solver


def _is_rounding(name: str, problem: Problem, masks: TrainedMasks, truth: Truth) -> bool:
    """Whether only rounding parts two solvers.

    They then differ little, not in the first steps, and not in float64.
    """

    def agree(problem: Problem, updates_RP: Tensor) -> bool:
        return disagreement(*(train(problem, solver, updates_RP) for solver in (name, truth.solver))) is None

    few_steps = replace(problem, case=replace(problem.case, mask_steps=min(_STABLE_STEPS, problem.case.mask_steps)))
    exact = replace(problem, model=replace(problem.model, loss=problem.model.loss.to(torch.float64)))
    return (
        disagreement(masks, truth.known(), most_differing=_MOST_BY_A_KINK, most_loss_error=_MOST_BY_A_KINK) is None
        and agree(few_steps, problem.updates)
        and agree(exact, problem.updates.double())
    )


# --- rules ----------------------------------------------------------------------------------------


def _rules() -> list[Provider]:
    prepared = {name: partial(_prepare_rule, name) for name in sorted(RULES)}
    prepared |= {f"ByzFL {name}": partial(_prepare_byzfl, name) for name in BYZFL}
    # only SkyMask runs the model
    baselines = {"skymask": ("to_mean", "to_passes")}
    return [Provider(name, x, partial(check_rule, name), baselines.get(name, ("to_mean",))) for name, x in prepared.items()]


def _prepare_rule(name: str, problem: Problem) -> Call:
    if name not in CHECKS:
        raise NoCheckError("its result is not checked here, so it is not timed")
    rule, rows_NP = make_rule(name, problem), problem.updates[:-1]

    def call() -> RuleResult:
        # Each call is a first round: what a rule draws or remembers must not depend on others.
        rule.restore({})
        return rule(rows_NP, make_info(problem))

    return call


def check_rule(name: str, problem: Problem, result: RuleResult, truth: Truth) -> str:
    wrong, compared_with = CHECKS[name]
    reason = wrong(problem, result)
    if reason is not None:
        raise WrongResultError(reason)
    return compared_with


def _rounds() -> list[Provider]:
    """A whole round, one that was prepared, and one with a root update of the caller's."""
    named = {
        "SkyMask": {"given": False},
        "SkyMask, prepared": {"given": False, "prepared": True},
        "SkyMask, root_update": {"given": True},
    }
    return [
        Provider(name, partial(_prepare_round, how), partial(_check_round, how["given"]), phases=tuple(PHASES))
        for name, how in named.items()
    ]


def _prepare_round(how: dict[str, bool], problem: Problem) -> TimedRound:
    if how["given"] and problem.num_clients > _MOST_WITH_ROOT_UPDATE:
        raise CannotRunError(f"up to N = {_MOST_WITH_ROOT_UPDATE} it costs what a round without root_update costs")
    return TimedRound(problem, **how)


def _check_round(given: bool, problem: Problem, result: Aggregation, truth: Truth) -> str:
    reason = wrong_round(problem, result, given=given)
    if reason is not None:
        raise WrongResultError(reason)
    return "solver fused, NumPy in float64"


def _prepare_byzfl(name: str, problem: Problem) -> Call:
    aggregate = byzfl_aggregator(name, problem.num_malicious)
    if aggregate is None:
        raise CannotRunError("byzfl is not installed: pip install --no-deps byzfl")
    rows_NP = problem.updates[:-1]
    return lambda: RuleResult(aggregate(rows_NP), None)
