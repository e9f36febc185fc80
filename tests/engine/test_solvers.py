"""Every solver gives the reference's masks: on small problems of every kind, and on real updates of a CNN."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.bench.studies.real_updates import CASES as COLLAPSED_CASES
from skymask_gpu.bench.studies.real_updates import attacked
from skymask_gpu.bench.studies.real_updates import mnist_updates as real_updates
from skymask_gpu.engine import SOLVERS, FlatModel, MaskTraining, TrainedMasks, cluster_masks, train_masks, unpack_bits
from skymask_gpu.engine.solvers import collapsed, fused, vmap

FAST_SOLVERS = [name for name, solver in SOLVERS.items() if solver.exact and name != "reference"]


def small_problem(num_rows: int = 9, hidden: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, FlatModel]:
    """Updates, global parameters and loss of a small network; steps are large enough to be clipped often."""
    generator = torch.Generator().manual_seed(num_rows)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    loss = FlatModel(module, torch.randn(12, 5, generator=generator), torch.arange(12) % 3).to(dtype)
    updates_RP = (torch.randn(num_rows, loss.num_params, generator=generator) * 0.05).to(dtype)
    return updates_RP, loss.initial_params, loss


def differing_share(a: TrainedMasks, b: TrainedMasks) -> float:
    return (unpack_bits(a.bits, a.num_params) != unpack_bits(b.bits, b.num_params)).double().mean().item()


def assert_same_away_from_ties(got: TrainedMasks, want: TrainedMasks, threshold: float = 0.0, near_tie: float = 1e-9) -> None:
    """No bit differs where the reference's logit is not on the threshold."""
    assert want.logits is not None
    differs_RP = unpack_bits(got.bits, got.num_params) != unpack_bits(want.bits, want.num_params)
    away_RP = (want.logits - threshold).abs() > near_tie
    assert not (differs_RP & away_RP).any(), f"{int((differs_RP & away_RP).sum())} bits differ away from ties"


@pytest.mark.parametrize("solver", FAST_SOLVERS)
@pytest.mark.parametrize("config", [
    MaskTraining(min_improvement=-1e9),
    MaskTraining(steps=1),
    MaskTraining(steps=2),
    MaskTraining(steps=7, lr=1e6, init=0.3, threshold=0.6, min_improvement=-1e9),
    MaskTraining(steps=13, lr=3e5, check_every=4),
], ids=["default", "1-step", "2-steps", "odd-settings", "plateau"])  # fmt: skip
@pytest.mark.parametrize("num_rows", [2, 9])
def test_float64_solvers_equal_the_reference(solver: str, config: MaskTraining, num_rows: int) -> None:
    updates_RP, global_P, loss = small_problem(num_rows)
    want = train_masks(updates_RP, global_P, loss, config=config, solver="reference", keep_logits=True)
    got = train_masks(updates_RP, global_P, loss, config=config, solver=solver, keep_logits=True)
    assert got.logits is not None
    assert want.logits is not None
    assert_same_away_from_ties(got, want, config.logit_threshold)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-8)
    torch.testing.assert_close(got.losses, want.losses, rtol=1e-10, atol=0)
    assert (got.steps, got.solver) == (want.steps, solver)
    assert torch.equal(unpack_bits(got.bits, got.num_params), got.logits > config.logit_threshold)


