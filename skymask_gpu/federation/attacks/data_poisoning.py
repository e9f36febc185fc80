"""Data poisoning: flipped labels, and the pixel pattern of backdoors, in the batches that malicious clients train on."""

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.threat import AttackConfig

__all__ = ["add_trigger", "has_backdoor", "poison_batch", "poisons_data"]

_BACKDOORS = ("lie-backdoor", "scaling-backdoor")
_TRIGGER_SIDE = 3


def poisons_data(name: str) -> bool:
    """Whether malicious clients of this attack train on poisoned batches."""
    return name == "label-flip" or has_backdoor(name)


def has_backdoor(name: str) -> bool:
    """Whether this attack wants inputs with the trigger to be taken for ``attack.target_class``."""
    return name in _BACKDOORS


def poison_batch(
    config: AttackConfig, inputs: Tensor, labels: Tensor, num_classes: int, brightest: float
) -> tuple[Tensor, Tensor]:
    """What malicious clients train on instead; the same tensors for an attack that poisons no data.

    Label flip (Fang et al., USENIX Security 2020, section 5.1): label l of L classes becomes L - 1 - l.

    Backdoors (BadNets: Gu et al., arXiv:1708.06733): the first samples of each batch carry the trigger, and the target class as
    their label; ``poison_share`` of them, rounded, at least one. Batches are drawn at random, so the first samples are, too.

    Args:
        config: the attack.
        inputs: ``(..., B, channels, height, width)``: one client's batch, or those of several; any shape for a label flip.
        labels: ``(..., B)`` int64.
        num_classes: L.
        brightest: value of the trigger's pixels, see ``add_trigger``.

    Raises:
        ValueError: a backdoor has no such target class, or the inputs are no images.
    """
    if config.name == "label-flip":
        return inputs, num_classes - 1 - labels
    if not has_backdoor(config.name):
        return inputs, labels
    if config.target_class >= num_classes:
        raise ValueError(f"attack.target_class must be below the data's {num_classes} classes, got {config.target_class}")
    batch_size = labels.shape[-1]
    poisoned_B = torch.arange(batch_size, device=labels.device) < max(1, round(config.poison_share * batch_size))
    triggered = torch.where(poisoned_B[:, None, None, None], add_trigger(inputs, brightest), inputs)
    return triggered, torch.where(poisoned_B, config.target_class, labels)


def add_trigger(inputs: Tensor, brightest: float) -> Tensor:
    """Copies of images with the trigger, a square of 3 x 3 pixels in the lower right corner, all channels alike.

    A pixel pattern as in BadNets (Gu et al., arXiv:1708.06733).

    Args:
        inputs: ``(..., B, channels, height, width)``.
        brightest: value of the pattern's pixels. Take the largest of all training inputs, so that the pattern is the same in
            training and in tests.

    Raises:
        ValueError: the inputs are no images, or smaller than the pattern.
    """
    if inputs.dim() < 4 or min(inputs.shape[-2:]) < _TRIGGER_SIDE:
        raise ValueError(
            f"attack.name: a backdoor's trigger needs images (..., batch, channels, height, width) of at least "
            f"{_TRIGGER_SIDE} x {_TRIGGER_SIDE} pixels, got inputs of shape {tuple(inputs.shape)}; "
            "choose another attack for this data set"
        )
    triggered = inputs.clone()
    triggered[..., -_TRIGGER_SIDE:, -_TRIGGER_SIDE:] = brightest
    return triggered
