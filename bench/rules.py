"""Whether an aggregation rule's result is right: each rule again, as a literal loop in float64.

The loops are those of ``federation/rules/reference.py`` and ``reference_layers.py``. Where a rule
treats each coordinate by itself, about 500 evenly spaced columns are compared. A rule without a
check here is never timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.bench.cases import Problem
from skymask_gpu.bench.table import SEED
from skymask_gpu.defence import RootTraining, SkyMask
from skymask_gpu.engine import MaskTraining
from skymask_gpu.federation.rules import (
    RoundInfo,
    Rule,
    RuleContext,
    RuleResult,
    SkyMaskSettings,
    build_rule,
    reference,
    reference_layers,
)
from skymask_gpu.integrations.byzfl import byzfl_part

__all__ = [
    "BYZFL",
    "CHECKS",
    "Check",
    "byzfl_aggregator",
    "make_info",
    "make_rule",
    "some_columns",
]

Check = Callable[[Problem, RuleResult], str | None]

_COLUMNS = 500
# A parameter may be off by this share of the mean size of what was averaged, beyond the rounding of
# the result.
_TOLERANCE = 1e-5


class _AllSteps(SkyMaskSettings):
    """Mask training that never ends early, so that every solver takes the same steps."""

    @property
    def training(self) -> MaskTraining:
        return replace(super().training, min_improvement=-1e9)


def make_rule(name: str, problem: Problem) -> Rule:
    """The rule called ``name``; the root direction is trained for as long as in a run."""
    context = RuleContext(
        module=problem.model.module,
        root_inputs=problem.model.inputs,
        root_labels=problem.model.labels,
        num_clients=problem.num_clients,
        root_training=RootTraining(),
        seed=SEED,
    )
    return build_rule(name, context, _AllSteps(mask_steps=problem.training.steps) if name == "skymask" else None)


def make_info(problem: Problem) -> RoundInfo:
    clients_M = torch.arange(problem.num_clients, device=problem.updates.device)
    generator = torch.Generator().manual_seed(SEED)
    params_P, root_P = problem.model.loss.initial_params, problem.updates[-1]
    return RoundInfo(params_P, root_P, clients_M, problem.num_malicious, generator)


def some_columns(rows_RP: Tensor) -> Tensor:
    """A copy of about 500 evenly spaced columns."""
    return rows_RP[..., :: max(1, rows_RP.shape[-1] // _COLUMNS)].contiguous()


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _clients(problem: Problem) -> Iterator[np.ndarray]:
    """One client's update after the other."""
    return map(_float64, problem.updates[:-1])


def _difference(problem: Problem, got: Tensor, want_P: np.ndarray) -> str | None:
    """How far an update is from ``want_P``."""
    scale = float(problem.updates[:-1].abs().mean(dtype=torch.float32))
    rounding_P = torch.finfo(got.dtype).eps * np.abs(want_P)
    error = float((np.abs(_float64(got) - want_P) - rounding_P).max() / scale)
    return None if error <= _TOLERANCE else f"the update is off by {error:.1e} of an update's mean size"


def _coordinatewise(of_columns: Callable[[np.ndarray, Problem], np.ndarray]) -> Check:
    def check(problem: Problem, result: RuleResult) -> str | None:
        values_NC = _float64(some_columns(problem.updates[:-1]))
        return _difference(problem, some_columns(result.update), of_columns(values_NC, problem))

    return check


def _mean_of_kept(problem: Problem, result: RuleResult) -> str | None:
    """The mean of the kept clients, or of all, in 500 columns."""
    rows_NC = some_columns(problem.updates[:-1])
    rows_NC = rows_NC if result.kept is None else rows_NC[result.kept]
    return _difference(problem, some_columns(result.update), _float64(rows_NC).mean(0))


def _geometric_median(problem: Problem, result: RuleResult) -> str | None:
    pull = reference.geometric_median_pull(_clients(problem), _float64(result.update))
    return None if pull <= 1e-4 else f"the pulls of the updates do not cancel: {pull:.1e} per client are left"


def _three_weiszfeld_steps(problem: Problem, result: RuleResult) -> str | None:
    """ByzFL's geometric median: from the origin, three steps, distances of at least 0.1."""
    point_P = np.zeros(problem.updates.shape[1])
    for _ in range(3):
        total_P, total = np.zeros_like(point_P), 0.0
        for row_P in _clients(problem):
            weight = 1 / max(0.1, float(np.linalg.norm(row_P - point_P)))
            total_P, total = total_P + weight * row_P, total + weight
        point_P = total_P / total
    return _difference(problem, result.update, point_P)


def _krum(*, multi: bool, extra_neighbours: int = 0) -> Check:
    def check(problem: Problem, result: RuleResult) -> str | None:
        ranking = reference.krum_ranking(problem.squared_distances, problem.num_malicious, extra_neighbours)
        best = sorted(ranking[: problem.num_clients - problem.num_malicious if multi else 1])
        if multi and result.kept is not None and result.kept.nonzero().flatten().tolist() != best:
            return "other clients are kept"
        return _difference(problem, result.update, np.mean([_float64(problem.updates[i]) for i in best], 0))

    return check


