"""SignGuard: filters updates by their length and by how many of their values are positive."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.choices import above_zero, positive_share
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult
from skymask_gpu.federation.rules.rows import clipped_mean, row_norms

__all__ = ["SignGuard", "signguard"]

_NEIGHBOURS = 0.5


@dataclass(frozen=True, kw_only=True)
class SignGuard:
    """Settings of ``signguard``.

    Attributes:
        shortest: updates shorter than this multiple of the median length are rejected; L.
        longest: updates longer than this multiple of it are rejected; R.
        columns_share: the share of the parameters whose signs are counted.
    """

    shortest: float = 0.1
    longest: float = 3.0
    columns_share: float = 0.1

    def __post_init__(self) -> None:
        above_zero("defence.shortest", self.shortest)
        if not 1 <= self.longest < float("inf"):
            raise ValueError(f"defence.longest must be finite and at least 1, the median itself, got {self.longest!r}")
        if self.shortest > 1:
            raise ValueError(f"defence.shortest must be at most 1, the median itself, got {self.shortest!r}")
        positive_share("defence.columns_share", self.columns_share)


@RULES.register("signguard", settings=SignGuard)
def signguard(updates_MP: Tensor, info: RoundInfo, settings: SignGuard) -> RuleResult:
    """SignGuard in its plain form (Xu et al., ICDCS 2022, arXiv 2109.05872).

    With m the median length, the first filter keeps the clients with L <= |update| / m <= R. The
    second one draws a share of the parameters, describes each client by the shares of positive,
    zero and negative values there, clusters the clients by MeanShift, and keeps the largest
    cluster. Who passes both is kept; their updates are clipped to length m and averaged. If nobody
    passes both, the update is zero.

    Where the paper leaves room: MeanShift's bandwidth is the mean distance to the neighbour at half
    of all clients (scikit-learn's ``estimate_bandwidth`` with quantile 0.5, all clients). The
    variants SignGuard-Sim and -Dist, which also compare with earlier rounds, are not here.
    """
    num_params = updates_MP.shape[1]
    norms_M = row_norms(updates_MP)
    middle = norms_M.quantile(0.5)
    in_length_M = (norms_M >= settings.shortest * middle) & (norms_M <= settings.longest * middle)
    num_drawn = max(1, round(settings.columns_share * num_params))
    drawn = torch.randperm(num_params, generator=info.generator)[:num_drawn].sort().values.to(updates_MP.device)
    kept_M = in_length_M & _largest_cluster(_sign_shares(updates_MP[:, drawn]))
    return RuleResult(clipped_mean(updates_MP, kept_M, norms_M, middle), kept_M)


def _sign_shares(part_Mb: Tensor) -> Tensor:
    """The shares of positive, zero and negative values, ``(M, 3)`` float64."""
    counts = [(part_Mb > 0).sum(1), (part_Mb == 0).sum(1), (part_Mb < 0).sum(1)]
    return torch.stack(counts, 1).double() / part_Mb.shape[1]


def _largest_cluster(features_MF: Tensor) -> Tensor:
    """The clients of MeanShift's largest cluster, ``(M,)`` bool; all if they are alike."""
    from sklearn.cluster import MeanShift, estimate_bandwidth

    values = features_MF.cpu().numpy()
    bandwidth = estimate_bandwidth(values, quantile=_NEIGHBOURS) if len(values) > 1 else 0.0
    # More than half of the clients are the same point then, and MeanShift has no bandwidth for it.
    if bandwidth <= 0:
        same_MM = (features_MF[:, None] == features_MF).all(2)
        return same_MM[same_MM.sum(1).argmax()]
    labels_M = torch.from_numpy(MeanShift(bandwidth=bandwidth).fit_predict(values)).to(features_MF.device)
    return labels_M == labels_M.bincount().argmax()
