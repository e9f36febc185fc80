"""Aggregation rules: from the clients' updates to the server's step."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from skymask_gpu.defence import Aggregation, SkyMask
from skymask_gpu.engine import Clustering, MaskTraining
from skymask_gpu.root import RootTraining

__all__ = ["RULES", "Rule", "RuleResult", "build_rule"]


@dataclass(frozen=True)
class RuleResult:
    """The server's step, ``(P,)``; which clients it is made of, ``(N,)`` bool; and SkyMask's own result, if it was SkyMask."""

    update: Tensor
    kept: Tensor
    aggregation: Aggregation | None = None


class Rule(Protocol):
    """Called once a round with updates ``(N, P)``, global parameters ``(P,)`` and the root model's update ``(P,)``."""

    def __call__(self, updates: Tensor, global_params: Tensor, root_update: Tensor) -> RuleResult: ...


class FedAvg:
    """The plain mean (McMahan et al., AISTATS 2017) with equal weights."""

    def __call__(self, updates: Tensor, global_params: Tensor, root_update: Tensor) -> RuleResult:
        return RuleResult(updates.mean(0), updates.new_ones(len(updates)).bool())


class SkyMaskRule:
    """SkyMask with its root model trained like a client."""

    def __init__(self, defence: SkyMask) -> None:
        self._defence = defence

    def __call__(self, updates: Tensor, global_params: Tensor, root_update: Tensor) -> RuleResult:
        result = self._defence.aggregate(updates, global_params=global_params, root_update=root_update)
        return RuleResult(result.update, result.benign, result)


RULES = ("fedavg", "skymask")


def build_rule(
    name: str,
    module: nn.Module,
    root_inputs: Tensor,
    root_labels: Tensor,
    *,
    training: MaskTraining,
    clustering: Clustering,
    root_training: RootTraining,
    solver: str,
) -> Rule:
    """The rule called ``name``.

    Raises:
        ValueError: unknown name.
    """
    if name not in RULES:
        raise ValueError(f"defence.rule must be one of {', '.join(RULES)}, got {name!r}")
    if name == "fedavg":
        return FedAvg()
    defence = SkyMask(
        module,
        root_inputs,
        root_labels,
        training=training,
        clustering=clustering,
        root_training=root_training,
        solver=solver,
    )
    return SkyMaskRule(defence)
