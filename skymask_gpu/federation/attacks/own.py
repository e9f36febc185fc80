"""Attacks that change each malicious client's own update: noise, flips, scaling; and no attack."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.attacks.interface import ATTACKS, Threat
from skymask_gpu.federation.choices import above_zero

__all__ = ["Noise", "Scaling", "SignFlip", "scaling"]


@ATTACKS.register("none")
def none(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Nobody attacks."""
    return updates_NP[malicious_N]


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """Settings of ``sign-flip``.

    Attributes:
        factor: each malicious client sends the negative of its own update times this.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        above_zero("attack.factor", self.factor)


@ATTACKS.register("sign-flip", settings=SignFlip)
def sign_flip(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: SignFlip) -> Tensor:
    """Each malicious client sends the negative of its own update (Li et al., arXiv:2002.00211).

    With a factor of 5, say, a few of them outweigh many honest clients in a plain mean.
    """
    return -settings.factor * updates_NP[malicious_N]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Settings of ``noise``.

    Attributes:
        std: the noise's standard deviation in each parameter.
    """

    std: float = 0.05

    def __post_init__(self) -> None:
        above_zero("attack.std", self.std)


@ATTACKS.register("noise", settings=Noise)
def noise(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Noise) -> Tensor:
    """Additive noise (Li et al., arXiv:2002.00211): Gaussian, on each client's own update."""
    own_FP = updates_NP[malicious_N]
    return own_FP + settings.std * torch.randn(own_FP.shape, generator=threat.generator).to(own_FP)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Settings of ``scaling``.

    Attributes:
        factor: each malicious client sends this multiple of its own update. 0 means the number of
            clients per malicious client.
    """

    factor: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise ValueError(f"attack.factor must be finite and at least 0 (0: clients / malicious), got {self.factor!r}")


@ATTACKS.register("scaling", settings=Scaling)
def scaling(updates_NP: Tensor, malicious_N: Tensor, threat: Threat, settings: Scaling) -> Tensor:
    """Model replacement (Bagdasaryan et al., AISTATS 2020, section 4.2): own updates are scaled.

    With the factor N / F, the mean of all updates is the mean of the malicious ones if the honest
    ones are zero.
    """
    return updates_NP[malicious_N] * (settings.factor or len(malicious_N) / int(malicious_N.sum()))
