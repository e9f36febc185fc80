"""Rules that bound the length of each update: centred clipping and normalised averaging."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult
from skymask_gpu.federation.rules.rows import row_norms, squared_distances_to, weighted_sum

__all__ = ["CentredClipping", "CentredClippingSettings", "NormalisedMean", "fed_nga"]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class CentredClippingSettings:
    """Settings of ``centred-clipping``.

    Attributes:
        radius: how far an update may pull, tau in the paper; 0 means the median distance of the
            round's updates from the present point.
        steps: the number of times that the point is moved in a round, L in the paper.
    """

    radius: float = 0.0
    steps: int = 3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise ValueError(f"defence.radius must be finite and at least 0 (0: the median distance), got {self.radius!r}")
        if self.steps < 1:
            raise ValueError(f"defence.steps must be at least 1, got {self.steps!r}")


@RULES.register("centred-clipping", settings=CentredClippingSettings)
class CentredClipping:
    """Centred clipping (Karimireddy, He & Jaggi, ICML 2021).

    The point v starts from the result of the round before, or from zero in the first round, and is
    moved L times by

        v <- v + 1/n sum_i (u_i - v) min(1, tau / |u_i - v|).

    The paper's tau is a number that has to suit the length of the updates, 10 / (1 - beta) for
    gradients with momentum beta. Updates of local training have another length, so by default tau
    is the median distance from v, anew in each step. This default is not the paper's.
    """

    def __init__(self, context: RuleContext, settings: CentredClippingSettings) -> None:
        self._settings = settings
        self._point_P: Tensor | None = None

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        point_P = updates_MP.new_zeros(updates_MP.shape[1]) if self._point_P is None else self._point_P
        point_P = point_P.double()
        for _ in range(self._settings.steps):
            distances_M = squared_distances_to(updates_MP, point_P).sqrt()
            radius = self._settings.radius or distances_M.quantile(0.5)
            weights_M = (radius / distances_M.clamp_min(_TINY)).clamp_max(1) / len(updates_MP)
            point_P = (1 - weights_M.sum()) * point_P + weighted_sum(updates_MP, weights_M)
        self._point_P = point_P
        return RuleResult(point_P.to(updates_MP.dtype), None)

    def state(self) -> dict[str, Tensor]:
        return {} if self._point_P is None else {"point": self._point_P}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._point_P = state.get("point")


@dataclass(frozen=True, kw_only=True)
class NormalisedMean:
    """Settings of ``fed-nga``.

    Attributes:
        step: the mean of the unit vectors is multiplied by this, eta in the paper; 0 means the
            median length of the round's updates.
    """

    step: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step >= 0):
            raise ValueError(f"defence.step must be finite and at least 0 (0: the median length), got {self.step!r}")


@RULES.register("fed-nga", settings=NormalisedMean)
def fed_nga(updates_MP: Tensor, info: RoundInfo, settings: NormalisedMean) -> RuleResult:
    """Fed-NGA (Zuo et al., NeurIPS 2025, arXiv 2408.09539): eta/n sum_i u_i / |u_i|.

    Every client counts alike, whatever its length; an update of zeros adds nothing. The paper's eta
    is a schedule of the server. With ``server_lr`` for the schedule, the default eta here is the
    median length, so that the step is as long as an honest one. This default is not the paper's.
    """
    norms_M = row_norms(updates_MP)
    step = settings.step or norms_M.quantile(0.5)
    weights_M = step / len(updates_MP) / norms_M.clamp_min(_TINY)
    return RuleResult(weighted_sum(updates_MP, weights_M).to(updates_MP.dtype), None)
