"""What a solver returns, and the evaluation of the loss that the batched solvers share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.profiling import phase

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cuts:
    """A trained mask as a threshold test on the update, column by column: ``bit = (update < position) == left``.

    Attributes:
        position: ``(P,)`` float32, in units of the updates; inf where the column is constant.
        left: ``(P,)`` bool, the bit of updates below the position.
        constant: ``(P,)`` bool: all rows have the same bit, which says nothing about anybody.
        several: ``(P,)`` bool: the bits change more than once; there the position is the first change, and the bits are exact.
    """

    position: Tensor
    left: Tensor
    constant: Tensor
    several: Tensor


@dataclass(frozen=True)
class Solution:
    """Masks as a solver leaves them."""

    bits: Tensor  # (R, ceil(P / 8)) uint8
    logits_RP: Tensor | None
    losses: list[float]  # one a step, before the step
    cuts: Cuts | None = None  # the collapsed solver only


def loss_and_gradient(loss: Loss, params_P: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, ``()``, and its gradient, ``(P,)``, both detached; the loss is NaN where the gradient is not finite."""
    params_P = params_P.detach().requires_grad_()
    with phase("model passes", 2 * params_P.nbytes), torch.enable_grad():
        value = loss(params_P)
        (grad_P,) = torch.autograd.grad(value, params_P)
    return torch.where(grad_P.isfinite().all(), value.detach(), torch.nan), grad_P
