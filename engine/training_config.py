"""The settings of mask training, and what every solver derives from them."""

import math
from dataclasses import dataclass, replace

__all__ = ["MaskTraining"]


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """How masks are trained (SkyMask, ECCV 2024, arXiv 2312.12484).

    The defaults are those of the paper's code for the CNN.

    Attributes:
        steps: the number of gradient steps on the whole root set, at least 1.
        lr: the learning rate of the logits, above 0 (the paper's code: 1e7 for the CNN, 1e8 for
            ResNet-20).
        grad_clip: the bound on each element of the logits' gradient, above 0.
        init: the initial logit of every client and parameter.
        threshold: a bit is 1 where sigmoid(logit) > threshold; in (0, 1).
        check_every: the number of steps between two checks, which compare the loss.
        min_improvement: training stops at a check if the loss fell by less than this since the
            check before.
        bins: the number of bins per column of the collapsed solver, at least 4.
        lr_clients: the number of clients up to which ``lr`` is used as it is. The gradient of a
            mask carries a factor 1 / N, so that masks of many clients hardly move. Each time the
            number of clients doubles beyond this one, ``lr`` doubles and ``grad_clip`` halves.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> MaskTraining(steps=40).for_clients(2000).lr
        40000000.0
    """

    steps: int = 20
    lr: float = 1e7
    grad_clip: float = 1e-7
    init: float = 1.0
    threshold: float = 0.5
    check_every: int = 10
    min_improvement: float = 1e-2
    bins: int = 16
    lr_clients: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "check_every", "bins", "lr_clients"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"MaskTraining.{name} must be an integer of at least 1, got {value!r}")
        if self.bins < 4:
            raise ValueError(f"MaskTraining.bins must be at least 4, got {self.bins!r}")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"MaskTraining.{name} must be a finite number above 0, got {value!r}")
        for name in ("init", "min_improvement"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"MaskTraining.{name} must be a finite number, got {value!r}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"MaskTraining.threshold must lie between 0 and 1, got {self.threshold!r}")

    def for_clients(self, num_clients: int) -> "MaskTraining":
        """These settings with the learning rate and the clip for this number of clients."""
        # A power of two keeps lr * grad_clip exact.
        factor = 2 ** max(0, int(math.log2(max(1, num_clients) / self.lr_clients)))
        return replace(self, lr=self.lr * factor, grad_clip=self.grad_clip / factor)

    @property
    def full_step(self) -> float:
        """How far a clipped gradient moves a logit: ``lr * grad_clip``, exactly 1.0 by default."""
        return self.lr * self.grad_clip

    @property
    def logit_threshold(self) -> float:
        """The threshold as a logit, exactly 0.0 for 0.5. A logit that equals it gives bit 0."""
        return math.log(self.threshold / (1 - self.threshold))

    def is_check(self, step: int) -> bool:
        """Whether the loss of ``step`` is compared with that of the check before."""
        return step > 0 and step % self.check_every == 0

    def is_plateau(self, losses: list[float]) -> bool:
        """Whether training ends with the newest step; ``losses`` has one entry per step so far."""
        step = len(losses) - 1
        return self.is_check(step) and not losses[step - self.check_every] - losses[step] >= self.min_improvement
