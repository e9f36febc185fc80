"""``ReplayedLoss``: a loss whose value and gradient are replayed from a CUDA graph on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from skymask_gpu.engine.step_loop import StepLoop

__all__ = ["Loss", "ReplayedLoss"]

Loss = Callable[[Tensor], Tensor]


class ReplayedLoss:
    """A loss that is evaluated again and again, with its gradient.

    On a GPU, the forward and the backward pass are captured in the second evaluation, and replayed
    from then on. The graph depends on nothing but the loss, so the same object serves the root
    direction, the mask steps and the screening of suspects, round after round. On a CPU, each pass
    is computed anew. Two threads must not use one object at the same time.

    Args:
        loss: ``loss(params (P,)) -> ()``, differentiable. What it reads beside ``params`` must stay
            at its address.

    Example:
        >>> loss = ReplayedLoss(torch.sum)
        >>> loss.value_and_gradient(torch.tensor([1.0, 2.0]))
        (tensor(3.), tensor([1., 1.]))
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._loop: StepLoop | None = None
        self._params_P = self._value = self._grad_P = torch.empty(0)

    @classmethod
    def of(cls, loss: Loss) -> "ReplayedLoss":
        """The loss itself, if it is one already, so that what it has captured is used."""
        return loss if isinstance(loss, ReplayedLoss) else cls(loss)

    @property
    def layer_sizes(self) -> tuple[int, ...] | None:
        """Where layers end, if the loss says so."""
        return getattr(self._loss, "layer_sizes", None)

    @property
    def not_captured(self) -> str | None:
        """Why passes on a GPU are launched operation by operation; see :class:`StepLoop`."""
        return None if self._loop is None else self._loop.not_captured

    def __call__(self, params_P: Tensor) -> Tensor:
        """The loss, ``()``, differentiable in ``params_P``; it is not replayed."""
        return self._loss(params_P)

    def value_and_gradient(self, params_P: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at ``params_P``, and its gradient ``(P,)``; both are detached.

        The next call overwrites them.
        """
        if not _is_on_a_gpu(params_P):
            return self._evaluated(params_P)
        if self._loop is None or not _alike(self._params_P, params_P):
            self._params_P = torch.empty_like(params_P, memory_format=torch.contiguous_format, requires_grad=False)
            self._loop = StepLoop(self._evaluate, params_P.device)
        self._params_P.copy_(params_P.detach())
        self._loop.run(1)
        return self._value, self._grad_P

    def _evaluate(self) -> None:
        # A replay does not come here. It writes to the tensors of the capture, which are kept.
        self._value, self._grad_P = self._evaluated(self._params_P)

    def _evaluated(self, params_P: Tensor) -> tuple[Tensor, Tensor]:
        leaf_P = params_P.detach().requires_grad_()
        with torch.enable_grad():
            value = self._loss(leaf_P)
            (grad_P,) = torch.autograd.grad(value, leaf_P)
        return value.detach(), grad_P


def _is_on_a_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _alike(a_P: Tensor, b_P: Tensor) -> bool:
    return (a_P.shape, a_P.dtype, a_P.device) == (b_P.shape, b_P.dtype, b_P.device)
