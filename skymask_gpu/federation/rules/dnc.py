"""Divide-and-conquer: rejects the updates with the largest part along the first principal axis."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.choices import above_zero
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleResult
from skymask_gpu.federation.rules.rows import inner_products, mean_of_kept

__all__ = ["DivideAndConquer", "dnc"]


@dataclass(frozen=True, kw_only=True)
class DivideAndConquer:
    """Settings of ``dnc``.

    Attributes:
        trials: how often a subset of the parameters is drawn; a client that any trial rejects is
            rejected.
        columns: the number of parameters in a subset, ``b`` in the paper; at most all are taken.
        removed: each trial rejects this multiple of the assumed number of attackers, ``c`` in the
            paper, rounded up.
    """

    trials: int = 1
    columns: int = 10_000
    removed: float = 1.0

    def __post_init__(self) -> None:
        for name in ("trials", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"defence.{name} must be at least 1, got {getattr(self, name)!r}")
        above_zero("defence.removed", self.removed)


@RULES.register("dnc", settings=DivideAndConquer)
def dnc(updates_MP: Tensor, info: RoundInfo, settings: DivideAndConquer) -> RuleResult:
    """Divide-and-conquer, DnC (Shejwalkar & Houmansadr, NDSS 2021, algorithm 2).

    Each trial draws a subset of the parameters. Let X be the updates there minus their mean, and v
    the first right singular vector of X. The score of client i is (X_i v)^2, and the c f clients
    with the largest scores are rejected. The mean of the clients that no trial rejects is the
    result. At least one client survives a trial, but with several trials all may be rejected; the
    update is then zero.
    """
    num_rows, num_params = updates_MP.shape
    num_kept = max(1, num_rows - math.ceil(settings.removed * info.num_malicious))
    kept_M = torch.ones(num_rows, dtype=torch.bool, device=updates_MP.device)
    for _ in range(settings.trials):
        drawn = torch.randperm(num_params, generator=info.generator)[: settings.columns].sort().values
        part_Mb = updates_MP[:, drawn.to(updates_MP.device)]
        order = _scores(part_Mb).argsort(stable=True)
        kept_M[order[num_kept:]] = False
    return RuleResult(mean_of_kept(updates_MP, kept_M), kept_M)


def _scores(part_Mb: Tensor) -> Tensor:
    """The squared projections on the first right singular vector, ``(M,)`` float64.

    With X = U S V^T, the projections X v are s u. They follow from the (M, M) matrix X X^T.
    """
    values_M, vectors_MM = torch.linalg.eigh(inner_products(part_Mb, -part_Mb.double().mean(0)))
    return values_M[-1].clamp_min(0) * vectors_MM[:, -1].square()
