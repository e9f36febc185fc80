"""SkyMask's whole round, from the updates to the mean of the kept clients, split by phase.

The solver is ``collapsed``, which rounds of more than about 60 clients use on a CPU. The phases are
those of a round's profile, without its looks at memory.
"""

from collections.abc import Callable

import torch

from skymask_gpu.bench.cases import Problem
from skymask_gpu.bench.rules import CHECKS
from skymask_gpu.defence import Aggregation, RootTraining, SkyMask, root_direction
from skymask_gpu.engine.profiling import OTHER, recording
from skymask_gpu.federation.rules import RuleResult

__all__ = ["PHASES", "TimedRound", "wrong_round"]

# The rows of the table, and the phases of a profile that each consists of.
PHASES = {
    "root direction": ("root",),
    "collecting": ("collect", "suspects"),
    "masks, 20 model passes": ("model passes",),
    "masks, all else": ("binning", "mask steps", "cuts", "bits"),
    "distances": ("distances",),
    "clustering": ("clustering",),
    "averaging": ("average", OTHER),
}
# Cosines of float32 updates may differ by this from those that are computed in float64 throughout.
# The root direction's clipped steps amplify rounding.
_MOST_COSINE_ERROR, _MOST_NORM_ERROR = 1e-2, 1e-5


class TimedRound:
    """A call of :meth:`SkyMask.aggregate` that knows what its phases took.

    Args:
        problem: the clients' updates, and the root model's row last.
        given: whether that row is passed as ``root_update``; otherwise the server has none.
        prepared: whether :meth:`SkyMask.prepare` was called before, which is not timed.

    Attributes:
        phases: the seconds of each of :data:`PHASES` in the latest call.
    """

    def __init__(self, problem: Problem, *, given: bool, prepared: bool = False) -> None:
        self.phases: dict[str, float] = {}
        self._problem = problem
        self._aggregate = aggregation(problem, "collapsed", given=given, prepared=prepared)

    def __call__(self) -> Aggregation:
        with recording(self._problem.updates.device, memory=False) as record:
            result = self._aggregate()
        # The bandwidth plays no part in the seconds.
        costs = record.profile(bandwidth=1.0).phases
        self.phases = {name: sum(costs[of].seconds for of in own if of in costs) for name, own in PHASES.items()}
        return result


def aggregation(problem: Problem, solver: str, *, given: bool, prepared: bool = False) -> Callable[[], Aggregation]:
    """A round of SkyMask with this solver."""
    model, rows_NP, root_P = problem.model, problem.updates[:-1], problem.updates[-1]
    defence = SkyMask(model.module, model.inputs, model.labels, training=problem.training, solver=solver)
    if prepared:
        defence.prepare()
    return lambda: defence.aggregate(rows_NP, root_update=root_P if given else None)


def wrong_round(problem: Problem, result: Aggregation, *, given: bool) -> str | None:
    """What is wrong with a round, or None: its verdict, its mean, its norms or its cosines."""
    if not torch.equal(result.benign, aggregation(problem, "fused", given=given)().benign):
        return "the verdict differs from that of solver fused"
    if result.benign.tolist() != [client >= problem.num_malicious for client in range(problem.num_clients)]:
        return f"clients {sorted(result.rejected)} are rejected, not the {problem.num_malicious} attackers, the first ones"
    wrong_mean, _ = CHECKS["fedavg"]
    reason = wrong_mean(problem, RuleResult(result.update, result.benign))
    if reason is not None:
        return reason
    exact = problem.model.loss.to(torch.float64)
    direction_P = root_direction(exact, exact.initial_params, RootTraining(), small_batches=True)
    norm_N, cosine_N = torch.empty(2, problem.num_clients, dtype=torch.float64)
    for client, update_P in enumerate(problem.updates[:-1]):
        norm_N[client] = torch.linalg.vector_norm(update_P.double())
        cosine_N[client] = update_P.double() @ direction_P / norm_N[client] / torch.linalg.vector_norm(direction_P)
    norm_error = float((result.norms.cpu() / norm_N - 1).abs().max())
    if not norm_error <= _MOST_NORM_ERROR:
        return f"a norm is off by {norm_error:.1e} of itself"
    cosine_error = float((result.cosines.cpu() - cosine_N).abs().max())
    return None if cosine_error <= _MOST_COSINE_ERROR else f"a cosine with the root direction is off by {cosine_error:.1e}"
