"""The weakest strength without a leak: how it is searched for, and what it is worth.

A search tries a grid of strengths, then the middle between the strongest one that leaked and the
next one, until the two are near to each other. Strengths from a file are judged in the same way,
without that search.
"""

from dataclasses import dataclass
from itertools import zip_longest

from torch import nn

from skymask_gpu.federation.leak.attacking import Trial
from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.judging import Line
from skymask_gpu.federation.leak.obfuscation import METHODS
from skymask_gpu.federation.leak.victims import Victims

__all__ = ["STEPS", "Threshold", "bound_of_none", "counting_bound", "next_trials", "thresholds"]

# The most steps of a search after its grid.
STEPS = 7


@dataclass(frozen=True)
class Threshold:
    """The weakest strength of one method from which on nothing leaked to one attacker.

    Attributes:
        victims: how many were attacked.
        undefended: the share of images that leaked without any obfuscation. If it is small, the
            threshold says little.
        leaks_at: the strongest strength that leaked; None if none did.
        leaked_there: the share of images that leaked there; None likewise.
        strength: the weakest strength tried that is stronger than it; None if all leaked.
        at_most: the largest share of images that may leak there if none of the victims did, with a
            confidence of 95%; None likewise.
        recognised: the share of images whose adjusted similarity is at least 0.5 there.
        labels: the share of labels that were found there.
        counting: for a mask, the bound from counting; None for other methods.
    """

    obfuscation: str
    attacker: str
    victims: int
    undefended: float
    leaks_at: float | None
    leaked_there: float | None
    strength: float | None
    at_most: float | None
    recognised: float | None
    labels: float | None
    counting: float | None


def thresholds(table: list[Line], counting: float) -> list[Threshold]:
    """The thresholds of all methods and attackers.

    Args:
        table: from :func:`~skymask_gpu.federation.leak.judging.lines`.
        counting: from :func:`counting_bound`.
    """
    found = []
    for method in METHODS:
        for attacker in dict.fromkeys(line.attacker for line in table):
            own = _own(table, method, attacker)
            if own:
                undefended = next(line for line in table if (line.obfuscation, line.attacker) == ("none", attacker))
                found.append(_threshold(own, undefended, counting if method == "mask" else None))
    return found


def next_trials(audit: Audit, table: list[Line]) -> list[Trial]:
    """What a search tries after the trials of ``table``; an empty list if all searches are done."""
    trials = []
    for method in audit.privacy.searched():
        for attacker in audit.leak.attackers:
            own = _own(table, method, attacker)
            leaking, free = _bracket(own)
            if leaking and free and len(own) < len(METHODS[method].grid) + STEPS:
                middle = leaking.setting.halfway(free.setting)
                if middle is not None:
                    trials.append((middle, attacker))
    return trials


def _own(table: list[Line], method: str, attacker: str) -> list[Line]:
    return [line for line in table if (line.obfuscation, line.attacker) == (method, attacker)]


def _bracket(own: list[Line]) -> tuple[Line | None, Line | None]:
    """The strongest strength that leaked, and the next stronger one; None where there is none.

    Args:
        own: the lines of one method and one attacker, from weak to strong.
    """
    leaking, free = None, own[0] if own else None
    for line, stronger in zip_longest(own, own[1:]):
        if line.leaked:
            leaking, free = line, stronger
    return leaking, free


def _threshold(own: list[Line], undefended: Line, counting: float | None) -> Threshold:
    leaking, free = _bracket(own)
    return Threshold(
        obfuscation=own[0].obfuscation,
        attacker=own[0].attacker,
        victims=own[0].victims,
        undefended=undefended.leaked,
        leaks_at=None if leaking is None else leaking.strength,
        leaked_there=None if leaking is None else leaking.leaked,
        strength=None if free is None else free.strength,
        at_most=None if free is None else bound_of_none(free.victims),
        recognised=None if free is None else free.recognised,
        labels=None if free is None else free.labels,
        counting=counting,
    )


def bound_of_none(trials: int) -> float:
    """The largest share that is plausible after none of ``trials``, with a confidence of 95%.

    It is the one-sided bound of Clopper and Pearson (Biometrika 1934).

    Example:
        >>> [round(bound_of_none(trials), 3) for trials in (32, 128, 300)]
        [0.089, 0.023, 0.01]
    """
    return float(1 - 0.05 ** (1 / trials))


def counting_bound(victims: Victims) -> float:
    """The mask beyond which fewer numbers are left than an image has values.

    A linear layer's gradient is the product of its input and its output's error. An attacker sees
    one of these if any entry that it is a factor of is left, so a mask of probability p leaves
    ``inputs (1 - p^outputs) + outputs (1 - p^inputs)`` numbers, with the bias as one more input; of
    the last layer's errors one follows from the others. Other layers are counted by entry. An
    attacker without a prior cannot do without as many numbers as there are values.

    Returns:
        The probability; 0 if even the whole gradient has fewer numbers.
    """
    wanted = victims.values
    layers = [one for one in victims.module.modules() if list(one.parameters(recurse=False))]

    def left(p: float) -> float:
        total = -1.0
        for layer in layers:
            if isinstance(layer, nn.Linear):
                inputs, outputs = layer.in_features, layer.out_features
                has_bias = layer.bias is not None
                total += inputs * (1 - p**outputs) + outputs * (1 - p ** (inputs + has_bias))
            else:
                total += (1 - p) * sum(one.numel() for one in layer.parameters(recurse=False))
        return total

    low, high = 0.0, 1.0
    if left(low) < wanted:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) >= wanted else (low, middle)
    return low
