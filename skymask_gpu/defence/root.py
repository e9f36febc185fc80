"""The root direction: an update that the server trains itself on its clean root data."""

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
    """Full-batch SGD on the whole root set: the clients' local recipe, but longer, so that its direction can be trusted.

    Use the clients' own learning rate and clip: a root that is trained otherwise has a mask of its own kind, far from theirs.

    Attributes:
        steps: of SGD, at least 1.
        lr: learning rate, > 0.
        grad_clip: bound on each element of the gradient, > 0; ``inf`` for none.
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
    """The update, ``(P,)``, of the global model after training on the root data; with a warning if that is zero.

    Raises:
        ValueError: the root loss or its gradient is not finite at the global model, or training diverges.
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
