"""What ``bench/gpu.py`` times.

These are a copy, the model's passes, an exact step, the bins, the solvers, and the server's round.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.bench.cases import Case, Model, Problem
from skymask_gpu.bench.gpu_bins import bin_figures
from skymask_gpu.bench.providers import FEW_CLIENTS, Call, Provider, Truth, check_gradient, check_rule, providers, solver
from skymask_gpu.bench.rules import some_columns
from skymask_gpu.bench.solvers import MOST_DIFFERING, MOST_LOSS_ERROR, differing_share, disagreement
from skymask_gpu.bench.table import COPY, SEED, CannotRunError, WrongResultError
from skymask_gpu.defence import RootTraining, SkyMask, mean_of_rows, root_direction
from skymask_gpu.engine import ClientBlocks, Clustering, FlatModel, MaskTraining, TrainedMasks, cluster_masks, train_masks
from skymask_gpu.engine.numerics import deterministic_convolutions, with_tf32
from skymask_gpu.engine.replayed_loss import ReplayedLoss
from skymask_gpu.engine.solvers.solution import loss_and_gradient
from skymask_gpu.federation.rules import RuleResult
from skymask_gpu.kernels import first_step, first_step_reference, next_step, next_step_reference

__all__ = ["FEWEST_CLIENTS", "figures"]

FEWEST_CLIENTS = 100
STEPS = 20
TRAINING = MaskTraining(steps=STEPS, min_improvement=-1e9)
COPIED_BYTES = 2**30
COMPILED = "model passes, captured, torch.compile"
# Labels are compared with a CPU's up to this number of clients and of parameters, where that takes
# seconds.
_LABELLED = (500, 10**6)


def figures(case: Case) -> list[Provider]:
    """What is timed on a GPU; the baselines come first."""
    mean, passes = providers(case)[:2]
    all_steps = lambda problem: replace(problem, case=replace(problem.case, mask_steps=STEPS))  # noqa: E731
    launched = Provider("model passes, launched", lambda problem: passes.prepare(all_steps(problem)), check_gradient)
    captured = Provider("model passes, captured", partial(_captured_passes, False), check_gradient)
    return [
        Provider(COPY, _copy, _check_copy, (), moved_bytes=lambda problem: 2 * COPIED_BYTES),
        replace(mean, moved_bytes=lambda problem: 4 * problem.updates.numel()),
        replace(captured, baselines=("to_mean",), baseline="to_passes"),
        replace(captured, name="model passes, captured, TF32", timed=_passes_in_tf32),
        launched,
        Provider(COMPILED, partial(_captured_passes, True), check_gradient),
        Provider("next_step", _next_step, _check_next_step, moved_bytes=lambda problem: 12 * problem.updates.numel()),
        *bin_figures(),
        replace(solver("reference"), timed=_only_compared),
        *(_all_steps(solver(name)) for name in ("fused", "collapsed")),
        Provider("mask training, clustering, averaging", _judging, _check_judging),
        Provider("aggregate", _aggregate, _check_aggregate),
    ]


# --- baselines ------------------------------------------------------------------------------------


def _copy(problem: Problem) -> Call:
    source = torch.arange(COPIED_BYTES // 4, dtype=torch.float32, device=problem.updates.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _check_copy(problem: Problem, target: Tensor, truth: Truth) -> str:
    if not torch.equal(target, torch.arange(len(target), dtype=torch.float32, device=target.device)):
        raise WrongResultError("the copy differs")
    return "the source"


def _captured_passes(compile: bool, problem: Problem) -> Call:
    """The model's passes as the solvers run them, which is in a captured CUDA graph."""
    if compile and problem.num_clients > FEWEST_CLIENTS:
        raise CannotRunError(f"as with {FEWEST_CLIENTS} clients: it does not depend on them")
    model = problem.model
    loss = FlatModel(model.module, model.inputs, model.labels, compile=True) if compile else model.loss
    params_P, replayed = loss.initial_params, ReplayedLoss(loss)
    # The first pass may compile, and waits for the GPU, which a capture must not.
    loss_and_gradient(ReplayedLoss(loss), params_P)
    for _ in range(2):
        loss_and_gradient(replayed, params_P)
    if replayed.not_captured is not None:
        raise CannotRunError(f"not captured: {replayed.not_captured}")

    def passes() -> Tensor:
        for _ in range(STEPS):
            _, grad_P = loss_and_gradient(replayed, params_P)
        return grad_P

    return passes