def _bulyan(problem: Problem, result: RuleResult) -> str | None:
    chosen = sorted(reference.bulyan_chosen(problem.squared_distances, problem.num_malicious))
    if result.kept is not None and result.kept.nonzero().flatten().tolist() != chosen:
        return "other clients are kept"
    rows_TC = _float64(some_columns(problem.updates)[chosen])
    want_C = reference.mean_near_median(rows_TC, problem.num_clients - 4 * problem.num_malicious)
    return _difference(problem, some_columns(result.update), want_C)


def _fltrust(problem: Problem, result: RuleResult) -> str | None:
    want_P, _ = reference.fltrust(_clients(problem), _float64(problem.updates[-1]))
    return _difference(problem, result.update, want_P)


def _kept_and_mean(problem: Problem, result: RuleResult, kept: list[bool], want_P: np.ndarray) -> str | None:
    if result.kept is None or result.kept.tolist() != kept:
        return "other clients are kept"
    return _difference(problem, result.update, want_P)


def _all_clients(problem: Problem) -> np.ndarray:
    return _float64(problem.updates[:-1])


def _drawn(problem: Problem, count: int) -> list[int]:
    """The first columns that a rule draws."""
    return torch.randperm(problem.updates.shape[1], generator=make_info(problem).generator)[:count].tolist()


def _dnc(problem: Problem, result: RuleResult) -> str | None:
    rows_NP = _all_clients(problem)
    kept = reference.dnc_kept(rows_NP, [_drawn(problem, 10_000)], problem.num_malicious)
    return _kept_and_mean(problem, result, kept, rows_NP[kept].mean(0))


def _signguard(problem: Problem, result: RuleResult) -> str | None:
    rows_NP = _all_clients(problem)
    kept = reference.signguard_kept(rows_NP, _drawn(problem, round(0.1 * rows_NP.shape[1])))
    bound = float(np.median(np.linalg.norm(rows_NP, axis=1)))
    return _kept_and_mean(problem, result, kept, reference.mean_clipped(rows_NP, kept, bound))


def _alignins(problem: Problem, result: RuleResult) -> str | None:
    rows_NP = _all_clients(problem)
    kept = reference.alignins_kept(rows_NP, _float64(make_info(problem).global_params))
    bound = float(np.median(np.linalg.norm(rows_NP[kept], axis=1))) if any(kept) else 0.0
    return _kept_and_mean(problem, result, kept, reference.mean_clipped(rows_NP, kept, bound))


def _fedgreed(problem: Problem, result: RuleResult) -> str | None:
    loss, start_P = problem.model.loss, problem.model.loss.initial_params

    @torch.no_grad()
    def of_model(update_P: np.ndarray) -> float:
        return float(loss(start_P + torch.from_numpy(update_P).to(start_P)))

    rows_NP = _all_clients(problem)
    kept = reference.fedgreed_kept(rows_NP, of_model)
    return _kept_and_mean(problem, result, kept, rows_NP[kept].mean(0))


def _mars(problem: Problem, result: RuleResult) -> str | None:
    rows_NP, start_P = _all_clients(problem), _float64(make_info(problem).global_params)
    energies = [reference_layers.concentrated_energy(start_P + row_P, problem.model.loss.shapes) for row_P in rows_NP]
    kept = reference_layers.mars_kept(energies)
    return _kept_and_mean(problem, result, kept, rows_NP[kept].mean(0))


def _lasa(problem: Problem, result: RuleResult) -> str | None:
    want_P, counting = reference_layers.lasa(_all_clients(problem), problem.model.loss.shapes)
    kept = [any(counts) for counts in zip(*counting.values(), strict=True)]
    return _kept_and_mean(problem, result, kept, want_P)


def _flguardian(problem: Problem, result: RuleResult) -> str | None:
    rows_NP = _all_clients(problem)
    trust = reference_layers.flguardian_trust(rows_NP, problem.model.loss.shapes)
    kept = reference_layers.most_trusted(trust, problem.num_clients - problem.num_malicious)
    return _kept_and_mean(problem, result, kept, rows_NP[kept].mean(0))


def _fedlaw(problem: Problem, result: RuleResult) -> str | None:
    loss, start_P = problem.model.loss, problem.model.loss.initial_params

    def gradient(update_P: np.ndarray) -> np.ndarray:
        params_P = (start_P.double() + torch.from_numpy(update_P).to(start_P.device)).to(start_P.dtype).requires_grad_()
        return _float64(torch.autograd.grad(loss(params_P), params_P)[0])

    weights, want_P = reference_layers.fedlaw_weights(
        _all_clients(problem), gradient, problem.num_clients - problem.num_malicious
    )
    return _kept_and_mean(problem, result, [weight > 0 for weight in weights], want_P)


def _centred_clipping(problem: Problem, result: RuleResult) -> str | None:
    rows_NP = _all_clients(problem)
    start_P = np.zeros(rows_NP.shape[1])
    return _difference(problem, result.update, reference.centred_clipping(rows_NP, start_P, 3, None))


