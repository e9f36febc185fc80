"""Aggregation rules: from the clients' updates to the server's step."""

from collections.abc import Callable

from skymask_gpu.defence import SkyMask
from skymask_gpu.federation.rules.averages import fedavg, geometric_median, median, trimmed_mean
from skymask_gpu.federation.rules.context import RuleContext
from skymask_gpu.federation.rules.deepsight import DeepSight
from skymask_gpu.federation.rules.flame import flame
from skymask_gpu.federation.rules.fldetector import FLDetector
from skymask_gpu.federation.rules.fltrust import fltrust
from skymask_gpu.federation.rules.interface import RoundInfo, Rule, RuleResult
from skymask_gpu.federation.rules.krum import bulyan, krum, multi_krum
from skymask_gpu.federation.rules.skymask import SkyMaskRule
from skymask_gpu.federation.rules.tolpegin import Tolpegin
from skymask_gpu.federation.rules.wrappers import FiniteRows, Stateless

__all__ = ["RULES", "RoundInfo", "Rule", "RuleContext", "RuleResult", "build_rule"]


def _skymask(context: RuleContext) -> Rule:
    defence = SkyMask(
        context.module,
        context.root_inputs,
        context.root_labels,
        training=context.training,
        clustering=context.clustering,
        root_training=context.root_training,
        solver=context.solver,
    )
    return Stateless(SkyMaskRule(defence))


# FedAvg takes what comes, and SkyMask rejects NaN and Inf itself; the others are not given them.
RULES: dict[str, Callable[[RuleContext], Rule]] = {
    "bulyan": lambda context: FiniteRows(Stateless(bulyan)),
    "deepsight": lambda context: FiniteRows(Stateless(DeepSight(context))),
    "fedavg": lambda context: Stateless(fedavg),
    "flame": lambda context: FiniteRows(Stateless(flame)),
    "fldetector": lambda context: FiniteRows(FLDetector(context.num_clients)),
    "fltrust": lambda context: FiniteRows(Stateless(fltrust)),
    "geometric-median": lambda context: FiniteRows(Stateless(geometric_median)),
    "krum": lambda context: FiniteRows(Stateless(krum)),
    "median": lambda context: FiniteRows(Stateless(median)),
    "multi-krum": lambda context: FiniteRows(Stateless(multi_krum)),
    "skymask": _skymask,
    "tolpegin": lambda context: FiniteRows(Stateless(Tolpegin(context))),
    "trimmed-mean": lambda context: FiniteRows(Stateless(trimmed_mean)),
}


def build_rule(name: str, context: RuleContext) -> Rule:
    """The rule called ``name``.

    Raises:
        ValueError: unknown name, or the rule does not fit the model.
    """
    if name not in RULES:
        raise ValueError(f"defence.rule must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name](context)