def _passes_in_tf32(problem: Problem) -> Call:
    # A captured graph keeps the setting with which it was captured.
    with with_tf32():
        call = _captured_passes(False, problem)

    def passes() -> Any:
        with with_tf32():
            return call()

    return passes


# --- kernels and solvers --------------------------------------------------------------------------


def _step_inputs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Slope and mean of a step ``(P,)``; some of the steps are clipped."""
    rows_RP = problem.updates
    generator = torch.Generator(rows_RP.device).manual_seed(SEED)
    slope_P = torch.randn(rows_RP.shape[1], device=rows_RP.device, generator=generator)
    return slope_P / rows_RP.std(0).clamp_min(1e-12), rows_RP.mean(0)


def _next_step(problem: Problem) -> Call:
    """A whole exact step on all rows."""
    rows_RP, full_step = problem.updates, TRAINING.full_step
    slope_P, mean_P = _step_inputs(problem)
    logits_RP = torch.empty_like(rows_RP)
    first_step(rows_RP, logits_RP, slope_P, mean_P, init=TRAINING.init, full_step=full_step)
    return lambda: (logits_RP, *next_step(rows_RP, logits_RP, slope_P, mean_P, full_step=full_step))


def _check_next_step(problem: Problem, result: tuple[Tensor, ...], truth: Truth) -> str:
    """Both steps again by their twins in float64, in some columns."""
    rows_RC, slope_C, mean_C = (some_columns(x).double() for x in (problem.updates, *_step_inputs(problem)))
    logits_RC = torch.empty_like(rows_RC)
    first_step_reference(rows_RC, logits_RC, slope_C, mean_C, init=TRAINING.init, full_step=TRAINING.full_step)
    sums = next_step_reference(rows_RC, logits_RC, slope_C, mean_C, full_step=TRAINING.full_step)
    for name, got, want in zip(("logits", "gate_sum", "weighted_sum"), result, (logits_RC, *sums), strict=True):
        error = float((some_columns(got).double() - want).norm() / want.norm())
        if not error <= 1e-5:
            raise WrongResultError(f"{name} off by {error:.1e}")
    return "its twin in float64"


def _only_compared(problem: Problem) -> Call:
    raise CannotRunError("not timed: the others are compared with it")


def _all_steps(own: Provider) -> Provider:
    """A solver, checked in as many steps as float32 is stable for, timed in 20 captured ones."""

    def check(problem: Problem, masks: TrainedMasks, truth: Truth) -> str:
        compared_with = own.check(problem, masks, truth)
        wrong = _wrong_when_captured(problem.model, problem.case, own.name)
        if wrong is not None:
            raise WrongResultError(f"captured and launched at N = {FEW_CLIENTS}: {wrong}")
        return f"{compared_with}; captured steps with launched ones"

    def timed(problem: Problem) -> Call:
        masks = _train(own.name, problem)
        _demand_captured(masks)
        if masks.steps != STEPS:
            raise WrongResultError(f"{masks.steps} steps instead of {STEPS}")
        return lambda: _train(own.name, problem)

    return replace(own, check=check, timed=timed)


def _train(solver: str, problem: Problem, loss: Callable[[Tensor], Tensor] | None = None) -> TrainedMasks:
    params_P = problem.model.loss.initial_params
    return train_masks(problem.updates, params_P, loss or problem.model.loss, config=TRAINING, solver=solver)


def _is_captured(masks: TrainedMasks) -> bool:
    return "not captured" not in masks.solver_reason


def _demand_captured(masks: TrainedMasks) -> None:
    # on a CPU nothing is captured
    if masks.bits.is_cuda and not _is_captured(masks):
        raise WrongResultError(masks.solver_reason)


@cache
def _wrong_when_captured(model: Model, case: Case, solver: str) -> str | None:
    """In what captured steps differ from launched ones, with few clients.

    Only what is more than launched steps differ from themselves counts.
    """
    problem = Problem.build(case, model, FEW_CLIENTS)

    def waiting(params_P: Tensor) -> Tensor:
        value = model.loss(params_P)
        # Reading the value waits for the GPU, and a step that waits cannot be captured.
        value.item()
        return value

    with deterministic_convolutions():
        captured, launched, again = (_train(solver, problem, loss) for loss in (None, waiting, waiting))
    _demand_captured(captured)
    if launched.bits.is_cuda and _is_captured(launched):
        return "steps were captured although the loss waits for the GPU"
    # 0 if the model's passes are deterministic
    noise = 2 * max(abs(a - b) for a, b in zip(again.losses, launched.losses, strict=True)) / abs(launched.losses[0])
    return disagreement(
        captured,
        launched,
        most_differing=2 * differing_share(again, launched) + MOST_DIFFERING,
        most_loss_error=noise + MOST_LOSS_ERROR,
    )


# --- the server's round ---------------------------------------------------------------------------


def _judging(problem: Problem) -> Call:
    """Mask training, clustering and averaging, as ``SkyMask.aggregate`` does them."""
    params_P, rows = problem.model.loss.initial_params, ClientBlocks([problem.updates])
    clients = ClientBlocks([problem.updates[:-1]])
    alignment_N = problem.updates[:-1] @ root_direction(problem.model.loss, params_P, RootTraining())
    # It is kept over the calls, as a SkyMask keeps it over its rounds.
    loss = ReplayedLoss(problem.model.loss)

    def judge() -> tuple[RuleResult, TrainedMasks, Tensor]:
        masks = train_masks(rows, params_P, loss, config=TRAINING)
        benign_N = cluster_masks(masks.bits, masks.num_params, alignment=alignment_N, config=Clustering()).benign
        return RuleResult(mean_of_rows(clients, benign_N), benign_N), masks, alignment_N

    return judge


def _check_judging(problem: Problem, judged: tuple[RuleResult, TrainedMasks, Tensor], truth: Truth) -> str:
    """Whether the steps were captured and the result is right.

    The labels must be those of clustering on a CPU, and the mean that of the clients kept.
    """
    truth.known()
    result, masks, alignment_N = judged
    _demand_captured(masks)
    most_clients, most_params = _LABELLED
    if problem.num_clients <= most_clients and masks.num_params <= most_params:
        on_cpu = cluster_masks(masks.bits.cpu(), masks.num_params, alignment=alignment_N.cpu(), config=Clustering())
        if result.kept is None or not torch.equal(on_cpu.benign, result.kept.cpu()):
            raise WrongResultError("labels differ from those of the CPU")
    return check_rule("fedavg", problem, result, truth) + f", a CPU's labels up to N = {most_clients}"


def _aggregate(problem: Problem) -> Call:
    """The whole of ``SkyMask.aggregate``: root training and collecting too."""
    model = problem.model
    defence = SkyMask(model.module, model.inputs, model.labels, training=TRAINING)

    def aggregate() -> RuleResult:
        result = defence.aggregate(problem.updates[:-1])
        return RuleResult(result.update, result.benign)

    return aggregate


def _check_aggregate(problem: Problem, result: RuleResult, truth: Truth) -> str:
    truth.known()
    return check_rule("fedavg", problem, result, truth)
