"""What a solver returns, and what the batched solvers share: the masked model from step to step, and where training may end."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.training_config import MaskTraining

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
    not_captured: str | None = None  # why the steps were not replayed from a CUDA graph, where they should have been


def loss_and_gradient(loss: Loss, params_P: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, ``()``, and its gradient, ``(P,)``, both detached; the loss is NaN where the gradient is not finite."""
    params_P = params_P.detach().requires_grad_()
    with phase("model passes", 2 * params_P.nbytes), torch.enable_grad():
        value = loss(params_P)
        (grad_P,) = torch.autograd.grad(value, params_P)
    lowest, highest = grad_P.aminmax()  # both NaN where an element is
    # masked_fill takes NaN along with its launch; torch.where would copy it to the GPU and wait
    return value.detach().masked_fill(~(lowest.isfinite() & highest.isfinite()), torch.nan), grad_P


def stops(config: MaskTraining) -> list[int]:
    """The steps after whose loss training may end: the checks, and the last."""
    return [step for step in range(config.steps) if config.is_check(step) or step == config.steps - 1]


class MaskedModel:
    """The model with the masked mean of the updates, step by step, in tensors that stay where they are.

    Which step it is, is known to the device: the same operations serve every step.

    Attributes:
        mean_P: the masked mean of the updates.
        gate_sum_P: the sum of the gates.
        slope_P: gradient over gate sum over clip at that mean, finite; what the kernels take.
        slopes_TP, means_TP: both after each step, if ``keep_history``.
    """

    def __init__(
        self, loss: Loss, global_params_P: Tensor, mean_P: Tensor, num_rows: int, config: MaskTraining, *, keep_history: bool
    ) -> None:
        """At the start, where all gates are equal and ``mean_P`` is the plain mean."""
        self._loss, self._global_params_P, self._grad_clip = loss, global_params_P, config.grad_clip
        self._largest = torch.finfo(mean_P.dtype).max
        gate = torch.sigmoid(torch.tensor(config.init, dtype=mean_P.dtype)).item()
        self.mean_P = mean_P
        self.gate_sum_P = torch.full_like(mean_P, num_rows * gate)
        self.slope_P = torch.empty_like(mean_P)
        self._step_1 = torch.zeros(1, dtype=torch.int64, device=mean_P.device)
        # float64 holds the values of a loss of any dtype
        self._losses_T = torch.zeros(config.steps, dtype=torch.float64, device=mean_P.device)
        self.slopes_TP = mean_P.new_empty(config.steps if keep_history else 0, mean_P.numel())
        self.means_TP = torch.empty_like(self.slopes_TP)
        self._keep_history = keep_history

    def evaluate(self) -> None:
        """The model's forward and backward pass: the loss and ``slope_P``, both noted."""
        value, grad_P = loss_and_gradient(self._loss, self._global_params_P + self.mean_P)
        # finite, so that a client with no deviation from the mean gets 0 and not NaN
        torch.clamp(grad_P / self.gate_sum_P / self._grad_clip, -self._largest, self._largest, out=self.slope_P)
        self._losses_T.index_copy_(0, self._step_1, value.to(torch.float64).reshape(1))
        if self._keep_history:
            self.slopes_TP.index_copy_(0, self._step_1, self.slope_P[None])
            self.means_TP.index_copy_(0, self._step_1, self.mean_P[None])
        self._step_1 += 1

    def move(self, sums: tuple[Tensor, Tensor]) -> None:
        """On to the gate sum and the weighted sum that a kernel returned."""
        gate_sum_P, weighted_sum_P = sums
        self.gate_sum_P.copy_(gate_sum_P)
        torch.div(weighted_sum_P, gate_sum_P, out=self.mean_P)

    def losses(self, num_steps: int) -> list[float]:
        """Of the first steps, read from the device: the host waits for it."""
        losses: list[float] = self._losses_T[:num_steps].tolist()
        return losses
