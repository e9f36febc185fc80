"""Whether an aggregation rule's result is right: each rule again, literally, in float64 and one client at a time.

Checks take a problem and a ``RuleResult`` and return what is wrong, or None. Where a rule treats each coordinate by itself,
some hundred columns are computed. A rule without a check here is never timed.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skymask_gpu.bench.cases import Problem
from skymask_gpu.defence import RootTraining, SkyMask
from skymask_gpu.engine import MaskTraining
from skymask_gpu.federation.rules import RoundInfo, RuleContext, RuleResult, SkyMaskSettings

__all__ = ["BYZFL", "CHECKS", "Check", "byzfl_aggregator", "make_context", "make_info", "make_settings"]

Check = Callable[[Problem, RuleResult], str | None]

_COLUMNS = 500
# Largest error of a parameter beyond the rounding of the result, in units of the mean size of what was averaged.
_TOLERANCE = 1e-5


class _AllSteps(SkyMaskSettings):
    """Mask training that never ends early, so that every solver takes the same steps."""

    @property
    def training(self) -> MaskTraining:
        return replace(super().training, min_improvement=-1e9)


def make_settings(name: str, problem: Problem, solver: str = "auto") -> SkyMaskSettings | None:
    """The settings of the rule called ``name``; None: its defaults."""
    return _AllSteps(solver=solver, mask_steps=problem.training.steps) if name == "skymask" else None


def make_context(problem: Problem) -> RuleContext:
    """What a rule is built from; the root direction is trained for as long as in a run."""
    return RuleContext(
        module=problem.model.module,
        root_inputs=problem.model.inputs,
        root_labels=problem.model.labels,
        num_clients=problem.num_clients,
        root_training=RootTraining(),
        seed=problem.seed,
    )


def make_info(problem: Problem) -> RoundInfo:
    clients_M = torch.arange(problem.num_clients, device=problem.updates.device)
    generator = torch.Generator().manual_seed(problem.seed)
    params_P, root_P = problem.model.loss.initial_params, problem.updates[-1]
    return RoundInfo(params_P, root_P, clients_M, problem.num_malicious, generator)


def _chosen_columns(num_params: int) -> np.ndarray:
    return np.arange(0, num_params, max(1, num_params // _COLUMNS))


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _difference(problem: Problem, result: RuleResult, want_P: np.ndarray, columns: np.ndarray | slice) -> str | None:
    """How far the update is from ``want_P``, which has the chosen columns only."""
    got_P = _float64(result.update)[columns]
    scale = float(problem.updates[:-1].abs().mean(dtype=torch.float32))
    rounding_P = torch.finfo(result.update.dtype).eps * np.abs(want_P)
    error = float((np.abs(got_P - want_P) - rounding_P).max() / scale)
    if error <= _TOLERANCE:
        return None
    return f"the update is off by {error:.1e} of an update's mean size"


def _coordinatewise(of_columns: Callable[[np.ndarray, Problem], np.ndarray]) -> Check:
    def check(problem: Problem, result: RuleResult) -> str | None:
        columns = _chosen_columns(problem.updates.shape[1])
        values_NC = _float64(problem.updates[:-1][:, torch.from_numpy(columns).to(problem.updates.device)])
        return _difference(problem, result, of_columns(values_NC, problem), columns)

    return check


def _trimmed(values_NC: np.ndarray, problem: Problem) -> np.ndarray:
    trim = problem.num_malicious
    return np.array([np.mean(sorted(column)[trim : len(column) - trim]) for column in values_NC.T])


def _geometric_median(problem: Problem, result: RuleResult) -> str | None:
    """The defining property: the unit vectors from the point to all updates cancel."""
    point_P, pull_P = _float64(result.update), 0.0
    for row_P in problem.updates[:-1]:
        offset_P = _float64(row_P) - point_P
        pull_P = pull_P + offset_P / np.linalg.norm(offset_P)
    pull = float(np.linalg.norm(pull_P)) / problem.num_clients
    return None if pull <= 1e-4 else f"the pulls of the updates do not cancel: {pull:.1e} a client is left"


def _three_weiszfeld_steps(problem: Problem, result: RuleResult) -> str | None:
    """ByzFL's form: from the origin, three steps, distances of at least 0.1."""
    rows_NP = _float64(problem.updates[:-1])
    point_P = np.zeros(rows_NP.shape[1])
    for _ in range(3):
        weights = [1 / max(0.1, float(np.linalg.norm(row_P - point_P))) for row_P in rows_NP]
        point_P = sum(w * row_P for w, row_P in zip(weights, rows_NP, strict=True)) / sum(weights)
    return _difference(problem, result, np.asarray(point_P), slice(None))


def _score(distances: np.ndarray, num_neighbours: int) -> float:
    """Of one row: the sum of the squared distances to the nearest other rows; its own distance, 0, is among them."""
    return float(np.sort(distances)[1 : num_neighbours + 1].sum())


