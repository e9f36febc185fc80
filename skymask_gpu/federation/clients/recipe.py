"""``LocalTraining``: the recipe of local training, the table ``[local]`` of a run."""

import math
from dataclasses import dataclass

from skymask_gpu.engine.registry import one_of

__all__ = ["LocalTraining"]


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """``[local]``: the recipe that every client trains by, SGD on batches of its own samples.

    Attributes:
        steps: the number of batches per round, drawn with replacement; used if ``epochs`` is 0.
        epochs: the number of passes over a client's own samples in shuffled order, so that clients
            with more samples take more steps. The last batch is filled up from a new shuffle. 0:
            the number of batches is ``steps``.
        batch_size: the number of samples per batch.
        lr: the learning rate.
        grad_clip: the bound on each element of the gradient; ``inf`` for no clipping.
        momentum: as in PyTorch's SGD, from 0 to below 1; it starts anew in each round.
        weight_decay: as in PyTorch's SGD; it is added to the clipped gradient.
        autocast: ``"bfloat16"`` runs the forward and backward passes in mixed precision; parameters
            stay float32.
        batching: ``"vmap"``, ``"loop"`` or ``"auto"``. On a CPU ``"auto"`` takes the faster of the
            two; on a GPU, where that is not measured, it takes ``vmap``.

    Raises:
        ValueError: a setting is out of range.
    """

    steps: int = 10
    epochs: int = 0
    batch_size: int = 32
    lr: float = 0.1
    grad_clip: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    autocast: str = "float32"
    batching: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("epochs", 0), ("batch_size", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"local.{name} must be an integer of at least {least}, got {getattr(self, name)!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"local.lr must be finite and above 0, got {self.lr!r}")
        if not self.grad_clip > 0:
            raise ValueError(f"local.grad_clip must be above 0 (inf: no clipping), got {self.grad_clip!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"local.momentum must be from 0 to below 1, got {self.momentum!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"local.weight_decay must be finite and at least 0, got {self.weight_decay!r}")
        for name, known in (("autocast", ("float32", "bfloat16")), ("batching", ("auto", "vmap", "loop"))):
            one_of(f"local.{name}", getattr(self, name), known)
