"""Attacks on what malicious clients train on: flipped labels, and backdoors with a pattern."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat
from skymask_gpu.federation.attacks.own import Scaling, scaling
from skymask_gpu.federation.attacks.shifts import clipped_to_band
from skymask_gpu.federation.attacks.triggers import TRIGGERS, add_trigger, trigger_for
from skymask_gpu.federation.choices import positive_share

__all__ = ["Backdoor", "LabelFlip", "PixelBackdoor", "ScalingBackdoor", "add_trigger"]


@ATTACKS.register("label-flip")
class LabelFlip(Attack):
    """Label flip (Fang et al., USENIX Security 2020, section 5.1): label l becomes L - 1 - l."""

    poisons_data = True

    def __init__(self, context: AttackContext) -> None:
        self._num_classes = context.num_classes

    def poison(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, self._num_classes - 1 - labels


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """Settings of a backdoor.

    Attributes:
        target_class: the label that the trigger is to cause.
        poison_share: the share of each malicious batch that carries the trigger.
        trigger: one of the :data:`~skymask_gpu.federation.attacks.triggers.TRIGGERS`.
    """

    target_class: int = 0
    poison_share: float = 0.5
    trigger: str = "pixels"

    def __post_init__(self) -> None:
        if self.target_class < 0:
            raise ValueError(f"attack.target_class must be at least 0, got {self.target_class!r}")
        positive_share("attack.poison_share", self.poison_share)
        one_of("attack.trigger", self.trigger, TRIGGERS)


class PixelBackdoor(Attack):
    """Backdoors with a trigger, by default a pixel pattern (BadNets: Gu et al., arXiv:1708.06733).

    The first samples of each malicious batch carry the trigger and the target class:
    ``poison_share`` of a batch is poisoned, rounded, but at least one sample. Batches are drawn at
    random, so their first samples are random samples, too.

    Raises:
        ValueError: the data have no such target class, or are no images that could carry the
            trigger.
    """

    poisons_data = True
    target_class: int

    def __init__(self, context: AttackContext, settings: Backdoor) -> None:
        if settings.target_class >= context.num_classes:
            raise ValueError(
                f"attack.target_class must be below the data's {context.num_classes} classes, got {settings.target_class}"
            )
        self._stamp = trigger_for(settings.trigger, context.input_shape, context.brightest)
        self.target_class = settings.target_class
        self._poison_share = settings.poison_share

    def poison(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.with_triggered(inputs, labels, self.trigger(inputs))

    def with_triggered(self, inputs: Tensor, labels: Tensor, triggered: Tensor) -> tuple[Tensor, Tensor]:
        """Batches whose first samples are those of ``triggered``, with the target class."""
        batch_size = labels.shape[-1]
        poisoned_B = torch.arange(batch_size, device=labels.device) < max(1, round(self._poison_share * batch_size))
        sent = torch.where(poisoned_B[:, None, None, None], triggered, inputs)
        return sent, torch.where(poisoned_B, self.target_class, labels)

    def trigger(self, inputs: Tensor) -> Tensor:
        return self._stamp(inputs)


@ATTACKS.register("lie-backdoor", settings=Backdoor)
class LieBackdoor(PixelBackdoor):
    """A Little Is Enough (Baruch et al., NeurIPS 2019), the form that plants a backdoor.

    Malicious clients train on data with the trigger, and send their updates, each parameter clipped
    to mean +- z * std of the honest updates. The paper also keeps the backdoored model near the
    honest one during training; here, local training is not changed.
    """

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        return clipped_to_band(updates_NP, malicious_N)


@dataclass(frozen=True, kw_only=True)
class ScalingBackdoor(Scaling, Backdoor):
    """Settings of ``scaling-backdoor``: those of ``scaling`` and those of a backdoor."""

    def __post_init__(self) -> None:
        Scaling.__post_init__(self)
        Backdoor.__post_init__(self)


@ATTACKS.register("scaling-backdoor", settings=ScalingBackdoor)
class ScaledBackdoor(PixelBackdoor):
    """Model replacement (Bagdasaryan et al., AISTATS 2020): a backdoor in scaled updates."""

    def __init__(self, context: AttackContext, settings: ScalingBackdoor) -> None:
        super().__init__(context, settings)
        self._settings = settings

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        return scaling(updates_NP, malicious_N, threat, self._settings)