def _krum(extra_neighbours: int = 0) -> Check:
    """n - f - 2 neighbours as in the paper; ByzFL has one more."""

    def check(problem: Problem, result: RuleResult) -> str | None:
        num_neighbours = problem.num_clients - problem.num_malicious - 2 + extra_neighbours
        scores = [_score(row, num_neighbours) for row in problem.squared_distances]
        return _difference(problem, result, _float64(problem.updates[int(np.argmin(scores))]), slice(None))

    return check


def _multi_krum(extra_neighbours: int = 0) -> Check:
    def check(problem: Problem, result: RuleResult) -> str | None:
        n, f = problem.num_clients, problem.num_malicious
        scores = [_score(row, n - f - 2 + extra_neighbours) for row in problem.squared_distances]
        best = np.argsort(scores)[: n - f]
        if result.kept is not None and set(result.kept.nonzero().flatten().tolist()) != set(best.tolist()):
            return "other clients are kept"
        return _difference(problem, result, np.mean([_float64(problem.updates[i]) for i in best], 0), slice(None))

    return check


def _bulyan(problem: Problem, result: RuleResult) -> str | None:
    n, f = problem.num_clients, problem.num_malicious
    left = list(range(n))
    chosen: list[int] = []
    while len(chosen) < n - 2 * f:
        distances = problem.squared_distances[np.ix_(left, left)]
        scores = np.sort(distances, 1)[:, 1 : max(1, len(left) - f - 2) + 1].sum(1)
        chosen.append(left.pop(int(np.argmin(scores))))
    if result.kept is not None and set(result.kept.nonzero().flatten().tolist()) != set(chosen):
        return "other clients are kept"
    columns = _chosen_columns(problem.updates.shape[1])
    values_TC = _float64(problem.updates[chosen][:, torch.from_numpy(columns).to(problem.updates.device)])
    want_C = [_mean_near_median(column, n - 4 * f) for column in values_TC.T]
    return _difference(problem, result, np.array(want_C), columns)


def _mean_near_median(values: np.ndarray, count: int) -> float:
    middle = float(np.median(values))
    return float(np.mean(sorted(values.tolist(), key=lambda value: abs(value - middle))[:count]))


def _fltrust(problem: Problem, result: RuleResult) -> str | None:
    root_P = _float64(problem.updates[-1])
    root_length = np.linalg.norm(root_P)
    total_P, total_score = np.zeros_like(root_P), 0.0
    for row_P in map(_float64, problem.updates[:-1]):
        length = np.linalg.norm(row_P)
        score = max(0.0, float(row_P @ root_P / (length * root_length)))
        total_P += score * root_length / length * row_P
        total_score += score
    return _difference(problem, result, total_P / total_score, slice(None))


def _skymask(problem: Problem, result: RuleResult) -> str | None:
    """The verdict of the same round with solver `reference`."""
    model = problem.model
    defence = SkyMask(model.module, model.inputs, model.labels, training=problem.training, solver="reference")
    info = make_info(problem)
    want = defence.aggregate(problem.updates[:-1], global_params=info.global_params, root_update=info.root_update)
    if result.kept is None or not torch.equal(result.kept, want.benign):
        return "the verdict differs from that of solver reference"
    return _difference(problem, result, _float64(want.update), slice(None))


CHECKS: dict[str, tuple[Check, str]] = {
    "bulyan": (_bulyan, "a loop over the rounds of the choice, 500 columns"),
    "fedavg": (_coordinatewise(lambda values_NC, _: values_NC.mean(0)), "NumPy's mean, 500 columns"),
    "fltrust": (_fltrust, "a loop over the clients"),
    "geometric-median": (_geometric_median, "its defining property"),
    "krum": (_krum(), "a loop over the clients"),
    "median": (_coordinatewise(lambda values_NC, _: np.median(values_NC, 0)), "NumPy's median, 500 columns"),
    "multi-krum": (_multi_krum(), "a loop over the clients"),
    "skymask": (_skymask, "the same round with solver reference"),
    "trimmed-mean": (_coordinatewise(_trimmed), "a loop over 500 columns"),
}

# ByzFL's aggregators by class name, and whether they take f; each against its own definition
BYZFL: dict[str, tuple[bool, Check, str]] = {
    "Average": (False, *CHECKS["fedavg"]),
    "Median": (False, *CHECKS["median"]),
    "TrMean": (True, *CHECKS["trimmed-mean"]),
    "GeometricMedian": (False, _three_weiszfeld_steps, "three steps, one client at a time"),
    "Krum": (True, _krum(1), "a loop over the clients, n - f - 1 neighbours"),
    "MultiKrum": (True, _multi_krum(1), "a loop over the clients, n - f - 1 neighbours"),
}


def byzfl_aggregator(name: str, num_malicious: int) -> Callable[[Tensor], Tensor] | None:
    """An aggregator of ByzFL, None if it is not installed.

    Its package imports torchvision, which fails beside torch for CPUs only, so its modules are loaded without the package's
    own ``__init__``.
    """
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None or spec.submodule_search_locations is None:
            return None
        package = types.ModuleType("byzfl")
        package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
        sys.modules["byzfl"] = package
    aggregators: Any = importlib.import_module("byzfl.aggregators")
    return getattr(aggregators, name)(f=num_malicious) if BYZFL[name][0] else getattr(aggregators, name)()