@pytest.mark.parametrize("solver", ["reference", *FAST_SOLVERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_a_full_step_lands_on_the_threshold_in_every_solver(solver: str, dtype: torch.dtype) -> None:
    """One client below and one above the mean, a loss whose gradient is always clipped: logits 0 (bit 0) and 2 (bit 1)."""
    updates_RP = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype)
    params_P = torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    masks = train_masks(
        updates_RP, params_P, lambda p: 1e3 * p.sum(), config=MaskTraining(steps=1), solver=solver, keep_logits=True
    )
    assert masks.logits is not None
    assert masks.logits.tolist() == [[0.0, 2.0], [2.0, 0.0]]
    assert masks.bits.tolist() == [[0b10], [0b01]]


@pytest.mark.parametrize("solver", FAST_SOLVERS)
def test_bfloat16_updates_are_the_float32_of_their_values(solver: str) -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    rounded_RP = updates_RP.bfloat16()
    exact = loss.to(torch.float64)
    truth = train_masks(rounded_RP.double(), exact.initial_params, exact, solver="fused", keep_logits=True)
    assert truth.logits is not None
    rounding = 0.0
    for moved_RP in moved_by_rounding(rounded_RP, 4):
        moved = train_masks(
            moved_RP, exact.initial_params, lambda p: loss(p.float()).double(), solver="fused", keep_logits=True
        )
        assert moved.logits is not None
        rounding = max(rounding, (moved.logits - truth.logits).abs().max().item())
    got = train_masks(rounded_RP, global_P, loss, solver=solver, keep_logits=True)
    assert got.logits is not None
    torch.testing.assert_close(got.logits.double(), truth.logits, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize(("num_clients", "factor"), [(1, 1), (500, 1), (999, 1), (1000, 2), (3999, 4), (20_000, 32)])
def test_the_learning_rate_grows_with_very_many_clients(num_clients: int, factor: int) -> None:
    config = MaskTraining().for_clients(num_clients)
    assert (config.lr, config.grad_clip) == (1e7 * factor, 1e-7 / factor)
    assert config.full_step == 1.0


def test_masks_of_many_clients_move_as_those_of_few() -> None:
    """The same clients eight times: with the learning rate that goes with their number the masks are about the same."""
    updates_RP, global_P, loss = small_problem(9, dtype=torch.float32)
    config = MaskTraining(lr=1e4, grad_clip=1e-4, lr_clients=8, steps=5)
    few = train_masks(updates_RP, global_P, loss, config=config)
    many = train_masks(updates_RP.repeat(8, 1), global_P, loss, config=config)
    still = train_masks(updates_RP.repeat(8, 1), global_P, loss, config=dataclasses.replace(config, lr_clients=1000))

    def moved(masks: TrainedMasks) -> float:
        return (~unpack_bits(masks.bits[:9], masks.num_params)).float().mean().item()

    assert moved(few) > 0.05
    assert moved(many) > 0.7 * moved(few)
    assert moved(still) < 0.5 * moved(few)


@pytest.mark.parametrize("solver", ["reference", *FAST_SOLVERS])
def test_training_stops_on_a_plateau_after_the_check(solver: str) -> None:
    updates_RP, global_P, loss = small_problem()
    config = MaskTraining(check_every=3, min_improvement=1e9)
    masks = train_masks(updates_RP, global_P, loss, config=config, solver=solver)
    # the check at step 0 has nothing to compare with; that at step 3 ends training after its update
    assert masks.steps == len(masks.losses) == 4


@pytest.mark.parametrize("solver", ["reference", *FAST_SOLVERS])
def test_inputs_are_not_modified_and_strides_do_not_matter(solver: str) -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    padded = torch.full((len(updates_RP), updates_RP.shape[1] + 5), torch.nan)
    padded[:, :-5] = updates_RP
    before, global_before = updates_RP.clone(), global_P.clone()
    want = train_masks(updates_RP, global_P, loss, solver=solver)
    got = train_masks(padded[:, :-5], global_P, loss, solver=solver)
    assert torch.equal(got.bits, want.bits)
    assert torch.equal(updates_RP, before)
    assert torch.equal(global_P, global_before)


def test_equal_updates_give_equal_masks() -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    for solver in ("reference", *FAST_SOLVERS):
        masks = train_masks(updates_RP[:1].expand(6, -1), global_P, loss, solver=solver)
        assert (masks.bits == masks.bits[0]).all()


def test_auto_knows_a_solver_of_ones_own_by_its_cost() -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    registered = SOLVERS["fused"]
    SOLVERS.add("cheap", dataclasses.replace(registered, cost=lambda *_: 1e-3, most_rows=9), __file__)
    SOLVERS.add("free", dataclasses.replace(registered, cost=lambda *_: 0.0, why_not=lambda *_: "it is a test"), __file__)
    try:
        masks = train_masks(updates_RP, global_P, loss)
        assert masks.solver == "cheap"
        assert "times faster than fused for 9 rows" in masks.solver_reason
        assert train_masks(updates_RP.repeat(2, 1), global_P, loss).solver == "fused", "18 rows are too many"
    finally:
        SOLVERS.remove("cheap")
        SOLVERS.remove("free")


def no_kernels(solver: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """As where neither Triton nor Numba works."""
    return "no compiler" if solver in ("fused", "collapsed") else None


def test_auto_says_what_it_picked_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    masks = train_masks(updates_RP, global_P, loss)
    assert masks.solver == "fused"
    assert "times faster than collapsed for 9 rows" in masks.solver_reason
    many_RP = updates_RP.repeat(100, 1)
    masks = train_masks(many_RP, global_P, loss)
    assert masks.solver == "collapsed"
    assert "times faster than fused for 900 rows" in masks.solver_reason
    assert train_masks(many_RP, global_P, loss, config=MaskTraining(steps=1)).solver == "fused"
    exact = train_masks(many_RP.double(), global_P.double(), loss.to(torch.float64))
    assert exact.solver == "fused"
    assert "collapsed cannot run here: it computes in float32" in exact.solver_reason
    monkeypatch.setattr("skymask_gpu.engine.choice.why_not_solver", no_kernels)
    masks = train_masks(updates_RP, global_P, loss)
    assert masks.solver == "vmap"
    assert "no compiler" in masks.solver_reason
    with pytest.raises(ValueError, match="solver 'fused' cannot run here: no compiler"):
        train_masks(updates_RP, global_P, loss, solver="fused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"updates": torch.zeros(4)}, r"updates must be a non-empty \(R, P\)"),
        ({"updates": torch.zeros(0, 59)}, r"updates must be a non-empty \(R, P\)"),
        (
            {"updates": torch.zeros(4, 59, dtype=torch.float16)},
            r"updates must be float32, bfloat16 or float64, got torch\.float16",
        ),
        ({"global_params": torch.zeros(3)}, r"global_params must have shape \(66,\), .* got \(3,\)"),
        ({"global_params": torch.zeros(66, device="meta")}, "global_params must be on cpu"),
        ({"solver": "quick"}, "solver must be one of reference, fused, collapsed, vmap, auto, got 'quick'"),
    ],
    ids=["one-dimensional", "empty", "half", "global-shape", "mixed-devices", "unknown-solver"],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        train_masks(**{"updates": updates_RP, "global_params": global_P, "loss": loss, **arguments})


@pytest.mark.parametrize("solver", ["reference", *FAST_SOLVERS])
def test_a_loss_out_of_range_is_an_error(solver: str) -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)
    updates_RP[0] = 1e30
    with pytest.raises(ValueError, match="updates: the root loss is"):
        train_masks(updates_RP, global_P, lambda p: loss(p) * p.square().sum(), solver=solver)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", 2.5), ("lr", -1.0), ("lr", math.nan), ("grad_clip", 0.0), ("init", math.inf), ("threshold", 1.0),
     ("check_every", 0), ("min_improvement", math.nan), ("lr_clients", 0)],
)  # fmt: skip
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"MaskTraining\.{field} must"):
        MaskTraining(**{field: value})


