"""SkyMask among the rules."""

from torch import Tensor

from skymask_gpu.defence import SkyMask
from skymask_gpu.federation.rules.interface import RoundInfo, RuleResult

__all__ = ["SkyMaskRule"]


class SkyMaskRule:
    """SkyMask (Yan et al., ECCV 2024) with its root model trained like a client. It rejects NaN and Inf itself."""

    def __init__(self, defence: SkyMask) -> None:
        self._defence = defence

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        result = self._defence.aggregate(updates_MP, global_params=info.global_params, root_update=info.root_update)
        return RuleResult(result.update, result.benign, result)
