"""AlignIns: rejects updates whose direction or signs stand apart from the others'."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.choices import above_zero, positive_share
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult
from skymask_gpu.federation.rules.rows import clipped_mean, column_blocks, median_deviations, row_norms, weighted_sum

__all__ = ["AlignIns", "alignins"]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class AlignIns:
    """Settings of ``alignins``.

    Attributes:
        direction_bound: clients whose cosine with the global model is further from the median than
            this number of standard deviations are rejected; lambda_c.
        sign_bound: the same for the share of agreeing signs; lambda_s.
        top_share: the share of an update's parameters, its largest, whose signs are compared.
    """

    direction_bound: float = 1.0
    sign_bound: float = 1.0
    top_share: float = 0.3

    def __post_init__(self) -> None:
        above_zero("defence.direction_bound", self.direction_bound)
        above_zero("defence.sign_bound", self.sign_bound)
        positive_share("defence.top_share", self.top_share)


@RULES.register("alignins", settings=AlignIns)
def alignins(updates_MP: Tensor, info: RoundInfo, settings: AlignIns) -> RuleResult:
    """AlignIns (Xu, Zhang & Hu, CVPR 2025, arXiv 2503.07978).

    Two numbers per client are compared among clients, with w the global model:

    * TDA_i = <u_i, w> / (|u_i| |w|), the alignment with the model;
    * MPSA_i = the share of the k largest values of u_i whose sign is the principal sign of their
      parameter, which is the sign of the sum of all clients' signs.

    A client is kept if both have |x_i - median| / deviation below their bound. Kept updates are
    clipped to the median length of the kept ones and averaged; if nobody is kept, the update is
    zero. The deviation is the standard deviation (with division by n), not the median absolute one
    that some accounts of the rule name. If all values are the same, nobody stands apart.
    """
    norms_M = row_norms(updates_MP)
    along_M = weighted_sum(updates_MP.T, info.global_params)
    length = torch.linalg.vector_norm(info.global_params.double())
    directions_M = along_M / (norms_M * length).clamp_min(_TINY)
    is_close_M = median_deviations(directions_M) < settings.direction_bound
    kept_M = is_close_M & (median_deviations(_agreement(updates_MP, settings.top_share)) < settings.sign_bound)
    bound = norms_M[kept_M].quantile(0.5) if kept_M.any() else norms_M.new_zeros(())
    return RuleResult(clipped_mean(updates_MP, kept_M, norms_M, bound), kept_M)


def _agreement(updates_MP: Tensor, top_share: float) -> Tensor:
    """The share of each row's largest values with the principal sign, ``(M,)`` float64."""
    num_top = max(1, math.floor(top_share * updates_MP.shape[1]))
    # One row at a time, since the places of the largest values are 64-bit numbers.
    tops = [row_P.abs().topk(num_top).indices for row_P in updates_MP]
    principal_P = torch.cat([block.sign().sum(0).sign() for block in column_blocks(updates_MP)])
    agree = [(row_P[top].sign() == principal_P[top]).sum() for row_P, top in zip(updates_MP, tops, strict=True)]
    return torch.stack(agree).double() / num_top
