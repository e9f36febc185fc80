"""What a client of an audit does to its gradient, and what an attacker who knows it knows then.

The obfuscations are those of runs (``federation/transforms/obfuscation.py``). A victim is a client
there, and the round is the first. A victim's draws do not depend on the strength, so a stronger
mask removes every entry that a weaker one removes, and stronger noise is the same noise, scaled.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.engine.inversion import Known
from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.choices import with_settings
from skymask_gpu.federation.transforms.obfuscation import OBFUSCATIONS, Draws

__all__ = ["METHODS", "UNTOUCHED", "Obfuscation"]


# The strengths that a search begins with, from weak to strong.
_SHARES = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)
_QUANTILES = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01)
_DEVIATIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# A search ends when two strengths differ by less than this: as shares, or by this factor.
_DIFFERENCE, _FACTOR = 0.0025, 1.05


@dataclass(frozen=True)
class _Method:
    """What belongs to an obfuscation.

    Attributes:
        settings: its settings besides the strength.
        known: what an attacker knows about what it sends.
        grid: the strengths that a search begins with.
        is_log: whether a search halves its interval on a logarithmic scale.
    """

    settings: dict[str, Any]
    known: Callable[[Tensor, list[int]], Known]
    grid: tuple[float, ...]
    is_log: bool


METHODS = {
    "mask": _Method({}, lambda sent, sizes: Known.masked(sent), _SHARES, False),
    # Whoever clips sends the bound many times over, as the largest magnitude.
    "clip": _Method(
        {"relative": True}, lambda sent, sizes: Known.clipped(sent, sent.abs().amax(1, keepdim=True)), _QUANTILES, True
    ),
    "prune": _Method({}, Known.pruned, _SHARES, False),
    "noise": _Method({"relative": True}, lambda sent, sizes: Known.exactly(sent), _DEVIATIONS, True),
}


@dataclass(frozen=True, order=True)
class Obfuscation:
    """A method and its strength; they sort by method, then from weak to strong.

    Attributes:
        method: a key of ``METHODS``, or ``"none"``.
        strength: what the method's strength means is said in ``Strengths``.

    Raises:
        ValueError: the method is unknown, or its strength is out of range or obfuscates nothing.

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
            most = torch.inf if self.method == "noise" else 1.0
            if not 0 < self.strength < most:
                limit = "" if most == torch.inf else f" and below {most:g}"
                raise ValueError(f"privacy.{self.method} must be above 0{limit}, got {self.strength!r}")
        strength = -self.strength if self.method == "clip" else self.strength
        object.__setattr__(self, "order", (["none", *METHODS].index(self.method), strength))

    @property
    def label(self) -> str:
        return self.method if self.method == "none" else f"{self.method} {self.strength:g}"

    def halfway(self, other: "Obfuscation") -> "Obfuscation | None":
        """The strength in the middle of two of one method, to four digits.

        Returns:
            None if they are near enough to each other.

        Example:
            >>> Obfuscation("mask", 0.5).halfway(Obfuscation("mask", 0.8)).strength
            0.65
            >>> Obfuscation("noise", 0.01).halfway(Obfuscation("noise", 0.04)).strength
            0.02
            >>> Obfuscation("mask", 0.5).halfway(Obfuscation("mask", 0.501)) is None
            True
        """
        low, high = sorted((self.strength, other.strength))
        is_log = METHODS[self.method].is_log
        if high < low * _FACTOR if is_log else high - low < _DIFFERENCE:
            return None
        middle = math.sqrt(low * high) if is_log else (low + high) / 2
        return Obfuscation(self.method, float(f"{middle:.4g}"))

    def sent(self, rows_VP: Tensor, draws: Draws, layers: Mapping[str, slice]) -> Tensor:
        """What clients with these gradients send, ``(V, P)``.

        Args:
            rows_VP: the gradients; they stay as they are.
            draws: the source of the clients' random numbers.
            layers: each parameter's columns, by name.
        """
        if self.method == "none":
            return rows_VP
        settings = OBFUSCATIONS.settings_of(self.method)(strength=self.strength, **METHODS[self.method].settings)
        return with_settings(OBFUSCATIONS[self.method], settings, rows_VP.clone(), draws, layers)

    def known(self, sent_VP: Tensor, sizes: list[int]) -> Known:
        """What an attacker who knows the method knows about the gradients.

        Args:
            sent_VP: what clients sent.
            sizes: the number of columns of each parameter, in order.
        """
        return Known.exactly(sent_VP) if self.method == "none" else METHODS[self.method].known(sent_VP, sizes)


UNTOUCHED = Obfuscation("none", 0.0)
