"""What a solver returns, and what ``fused`` and ``collapsed`` share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.profiling import phase
from skymask_gpu.engine.replayed_loss import Loss, ReplayedLoss
from skymask_gpu.engine.training_config import MaskTraining

__all__ = ["Cuts", "Loss", "MaskedModel", "Solution", "loss_and_gradient", "stops"]


@dataclass(frozen=True)
class Cuts:
    """Trained masks as a threshold test per column: ``bit = (update < position) == left``.

    Attributes:
        position: ``(P,)`` float32, in units of the updates; inf where the column is constant.
        left: ``(P,)`` bool, the bit of updates below the position.
        constant: ``(P,)`` bool, where all rows have the same bit, so that it tells no client apart.
        several: ``(P,)`` bool, where the bits change more than once along the updates' values.
            There the position is the first change, and the bits are found by replaying every row.
    """

    position: Tensor
    left: Tensor
    constant: Tensor
    several: Tensor


@dataclass(frozen=True)
class Solution:
    """The masks that a solver returns.

    Attributes:
        bits: ``(R, ceil(P / 8))`` uint8; bit j of byte b is parameter 8 b + j.
        logits_RP: the final logits, if they were asked for.
        losses: the root loss before each step.
        cuts: the masks as threshold tests; only from the collapsed solver.
        not_captured: why the model's passes were not replayed from a CUDA graph although they
            should have been.
    """

    bits: Tensor
    logits_RP: Tensor | None
    losses: list[float]
    cuts: Cuts | None = None
    not_captured: str | None = None


def loss_and_gradient(loss: ReplayedLoss, params_P: Tensor) -> tuple[Tensor, Tensor]:
    """The loss ``()`` and its gradient ``(P,)``, both detached; the next call overwrites them.

    The loss is NaN if an element of the gradient is not finite.
    """
    with phase("model passes", 2 * params_P.nbytes):
        value, grad_P = loss.value_and_gradient(params_P)
    # If any element is NaN, so are both.
    lowest, highest = grad_P.aminmax()
    # masked_fill passes the NaN with its launch. torch.where would copy it to the GPU and wait.
    return value.masked_fill(~(lowest.isfinite() & highest.isfinite()), torch.nan), grad_P


def stops(config: MaskTraining) -> list[int]:
    """The steps after which training may end: each check for a plateau, and the last step."""
    return [step for step in range(config.steps) if config.is_check(step) or step == config.steps - 1]


class MaskedModel:
    """The global model plus the masked mean of the updates, step by step.

    The number of the step is on the device, so that nothing waits for it. On a GPU, the model's
    passes are replayed from a CUDA graph; all else of a step is launched while they run.

    Attributes:
        mean_P: the masked mean of the updates.
        gate_sum_P: the sum of the gates.
        slope_P: the gradient at that mean, over gate sum and clip, kept finite; the kernels take
            it.
        slopes_TP, means_TP: slope and mean of each step, if ``keep_history``.
    """

    def __init__(
        self, loss: Loss, global_params_P: Tensor, mean_P: Tensor, num_rows: int, config: MaskTraining, *, keep_history: bool
    ) -> None:
        """Before the first step all gates are equal, so that ``mean_P`` is the plain mean."""
        self._loss, self._global_params_P, self._grad_clip = ReplayedLoss.of(loss), global_params_P, config.grad_clip
        self._largest = torch.finfo(mean_P.dtype).max
        gate = torch.sigmoid(torch.tensor(config.init, dtype=mean_P.dtype)).item()
        self.mean_P = mean_P
        self.gate_sum_P = torch.full_like(mean_P, num_rows * gate)
        self.slope_P = torch.empty_like(mean_P)
        self._step_1 = torch.zeros(1, dtype=torch.int64, device=mean_P.device)
        # float64 holds the value of a loss of any dtype exactly.
        self._losses_T = torch.zeros(config.steps, dtype=torch.float64, device=mean_P.device)
        self.slopes_TP = mean_P.new_empty(config.steps if keep_history else 0, mean_P.numel())
        self.means_TP = torch.empty_like(self.slopes_TP)
        self._keep_history = keep_history

    @property
    def not_captured(self) -> str | None:
        """Why the model's passes on a GPU are not replayed from a CUDA graph, if so."""
        return self._loss.not_captured

    def evaluate(self) -> None:
        """The model's forward and backward pass: it stores the loss and ``slope_P``."""
        value, grad_P = loss_and_gradient(self._loss, self._global_params_P + self.mean_P)
        # The slope is kept finite, so that a client that equals the mean gets 0 * slope = 0 and not
        # NaN.
        torch.clamp(grad_P / self.gate_sum_P / self._grad_clip, -self._largest, self._largest, out=self.slope_P)
        self._losses_T.index_copy_(0, self._step_1, value.to(torch.float64).reshape(1))
        if self._keep_history:
            self.slopes_TP.index_copy_(0, self._step_1, self.slope_P[None])
            self.means_TP.index_copy_(0, self._step_1, self.mean_P[None])
        self._step_1 += 1

    def move(self, sums: tuple[Tensor, Tensor]) -> None:
        """Store the two sums that a kernel returned; the masked mean follows from them.

        Args:
            sums: of the gates and of the weighted updates, each ``(P,)``.
        """
        gate_sum_P, weighted_sum_P = sums
        self.gate_sum_P.copy_(gate_sum_P)
        torch.div(weighted_sum_P, gate_sum_P, out=self.mean_P)

    def losses(self, num_steps: int) -> list[float]:
        """The losses of the first ``num_steps`` steps; the host waits for the device."""
        losses: list[float] = self._losses_T[:num_steps].tolist()
        return losses
