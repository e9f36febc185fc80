"""FedLAW: learns the clients' weights, few and none of them large, by the loss of their mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.federation.choices import above_zero
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, needs_root_data
from skymask_gpu.federation.rules.rows import row_norms, weighted_sum

__all__ = ["FedLaw", "FedLawSettings"]

_TINY = torch.finfo(torch.float64).tiny
# A cap that exceeds the equal weight by less than this share leaves only equal weights.
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class FedLawSettings:
    """Settings of ``fedlaw``.

    Attributes:
        weight_steps: the steps of gradient descent on the weights per round.
        weight_lr: their learning rate, beta; weights per unit of the loss.
        cap: the largest weight of a client, t, as a multiple of 1 / s; 1 means equal weights.
    """

    weight_steps: int = 10
    weight_lr: float = 0.1
    cap: float = 1.1

    def __post_init__(self) -> None:
        if self.weight_steps < 1:
            raise ValueError(f"defence.weight_steps must be at least 1, got {self.weight_steps!r}")
        above_zero("defence.weight_lr", self.weight_lr)
        if not 1 <= self.cap < float("inf"):
            raise ValueError(f"defence.cap must be finite and at least 1, the equal weight itself, got {self.cap!r}")


@RULES.register("fedlaw", settings=FedLawSettings)
@needs_root_data
class FedLaw:
    """FedLAW, learnable aggregation weights (Parsa et al., ICLR 2026, arXiv 2511.03529).

    The weights w are sought on the sparse capped simplex: sum w_i = 1, 0 <= w_i <= t, and at most s
    of them are not 0. Each step tries the model with the present weights, x = theta + sum w_i u_i,
    and moves the weights down the gradient of its loss, w <- P(w - beta <u_i, grad f(x)>). P
    projects on the simplex exactly (theorem 1): it keeps the s largest values and projects these on
    {0 <= w_i <= t, sum w_i = 1}. The result is sum w_i u_i; clients with a weight above 0 are kept.

    In the paper, the clients report the loss and the gradient at the model that is tried, and each
    weight multiplies its client's own loss. A rule sees only what clients send once, and attackers
    would report what they like. f is therefore the loss on the server's own samples, for all
    clients. The paper makes one step per round and remembers the weights; here each round starts
    from equal weights and makes several steps, so that other clients may take part in each round.

    Further: s is n - f, as in the paper. Its cap is 1 / (s - 10) for 200 clients, which is 1.06 to
    1.09 times 1 / s; here it is a multiple. Updates are clipped to the median length first, where
    the paper assumes a bound. beta and the number of steps are our own. If the gradient is not
    finite, no further step is made. If it is the first one, the update is zero and nobody is kept.
    """

    def __init__(self, context: RuleContext, settings: FedLawSettings) -> None:
        self._loss, self._settings = FlatModel(context.module, context.root_inputs, context.root_labels), settings

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        norms_M = row_norms(updates_MP)
        scale_M = (norms_M.quantile(0.5) / norms_M.clamp_min(_TINY)).clamp_max(1)
        weights_M = self._weights(updates_MP, scale_M, info)
        update_P = weighted_sum(updates_MP, weights_M * scale_M).to(updates_MP.dtype)
        return RuleResult(update_P, weights_M > 0)

    def _weights(self, updates_MP: Tensor, scale_M: Tensor, info: RoundInfo) -> Tensor:
        """The learnt weights, ``(M,)`` float64; all 0 if there is no gradient."""
        loss, num_rows = self._loss.to(updates_MP.device), len(updates_MP)
        most = max(1, num_rows - info.num_malicious)
        weights_M, learnt_M = torch.full_like(scale_M, 1 / num_rows), torch.zeros_like(scale_M)
        for _ in range(self._settings.weight_steps):
            tried_P = info.global_params + weighted_sum(updates_MP, weights_M * scale_M)
            gradient_P = _gradient(loss, tried_P)
            if not torch.isfinite(gradient_P).all():
                break
            slopes_M = weighted_sum(updates_MP.T, gradient_P) * scale_M
            weights_M = learnt_M = _projected(weights_M - self._settings.weight_lr * slopes_M, most, self._settings.cap)
        return learnt_M


def _gradient(loss: FlatModel, params_P: Tensor) -> Tensor:
    params_P = params_P.to(loss.initial_params).requires_grad_()
    with torch.enable_grad():
        (gradient_P,) = torch.autograd.grad(loss(params_P), params_P)
    return gradient_P


def _projected(values_M: Tensor, most: int, cap: float) -> Tensor:
    """The nearest weights, at most ``most`` above 0 and none above ``cap / most``, ``(M,)``."""
    largest_S = values_M.argsort(descending=True, stable=True)[:most]
    weights_M = torch.zeros_like(values_M)
    weights_M[largest_S] = _on_capped_simplex(values_M[largest_S], cap / most)
    return weights_M


def _on_capped_simplex(values_S: Tensor, cap: float) -> Tensor:
    """The nearest point with values from 0 to ``cap`` whose sum is 1, ``(S,)``.

    It is clamp(v - tau, 0, cap). The sum falls with tau, and is linear between the points at which
    a value reaches 0 or the cap.
    """
    if cap * len(values_S) <= 1 + _ROUNDING:
        return torch.full_like(values_S, 1 / len(values_S))
    knots_K = torch.cat([values_S, values_S - cap]).sort().values
    sums_K = (values_S - knots_K[:, None]).clamp(0, cap).sum(1)
    # The sum is S * cap > 1 at the first knot and 0 at the last one.
    left = int((sums_K >= 1).sum()) - 1
    share = (sums_K[left] - 1) / (sums_K[left] - sums_K[left + 1])
    return (values_S - torch.lerp(knots_K[left], knots_K[left + 1], share)).clamp(0, cap)
