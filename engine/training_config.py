"""The settings of mask training, and what every solver derives from them."""

import math
from dataclasses import dataclass, replace

__all__ = ["MaskTraining"]


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """How masks are trained (SkyMask, ECCV 2024, arXiv 2312.12484; the defaults are those of its code for the CNN).

    Attributes:
        steps: gradient steps on the whole root set, at least 1.
        lr: learning rate of the logits, > 0 (the paper's code: 1e7 for the CNN, 1e8 for ResNet-20).
        grad_clip: bound on each element of the logits' gradient, > 0.
        init: initial logit of every client and parameter.
        threshold: a bit is 1 where sigmoid(logit) > threshold; in (0, 1).
        check_every: after steps 0, check_every, 2 * check_every, ... the loss is compared with the last check.
        bins: of the collapsed solver, a column; from 4 on.
        min_improvement: training stops where the loss fell by less than this since the last check.
        lr_clients: the number of clients up to which ``lr`` holds as it is. The gradient of a mask carries 1 / N, so that masks
            of many clients hardly move; each time their number doubles beyond this, ``lr`` doubles and ``grad_clip`` halves.
    """

    steps: int = 20
    lr: float = 1e7
    grad_clip: float = 1e-7
    init: float = 1.0
    threshold: float = 0.5
    check_every: int = 10
    min_improvement: float = 1e-2
    bins: int = 32
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
        """These settings with the learning rate and the clip that they mean for so many clients."""
        factor = 2 ** max(0, int(math.log2(max(1, num_clients) / self.lr_clients)))  # keeps lr * grad_clip exact
        return replace(self, lr=self.lr * factor, grad_clip=self.grad_clip / factor)

    @property
    def full_step(self) -> float:
        """What a clipped gradient moves a logit by, lr * grad_clip; 1.0 exactly with the defaults."""
        return self.lr * self.grad_clip

    @property
    def logit_threshold(self) -> float:
        """The threshold as a logit; 0.0 exactly for 0.5. A logit that equals it gives bit 0."""
        return math.log(self.threshold / (1 - self.threshold))

    def is_check(self, step: int) -> bool:
        """Whether the loss of ``step`` is compared with that of the check before it."""
        return step > 0 and step % self.check_every == 0

    def is_plateau(self, losses: list[float]) -> bool:
        """Whether training ends with the newest step: ``losses`` has one entry a step, the newest a check's."""
        step = len(losses) - 1
        return self.is_check(step) and not losses[step - self.check_every] - losses[step] >= self.min_improvement
