"""The root direction: an update that the server itself trains on its clean root data."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.numerics import without_tf32

__all__ = ["RootTraining", "root_direction"]


@dataclass(frozen=True, kw_only=True)
class RootTraining:
    """How the server trains the root direction: full-batch SGD on the whole root set.

    This is the clients' local recipe with more steps, so that the direction can be trusted. Use the
    clients' own learning rate and clip. A root model that is trained otherwise has a mask of
    another kind, far from those of all clients.

    Attributes:
        steps: the number of SGD steps, at least 1.
        lr: the learning rate, above 0.
        grad_clip: the bound on each element of the gradient, above 0; ``inf`` for no clipping.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> RootTraining(lr=0.05, grad_clip=float("inf"))
        RootTraining(steps=40, lr=0.05, grad_clip=inf)
    """

    steps: int = 40
    lr: float = 0.1
    grad_clip: float = 1e-2

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"RootTraining.steps must be an integer of at least 1, got {self.steps!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"RootTraining.lr must be a finite number above 0, got {self.lr!r}")
        if not self.grad_clip > 0:
            raise ValueError(f"RootTraining.grad_clip must be above 0 (inf: no clipping), got {self.grad_clip!r}")


@without_tf32()
def root_direction(loss: FlatModel, global_params: Tensor, config: RootTraining) -> Tensor:
    """Train the global model on the root data, and return its update.

    Args:
        loss: the root loss.
        global_params: ``(P,)``, the model before the round; not modified.
        config: steps, learning rate and clip.

    Returns:
        ``(P,)``, the trained minus the global parameters.

    Raises:
        ValueError: the root loss or its gradient is not finite at the global model, or training
            diverges.

    Warns:
        UserWarning: training moved no parameter, so that the update is zero.

    Example:
        >>> from skymask_gpu.engine import FlatModel
        >>> module = torch.nn.Linear(4, 3)
        >>> loss = FlatModel(module, torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> direction = root_direction(loss, loss.initial_params, RootTraining())
        >>> bool(loss(loss.initial_params + direction) < loss(loss.initial_params))
        True
    """
    params_P = global_params.detach().clone()
    value = loss(params_P)
    if not torch.isfinite(value):
        raise ValueError(
            f"global_params: the loss of the global model on the root data is {value.item()}; without a trusted root there is "
            "no verdict, check global_params, root_inputs and root_labels"
        )
    for _ in range(config.steps):
        params_P.requires_grad_()
        (grad_P,) = torch.autograd.grad(loss(params_P), params_P)
        params_P = params_P.detach() - config.lr * grad_P.clamp(-config.grad_clip, config.grad_clip)
    finite, moved = torch.stack([torch.isfinite(params_P).all(), (params_P != global_params).any()]).tolist()
    if not finite:
        raise ValueError(
            "root_training: training on the root data from global_params diverged to NaN or Inf; use a smaller RootTraining.lr"
        )
    if not moved:
        warnings.warn(
            "root_training: training on the root data moved no parameter, the root loss has no gradient, so masks cannot be "
            "trained and there is no verdict; check that loss_fn fits the model's outputs (the default, cross entropy, is "
            "always 0 for a single output) and that the model's units are not all dead",
            stacklevel=2,
        )
    return params_P - global_params