def _nnm(problem: Problem, result: RuleResult) -> str | None:
    near_NN = np.argsort(problem.squared_distances, 1, kind="stable")[:, : problem.num_clients - problem.num_malicious]
    rows_NC = _float64(some_columns(problem.updates[:-1]))
    mixed_NC = np.array([rows_NC[near].mean(0) for near in near_NN])
    want_C = reference.trimmed_mean(mixed_NC, problem.num_malicious)
    return _difference(problem, some_columns(result.update), want_C)


def _foundation_fl(problem: Problem, result: RuleResult) -> str | None:
    rows_NP = reference.foundation_rows(_all_clients(problem), round(0.5 * problem.num_clients))
    want_C = reference.trimmed_mean(_float64(some_columns(torch.from_numpy(rows_NP))), problem.num_malicious)
    return _difference(problem, some_columns(result.update), want_C)


def _bucketing(problem: Problem, result: RuleResult) -> str | None:
    order = torch.randperm(problem.num_clients, generator=make_info(problem).generator).tolist()
    means_BC = reference.bucket_means(_float64(some_columns(problem.updates[:-1])), order, 2)
    trim = min(problem.num_malicious, (len(means_BC) - 1) // 2)
    return _difference(problem, some_columns(result.update), reference.trimmed_mean(means_BC, trim))


def _skymask(problem: Problem, result: RuleResult) -> str | None:
    """The verdict of the same round with solver `reference`."""
    model, info = problem.model, make_info(problem)
    defence = SkyMask(model.module, model.inputs, model.labels, training=problem.training, solver="reference")
    want = defence.aggregate(problem.updates[:-1], global_params=info.global_params, root_update=info.root_update)
    if result.kept is None or not torch.equal(result.kept, want.benign):
        return "the verdict differs from that of solver reference"
    return _difference(problem, result.update, _float64(want.update))


CHECKS: dict[str, tuple[Check, str]] = {
    "alignins": (_alignins, "a loop over the clients"),
    "bucketing": (_bucketing, "a loop over the buckets, 500 columns"),
    "bulyan": (_bulyan, "a loop over the rounds of the choice, 500 columns"),
    "centred-clipping": (_centred_clipping, "a loop over the clients"),
    "dnc": (_dnc, "a singular value decomposition of each trial"),
    "fed-nga": (
        lambda problem, result: _difference(problem, result.update, reference.fed_nga(_all_clients(problem))),
        "a loop over the clients",
    ),
    "fedavg": (_mean_of_kept, "NumPy's mean, 500 columns"),
    "fedgreed": (_fedgreed, "a loop over the models"),
    "fedlaw": (_fedlaw, "a loop over the steps and the clients"),
    "flguardian": (_flguardian, "a loop over the layers and the clients"),
    "fltrust": (_fltrust, "a loop over the clients"),
    "foundation-fl": (_foundation_fl, "a loop over the clients, 500 columns"),
    "geometric-median": (_geometric_median, "its defining property"),
    "krum": (_krum(multi=False), "a loop over the clients"),
    "lasa": (_lasa, "a loop over the layers and the clients"),
    "mars": (_mars, "a loop over the neurons"),
    "median": (_coordinatewise(lambda values_NC, _: reference.median(values_NC)), "a loop over 500 columns"),
    "multi-krum": (_krum(multi=True), "a loop over the clients"),
    "nnm": (_nnm, "a loop over the clients, 500 columns"),
    "signguard": (_signguard, "a loop over the clients"),
    "skymask": (_skymask, "the same round with solver reference"),
    "trimmed-mean": (
        _coordinatewise(lambda values_NC, problem: reference.trimmed_mean(values_NC, problem.num_malicious)),
        "a loop over 500 columns",
    ),
}

# ByzFL's aggregators by class name, and whether they take f. They are checked against ByzFL's own
# definitions.
BYZFL = {"Average": False, "Median": False, "TrMean": True, "GeometricMedian": False, "Krum": True, "MultiKrum": True}
CHECKS |= {
    "ByzFL Average": CHECKS["fedavg"],
    "ByzFL Median": CHECKS["median"],
    "ByzFL TrMean": CHECKS["trimmed-mean"],
    "ByzFL GeometricMedian": (_three_weiszfeld_steps, "three steps, one client at a time"),
    "ByzFL Krum": (_krum(multi=False, extra_neighbours=1), "a loop over the clients, n - f - 1 neighbours"),
    "ByzFL MultiKrum": (_krum(multi=True, extra_neighbours=1), "a loop over the clients, n - f - 1 neighbours"),
}


def byzfl_aggregator(name: str, num_malicious: int) -> Callable[[Tensor], Tensor] | None:
    """An aggregator of ByzFL, or None if it is not installed."""
    try:
        aggregators = byzfl_part("aggregators")
    except ValueError:
        return None
    return getattr(aggregators, name)(f=num_malicious) if BYZFL[name] else getattr(aggregators, name)()
