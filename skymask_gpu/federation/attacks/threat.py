"""The attacker: the ``[attack]`` table of a run's TOML file, and what the attacker knows in a round."""

import math
from dataclasses import dataclass, field

import torch

from skymask_gpu.engine.registry import one_of

__all__ = ["ATTACKS", "BASES", "DIRECTIONS", "AttackConfig", "Threat"]

DIRECTIONS = ("std", "unit", "sign")

# Attacks on updates alone: what the fine-grained ones do in the parameters that they poison.
BASES = ("ipm", "krum", "lie", "min-max", "min-sum", "noise", "scaling", "sign-flip", "trim")

ATTACKS = ("none", *sorted((*BASES, "label-flip", "layers", "lie-backdoor", "scaling-backdoor", "sparse")))


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """``[attack]``: what the malicious clients do, and how many there are.

    Attributes:
        name: one of ``ATTACKS``.
        share: of all clients, from 0 to below 1; above 0 unless the name is ``"none"``.
        direction: Min-Max and Min-Sum move against the honest updates' standard deviation (``"std"``), their unit mean
            (``"unit"``) or the sign of their mean (``"sign"``).
        noise_std: noise: standard deviation in each parameter.
        ipm_epsilon: inner product manipulation: multiple of the honest mean.
        factor: scaling: multiple of a client's own update; 0: as many times as there are clients for a malicious one.
        target_class: backdoors: the label that the trigger is to cause.
        poison_share: backdoors: share of each malicious batch that carries the trigger.
        layers: layers: names of the poisoned parameters (``"conv1.weight"``), or of modules that hold them (``"conv1"``).
        params_share: sparse: share of the parameters that are poisoned.
        base: layers, sparse: one of ``BASES``, what is done in the poisoned parameters.
    """

    name: str = "none"
    share: float = 0.0
    direction: str = "std"
    noise_std: float = 0.05
    ipm_epsilon: float = 0.5
    factor: float = 0.0
    target_class: int = 0
    poison_share: float = 0.5
    layers: tuple[str, ...] = ()
    params_share: float = 0.1
    base: str = "sign-flip"

    def __post_init__(self) -> None:
        one_of("attack.name", self.name, ATTACKS)
        one_of("attack.direction", self.direction, DIRECTIONS)
        one_of("attack.base", self.base, BASES)
        if not 0 <= self.share < 1:
            raise ValueError(f"attack.share must be from 0 to below 1, got {self.share!r}")
        if self.name == "none" and self.share > 0:
            raise ValueError(f"attack.share must be 0 for attack 'none', got {self.share!r}; set attack.name")
        if self.name != "none" and self.share == 0:
            raise ValueError(f"attack.share must be above 0 for attack {self.name!r}, got {self.share!r}")
        for name in ("noise_std", "ipm_epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"attack.{name} must be finite and above 0, got {value!r}")
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise ValueError(f"attack.factor must be finite and at least 0 (0: clients / malicious), got {self.factor!r}")
        if self.target_class < 0:
            raise ValueError(f"attack.target_class must be at least 0, got {self.target_class!r}")
        for name in ("poison_share", "params_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"attack.{name} must be above 0 and at most 1, got {value!r}")
        if self.name == "layers" and not self.layers:
            raise ValueError("attack.layers must name at least one parameter or module for attack 'layers', got none")

    def num_malicious(self, num_clients: int) -> int:
        """The rounded share of ``num_clients``; at least one unless the share is 0.

        Raises:
            ValueError: no client would be honest.
        """
        if self.share == 0:
            return 0
        num_malicious = max(1, round(self.share * num_clients))
        if num_malicious >= num_clients:
            raise ValueError(
                f"attack.share must leave an honest client, got {self.share!r} of {num_clients}: {num_malicious} malicious; "
                "use a smaller share or more data.clients"
            )
        return num_malicious


@dataclass(frozen=True)
class Threat:
    """What the attacker knows in a round besides the updates.

    Attributes:
        config: the attack.
        layers: each parameter's columns in the updates; only ``"layers"`` needs them.
        generator: on the CPU; seeded anew each round.
    """

    config: AttackConfig
    layers: dict[str, slice] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