def test_out_of_memory_says_how_much_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    updates_RP, global_P, loss = small_problem(dtype=torch.float32)

    def exhausted(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(fused, "first_step", exhausted)
    with pytest.raises(torch.OutOfMemoryError, match=r"cpu: solver 'fused' on 9 rows of 66 parameters needs at least 0 MiB"):
        train_masks(updates_RP, global_P, loss, solver="fused")


# --- real updates: one round of local training of 100 clients on MNIST --------------------------------------------------

CASES = ["none", "min-max", "sign-flip", "noise", "one by 1,000"]


@pytest.fixture(scope="session")
def mnist_updates(mnist_dir: Path) -> tuple[Tensor, FlatModel]:
    """Updates (101, P), root row last, and the loss of the CNN on 100 root samples."""
    return real_updates(100, mnist_dir)


def solve(updates_RP: Tensor, loss: FlatModel, solver: str, dtype: torch.dtype, steps: int = 20) -> TrainedMasks:
    loss = loss.to(dtype)
    config = MaskTraining(steps=steps)
    return train_masks(
        updates_RP.to(dtype), loss.initial_params, loss, config=config, solver=solver, keep_logits=dtype == torch.float64
    )


class Recorder:
    """The loss, and notes of the parameters at which it was asked for and of its gradients there."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self._loss = loss
        self.points: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def __call__(self, params_P: Tensor) -> Tensor:
        point_P = params_P.detach().clone().requires_grad_()
        value = self._loss(point_P)
        self.points.append(point_P.detach())
        self.gradients += torch.autograd.grad(value, point_P)
        return value.detach() + linear(self.gradients[-1], params_P)


class Replay:
    """A loss whose gradients are those that were recorded, step by step, whatever the parameters are.

    The gradient of a real loss jumps where a root sample crosses a kink (ReLU, max pooling). If training comes near one,
    rounding decides on which side it goes on, and up to a thousandth of the bits may follow: if the same sums are added in one
    order they do, in another they do not. A comparison in float32 would tell this luck. With the gradients given, what differs
    is the solver's own.
    """

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients
        self.points: list[Tensor] = []

    def __call__(self, params_P: Tensor) -> Tensor:
        gradient_P = self._gradients[len(self.points)].to(params_P.dtype)
        self.points.append(params_P.detach().clone())
        return linear(gradient_P, params_P)


def linear(gradient_P: Tensor, params_P: Tensor) -> Tensor:
    """The number 0 that has this gradient."""
    return (gradient_P * (params_P - params_P.detach())).sum()


def moved_by_rounding(updates_RP: Tensor, roundings: int) -> Iterator[Tensor]:
    """The updates in float64, three times; each value is moved at random by at most ``roundings`` roundings to float32."""
    for seed in range(3):
        noise_RP = torch.rand(updates_RP.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        yield updates_RP.double() * (1 + (2 * noise_RP - 1) * roundings * torch.finfo(torch.float32).eps / 2)


def farthest(points: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference of a parameter at any step."""
    return max((a.double() - b).abs().max().item() for a, b in zip(points, truth, strict=True))


def assert_right_in_float32(updates_RP: Tensor, loss: FlatModel, solvers: list[str]) -> None:
    """Float32 differs from float64 no more than float64 does after its input was rounded, at every step.

    Each solver gets the gradients of a run in float64, for which `fused` must have been shown to be right. A bit may differ
    where the logit is as near the threshold as rounding moves logits. A term of the masked mean is rounded 8 times (its gate 5,
    the gate's derivative, a difference, a product), and once more by each addition of a row. Three random draws
    are unlikely to have the largest effect that 8 + R roundings can have, so twice their largest effect is allowed.
    """
    start_P, config = loss.initial_params, MaskTraining(min_improvement=-1e9)
    exact = Recorder(loss.to(torch.float64))
    truth = train_masks(updates_RP.double(), start_P.double(), exact, config=config, solver="fused", keep_logits=True)
    assert truth.logits is not None
    near_tie = off = 0.0
    for moved_RP in moved_by_rounding(updates_RP, 8 + len(updates_RP)):
        replay = Replay(exact.gradients)
        moved = train_masks(moved_RP, start_P.double(), replay, config=config, solver="fused", keep_logits=True)
        assert moved.logits is not None
        near_tie = max(near_tie, (moved.logits - truth.logits).abs().max().item())
        off = max(off, farthest(replay.points, exact.points))
    near_tie, off = 2 * near_tie, 2 * off
    for solver in solvers:
        replay = Replay(exact.gradients)
        got = train_masks(updates_RP, start_P, replay, config=config, solver=solver)
        gap = farthest(replay.points, exact.points)
        print(f"{solver}: parameters {gap:.1e} of {off:.1e}, ties {near_tie:.1e}")
        assert gap <= off, f"{solver}: a parameter is off by {gap:.1e}, rounding explains {off:.1e}"
        assert_same_away_from_ties(got, truth, near_tie=near_tie)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_solvers_agree_on_real_updates(case: str, mnist_updates: tuple[Tensor, FlatModel]) -> None:
    """With the loss in float64, where the bits must be those of the reference; with its gradients in float32."""
    # 30 of the 100 clients: in the reference, which takes most of the time, each client costs the same
    honest_RP, loss = mnist_updates[0][70:], mnist_updates[1]
    updates_RP = attacked(honest_RP, case) if case in COLLAPSED_CASES else honest_RP.clone()
    if case == "one by 1,000":
        updates_RP[0] *= 1000
    num_params = loss.num_params
    truth = solve(updates_RP, loss, "reference", torch.float64)
    labels = cluster_masks(truth.bits, num_params).benign
    for solver in FAST_SOLVERS:
        got = solve(updates_RP, loss, solver, torch.float64)
        assert_same_away_from_ties(got, truth)
        torch.testing.assert_close(got.losses, truth.losses, rtol=1e-7, atol=0)
        assert torch.equal(cluster_masks(got.bits, num_params).benign, labels)
        final = solve(updates_RP, loss, solver, torch.float32)
        assert torch.equal(cluster_masks(final.bits, num_params).benign, labels)
    assert_right_in_float32(updates_RP, loss, FAST_SOLVERS)


def test_the_comparison_can_fail(mnist_updates: tuple[Tensor, FlatModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that is wrong in one column in a thousand, forgets its last step, or is off by 0.1% in float32, is caught."""
    updates_RP, loss = mnist_updates[0][80:], mnist_updates[1]
    truth = solve(updates_RP, loss, "reference", torch.float64)
    honest = fused.next_step

    def sloppy(updates_RP: Tensor, logits_RP: Tensor, slope_P: Tensor, mean_P: Tensor, *, full_step: float) -> Any:
        slope_P = slope_P.clone()
        slope_P[::1000] *= -1
        return honest(updates_RP, logits_RP, slope_P, mean_P, full_step=full_step)

    monkeypatch.setattr(fused, "next_step", sloppy)
    with pytest.raises(AssertionError, match="bits differ away from ties"):
        assert_same_away_from_ties(solve(updates_RP, loss, "fused", torch.float64), truth)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="bits differ away from ties"):
        assert_same_away_from_ties(solve(updates_RP, loss, "fused", torch.float64, steps=19), truth)

    def inexact(*arguments: Tensor) -> Tensor:
        return 1.001 * first_order_loss(*arguments)

    first_order_loss = vmap._first_order_loss
    monkeypatch.setattr(vmap, "_first_order_loss", inexact)
    with pytest.raises(AssertionError, match="vmap: a parameter is off by"):
        assert_right_in_float32(updates_RP, loss, ["vmap"])


# --- the collapsed solver: approximate ----------------------------------------------------------------------------------


def collapsed_error(updates_RP: Tensor, loss: FlatModel) -> tuple[float, float, tuple[TrainedMasks, TrainedMasks]]:
    """The share of bits in which `collapsed` differs from `fused`, how much may, and the masks of both.

    What may differ is measured here, on the same updates, twice. Updates rounded to bfloat16 tell how much training amplifies
    small changes. Half of the bins, whose error is several times as large until training amplifies it (docs/collapsed.md),
    tell what comes of the bins themselves. The larger of the two counts: where training amplifies everything (noise), more
    bins do not help, and where rounding meets no kink by luck (scaling), it tells nothing.
    """
    exact = solve(updates_RP, loss, "fused", torch.float32)
    rounded = train_masks(updates_RP.bfloat16(), loss.initial_params, loss, solver="fused")
    half = MaskTraining(bins=MaskTraining().bins // 2)
    few = train_masks(updates_RP, loss.initial_params, loss, config=half, solver="collapsed")
    allowed = max(2 * differing_share(rounded, exact), differing_share(few, exact))
    collapsed = solve(updates_RP, loss, "collapsed", torch.float32)
    return differing_share(collapsed, exact), allowed, (exact, collapsed)


@pytest.mark.parametrize("case", COLLAPSED_CASES)
def test_collapsed_is_as_close_as_its_bins_allow(case: str, mnist_updates: tuple[Tensor, FlatModel]) -> None:
    updates_RP, loss = attacked(mnist_updates[0], case), mnist_updates[1]
    share, allowed, masks = collapsed_error(updates_RP, loss)
    print(f"{case}: {share:.1e} of the bits differ, {allowed:.1e} may")
    assert share <= allowed
    assert torch.equal(*(cluster_masks(m.bits, loss.num_params).benign for m in masks))


@pytest.mark.parametrize("mistake", ["a step dropped", "history off by one", "direction", "cut"])
def test_a_mistake_in_replay_or_cuts_is_caught(
    mistake: str, mnist_updates: tuple[Tensor, FlatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = collapsed.find_cuts

    def wrong(
        logits_BP: Tensor, centres_BP: Tensor, counts_BP: Tensor, ends_2P: Tensor, slopes_TP: Tensor, means_TP: Tensor, **s: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mistake == "a step dropped":
            slopes_TP, means_TP = slopes_TP[:-1], means_TP[:-1]
        elif mistake == "history off by one":
            means_TP = means_TP.roll(1, 0)
        position_P, left_P, crossings_P = honest(logits_BP, centres_BP, counts_BP, ends_2P, slopes_TP, means_TP, **s)
        if mistake == "direction":
            left_P = ~left_P
        elif mistake == "cut":
            position_P = position_P + 1e-4
        return position_P, left_P, crossings_P

    updates_RP, loss = attacked(mnist_updates[0], "min-max"), mnist_updates[1]
    _, allowed, (exact, _) = collapsed_error(updates_RP, loss)  # without the mistake
    monkeypatch.setattr(collapsed, "find_cuts", wrong)
    share = differing_share(solve(updates_RP, loss, "collapsed", torch.float32), exact)
    print(f"{mistake}: {share:.1e} of the bits differ, {allowed:.1e} may")
    assert share > allowed


def test_cuts_say_what_the_bits_are(mnist_updates: tuple[Tensor, FlatModel]) -> None:
    updates_RP, loss = attacked(mnist_updates[0], "scaling"), mnist_updates[1]
    masks = solve(updates_RP, loss, "collapsed", torch.float32)
    assert masks.cuts is not None
    cuts, flags_RP = masks.cuts, unpack_bits(masks.bits, loss.num_params)
    once_P = ~cuts.several
    assert torch.equal(((updates_RP < cuts.position) == cuts.left)[:, once_P], flags_RP[:, once_P])
    assert (flags_RP[:, cuts.constant] == flags_RP[0, cuts.constant]).all()
    assert 0.3 < cuts.constant.float().mean() < 0.8
    assert 0 < cuts.several.float().mean() < 0.1
    # columns that cross more than once are replayed row by row, as kept logits are
    logits_RP = train_masks(updates_RP, loss.initial_params, loss, solver="collapsed", keep_logits=True).logits
    assert logits_RP is not None
    assert torch.equal((logits_RP > 0)[:, cuts.several], flags_RP[:, cuts.several])


MEASURE_MEMORY = """
import json, torch
from skymask_gpu.bench.solvers import honest_rows, make_model
from skymask_gpu.engine import FlatModel, MaskTraining, train_masks
from skymask_gpu.engine.peak_memory import peak_bytes, start_peak

def peak_of(call):
    held = start_peak(cpu)
    result = call()
    return result, None if held is None else peak_bytes(cpu) - held

def model_passes():
    for _ in range(20):
        params_P = loss.initial_params.detach().requires_grad_()
        torch.autograd.grad(loss(params_P), params_P)

torch.set_num_threads(1)
cpu = torch.device("cpu")
loss = FlatModel(*make_model())
rows_RP = honest_rows(loss, 501, seed=0)
train = lambda: train_masks(rows_RP, loss.initial_params, loss, solver="collapsed")
train()
_, passes = peak_of(model_passes)
masks, measured = peak_of(train)
floats = 4 * MaskTraining().bins + 2 * MaskTraining().steps
allowed = 4 * floats * loss.num_params + masks.bits.numel()
print(json.dumps([measured, passes, allowed, rows_RP.numel() * 4]))
"""


def test_collapsed_needs_no_memory_for_logits() -> None:
    """N = 500: at most 4 B P + 2 T P floats and R P bits beyond the updates, plus the model's own passes and 4 MiB."""
    # in a process of its own in which freed memory goes back to the system at once, so that the peak is what was in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": "0"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE_MEMORY], env=environment, capture_output=True, text=True, check=True
    )
    peak, passes, allowed, updates = json.loads(done.stdout)
    if peak is None:
        pytest.skip("this system does not tell the peak of resident memory")
    print(f"peak {peak / 2**20:.0f} MiB, model passes {passes / 2**20:.0f}, allowed {allowed / 2**20:.0f}")
    assert peak - passes <= allowed + 4 * 2**20
    assert peak < updates


def test_collapsed_refuses_float64() -> None:
    updates_RP, global_P, loss = small_problem()
    with pytest.raises(ValueError, match="solver 'collapsed' cannot run here: it computes in float32"):
        train_masks(updates_RP, global_P, loss, solver="collapsed")


def test_collapsed_refuses_more_rows_than_its_bins_can_count() -> None:
    _, global_P, loss = small_problem(dtype=torch.float32)
    with pytest.raises(ValueError, match="takes at most 16,777,216 rows, got 16,777,217"):
        train_masks(torch.zeros(1, loss.num_params).expand(2**24 + 1, -1), global_P, loss, solver="collapsed")


def test_collapsed_takes_more_rows_than_16_bits_count() -> None:
    """70,000 rows, most of which are in few bins of a column: as close to the exact solver as its bins allow."""
    updates_RP, _, loss = small_problem(70, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    many_RP = updates_RP.repeat(1000, 1) * (1 + 0.1 * torch.randn(70_000, 1, generator=generator))
    # 68,000 rows share one value. If training left their logit close to the threshold, rounding would
    # decide the bit of all of them at once. The largest value is far from that.
    many_RP[:68_000, 0] = updates_RP[:, 0].max()
    share, allowed, _ = collapsed_error(many_RP, loss)
    print(f"{share:.1e} of the bits differ, {allowed:.1e} may")
    assert share <= allowed


@pytest.mark.parametrize("num_rows", [1, 2, 3, 40])
def test_collapsed_works_for_any_number_of_rows(num_rows: int) -> None:
    updates_RP, global_P, loss = small_problem(num_rows, dtype=torch.float32)
    config = MaskTraining(lr=1e5)
    want = train_masks(updates_RP, global_P, loss, config=config, solver="fused")
    got = train_masks(updates_RP, global_P, loss, config=config, solver="collapsed")
    assert got.steps == want.steps
    assert differing_share(got, want) <= 0.01
