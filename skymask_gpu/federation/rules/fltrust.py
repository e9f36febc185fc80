"""FLTrust: a client's weight is how far it agrees with an update that the server trains itself."""

import torch
from torch import Tensor

from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult, needs_root_data
from skymask_gpu.federation.rules.rows import row_norms, weighted_sum

__all__ = ["fltrust"]

_TINY = torch.finfo(torch.float64).tiny


@RULES.register("fltrust")
@needs_root_data
def fltrust(updates_MP: Tensor, info: RoundInfo) -> RuleResult:
    """FLTrust (Cao et al., NDSS 2021).

    A client's trust score is the cosine of the angle between its update and the root update, or 0
    if the cosine is negative. Each client's update is scaled to the length of the root update, and
    their mean, weighted by the scores, is the result. Clients with a score above 0 are kept. If
    there is none, the result is zero.

    Raises:
        ValueError: ``info.root_update`` is not finite.
    """
    if not torch.isfinite(info.root_update).all():
        raise ValueError(
            "root_update must be finite, got NaN or Inf; without a trusted root FLTrust has no scores, use a smaller local.lr"
        )
    root_P = info.root_update.double()
    root_length = torch.linalg.vector_norm(root_P)
    lengths_M = row_norms(updates_MP)
    products_M = weighted_sum(updates_MP.T, root_P)
    scores_M = (products_M / (lengths_M * root_length).clamp_min(_TINY)).clamp_min(0)
    kept_M = scores_M > 0
    weights_M = scores_M / scores_M.sum().clamp_min(_TINY) * root_length / lengths_M.clamp_min(_TINY)
    return RuleResult(weighted_sum(updates_MP, weights_M).to(updates_MP.dtype), kept_M)
