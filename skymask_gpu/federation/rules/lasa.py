"""LASA: sparsifies the updates, and averages in each layer those that do not stand apart there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.choices import above_zero
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult
from skymask_gpu.federation.rules.layers import Layers
from skymask_gpu.federation.rules.rows import median_deviations, row_norms, weighted_sum

__all__ = ["Lasa", "LasaSettings"]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class LasaSettings:
    """Settings of ``lasa``.

    Attributes:
        sparsity: the share of each update's parameters, its smallest, that are set to zero.
        magnitude_bound: a client is left out of a layer if its length there is this number of
            standard deviations or more from the median; lambda_m.
        purity_bound: the same for the share of positive signs; lambda_d.
    """

    sparsity: float = 0.3
    magnitude_bound: float = 1.0
    purity_bound: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"defence.sparsity must be at least 0 and below 1, got {self.sparsity!r}")
        above_zero("defence.magnitude_bound", self.magnitude_bound)
        above_zero("defence.purity_bound", self.purity_bound)


@RULES.register("lasa", settings=LasaSettings)
class Lasa:
    """LASA, layer-adaptive sparsified aggregation (Xu, Zhang & Hu, WACV 2025, arXiv 2409.01435).

    Updates are clipped to the median length of all updates. In each of them, the smallest values
    are set to zero, and values as large as the smallest that stays, stay as well. Two numbers per
    client and layer are then compared among clients:

    * the length of the client's layer;
    * its positive direction purity, rho = (1 + sum sgn(x) / sum |sgn(x)|) / 2, the share of
      positive ones among the values that are left, or 1/2 if none is left.

    A client counts in a layer if both have |x - median| / deviation below their bound; if none
    does, all count there. The step in a layer is the mean of what is left there of the clients that
    count. A layer is one parameter: a weight and its bias are judged apart.

    A client is kept if it counts in at least one layer, because the step is made of its update,
    too. Only who counts nowhere is rejected. ``record`` has the number of clients that count in
    each layer, as ``kept_by_layer``.

    Where the paper leaves room, this is what its authors' code (MIT) does: the clipping, that the
    sparsified updates are averaged, that all clients count where none would, the deviation (the
    standard one, with division by n) and the three defaults. That code sparsifies only parameters
    of two or four dimensions; here it is the whole update. If all values are the same, nobody
    stands apart.

    Raises:
        ValueError: the model has no parameters, or others than the updates.
    """

    def __init__(self, context: RuleContext, settings: LasaSettings) -> None:
        self._layers, self._settings = Layers.of(context.module, "lasa"), settings

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        norms_M = row_norms(updates_MP)
        scale_M = (norms_M.quantile(0.5) / norms_M.clamp_min(_TINY)).clamp_max(1)
        smallest_M = _smallest_that_stay(updates_MP, self._settings.sparsity)
        steps, counts = [], {}
        for name, part_Mp in self._layers.parameters(updates_MP):
            sparse_Mp = torch.where(part_Mp.abs() >= smallest_M[:, None], part_Mp, 0)
            counts[name] = counts_M = self._counts(sparse_Mp, scale_M)
            steps.append(weighted_sum(sparse_Mp, counts_M * scale_M / counts_M.sum()))
        kept_M = torch.stack(list(counts.values())).any(0)
        record = {"kept_by_layer": {name: int(counts_M.sum()) for name, counts_M in counts.items()}}
        return RuleResult(torch.cat(steps).to(updates_MP.dtype), kept_M, record)

    def _counts(self, sparse_Mp: Tensor, scale_M: Tensor) -> Tensor:
        """The clients that do not stand apart in a layer, or all, ``(M,)`` bool."""
        signs_M = sparse_Mp.sign().sum(1, dtype=torch.float64)
        purity_M = (1 + signs_M / sparse_Mp.count_nonzero(1).clamp_min(1)) / 2
        counts_M = median_deviations(row_norms(sparse_Mp) * scale_M) < self._settings.magnitude_bound
        counts_M &= median_deviations(purity_M) < self._settings.purity_bound
        return counts_M if counts_M.any() else torch.ones_like(counts_M)


def _smallest_that_stay(updates_MP: Tensor, sparsity: float) -> Tensor:
    """The smallest magnitude in each update that is not set to zero, ``(M,)``."""
    num_zeros = int(sparsity * updates_MP.shape[1])
    # One row at a time, because the order of all values would take twice the memory of the updates.
    return torch.stack([row_P.abs().kthvalue(num_zeros + 1).values for row_P in updates_MP])
