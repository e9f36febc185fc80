"""What a client does to its gradient before it sends it: mask, clip, prune or noise.

A victim has one draw for all strengths. A stronger mask therefore removes every entry that a weaker
one removes, and stronger noise is the same noise, scaled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skymask_gpu.engine.inversion import Known
from skymask_gpu.engine.registry import one_of

__all__ = ["METHODS", "UNTOUCHED", "Draws", "Obfuscation"]


@dataclass(frozen=True)
class Draws:
    """The victims' random numbers, ``(V, P)`` each: uniform from 0 to 1, and standard normal."""

    uniform: Tensor
    normal: Tensor

    @classmethod
    def of(cls, generators: list[torch.Generator], num_params: int) -> "Draws":
        """Each victim's draws from its own generator."""
        pairs = [(torch.rand(num_params, generator=g), torch.randn(num_params, generator=g)) for g in generators]
        uniform, normal = zip(*pairs, strict=True)
        return cls(torch.stack(uniform), torch.stack(normal))


def _masked(rows_VP: Tensor, p: float, draws: Draws, sizes: list[int]) -> Tensor:
    return torch.where(draws.uniform >= p, rows_VP, 0.0)


def _clipped(rows_VP: Tensor, quantile: float, draws: Draws, sizes: list[int]) -> Tensor:
    # torch.quantile takes at most 16 million values.
    magnitudes_VP = rows_VP.abs()
    rank = max(1, round(quantile * rows_VP.shape[1]))
    bound_V1 = magnitudes_VP.kthvalue(rank, dim=1, keepdim=True).values
    return torch.minimum(torch.maximum(rows_VP, -bound_V1), bound_V1)


def _pruned(rows_VP: Tensor, share: float, draws: Draws, sizes: list[int]) -> Tensor:
    parts = []
    for part_VL in rows_VP.split(sizes, dim=1):
        smallest_VK = part_VL.abs().topk(round(share * part_VL.shape[1]), dim=1, largest=False).indices
        parts.append(part_VL.scatter(1, smallest_VK, 0.0))
    return torch.cat(parts, dim=1)


def _noised(rows_VP: Tensor, sigma: float, draws: Draws, sizes: list[int]) -> Tensor:
    rms_V1 = rows_VP.square().mean(1, keepdim=True).sqrt()
    return rows_VP + sigma * rms_V1 * draws.normal


@dataclass(frozen=True)
class _Method:
    """``apply(rows_VP, strength, draws, sizes)``, what is known then, the range of strengths."""

    apply: Callable[[Tensor, float, Draws, list[int]], Tensor]
    known: Callable[[Tensor, list[int]], Known]
    least: float
    below: float


METHODS = {
    "mask": _Method(_masked, lambda sent, sizes: Known.masked(sent), 0.0, 1.0),
    # Whoever clips sends its bound many times over, as its largest magnitude.
    "clip": _Method(_clipped, lambda sent, sizes: Known.clipped(sent, sent.abs().amax(1, keepdim=True)), 0.0, 1.0),
    "prune": _Method(_pruned, Known.pruned, 0.0, 1.0),
    "noise": _Method(_noised, lambda sent, sizes: Known.exactly(sent), 0.0, torch.inf),
}


@dataclass(frozen=True, order=True)
class Obfuscation:
    """A method and its strength; they sort by method, then from weak to strong.

    Attributes:
        method: a key of ``METHODS``, or ``"none"``.
        strength: what the method's strength means is said in ``PrivacyConfig``.

    Example:
        >>> sorted([Obfuscation("clip", 0.5), Obfuscation("clip", 0.9)])[0].strength
        0.9
    """

    method: str = field(compare=False)
    strength: float = field(compare=False)
    order: tuple[int, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        one_of("privacy", self.method, ["none", *METHODS])
        if self.method != "none":
            method = METHODS[self.method]
            if not method.least < self.strength < method.below:
                limit = "" if method.below == torch.inf else f" and below {method.below:g}"
                raise ValueError(f"privacy.{self.method} must be above {method.least:g}{limit}, got {self.strength!r}")
        strength = -self.strength if self.method == "clip" else self.strength
        object.__setattr__(self, "order", (["none", *METHODS].index(self.method), strength))

    @property
    def label(self) -> str:
        return self.method if self.method == "none" else f"{self.method} {self.strength:g}"

    def sent(self, rows_VP: Tensor, draws: Draws, sizes: list[int]) -> Tensor:
        """What clients with these gradients send, ``(V, P)``.

        Args:
            rows_VP: the gradients.
            draws: the clients' random numbers.
            sizes: how many columns each parameter tensor has, in order.
        """
        return rows_VP if self.method == "none" else METHODS[self.method].apply(rows_VP, self.strength, draws, sizes)

    def known(self, sent_VP: Tensor, sizes: list[int]) -> Known:
        """What an attacker who knows the method knows about the gradients."""
        return Known.exactly(sent_VP) if self.method == "none" else METHODS[self.method].known(sent_VP, sizes)


UNTOUCHED = Obfuscation("none", 0.0)
