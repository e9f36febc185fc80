"""Obfuscation: what clients do to their updates so that nobody can read their images out of them.

The ``[privacy]`` table of a run chooses one of four methods. They are those of Kim and Park,
*Random Gradient Masking as a Defensive Measure to Deep Leakage in Federated Learning* (arXiv
2408.08430). The paper leaves details open, so the definitions here are this project's own. v is
one client's update:

| name | what is sent | strength |
| --- | --- | --- |
| ``mask`` | v_k if u_k >= p, else 0; the u_k are uniform in [0, 1) | p, from 0 to below 1 |
| ``clip`` | v_k, but at least -c and at most c | c, above 0; the smaller, the stronger |
| ``prune`` | v without the share q of smallest magnitude in each layer | q, from 0 to below 1 |
| ``noise`` | v_k + s z_k; the z_k are standard normal | s, at least 0 |

The u and z follow from the run's seed, the round and the client's number only, and not from the
strength. The entries that a mask with p = 0.3 sets to zero are therefore zero with p = 0.5, too,
and two strengths differ in nothing but the strength.

In a round: local training -> ``[[transforms]]`` -> obfuscation of the honest clients -> the attack
-> obfuscation of what malicious clients send, if ``attackers_too`` -> the aggregation rule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.choices import Choices, above_zero, positive_share
from skymask_gpu.federation.transforms import client_generators

__all__ = ["OBFUSCATIONS", "Clip", "Draws", "Mask", "Noise", "Prune"]

# Every obfuscation by name: a function obfuscate(rows_NP, draws, layers[, settings]) -> (N, P).
# It may write to the rows.
OBFUSCATIONS = Choices("privacy.obfuscation", common=("obfuscation", "batch_norm", "attackers_too", "root_too"))

# Client numbers begin at 0, so -1 is free for the draws that all clients of a round share.
_ALL_CLIENTS = torch.tensor([-1])


@dataclass(frozen=True)
class Draws:
    """The source of an obfuscation's random numbers in one round.

    Attributes:
        seed: the seed of the run.
        round: the number of the round.
        clients: ``(N,)`` int64, the number of each row's client.

    Example:
        >>> both, one = Draws(0, 5, torch.tensor([7, 8])), Draws(0, 5, torch.tensor([8]))
        >>> first, second = (torch.rand(3, generator=generator) for generator in both.of_clients())
        >>> (again,) = (torch.rand(3, generator=generator) for generator in one.of_clients())
        >>> bool(second.equal(again)), bool(second.equal(first))
        (True, False)
    """

    seed: int
    round: int
    clients: Tensor

    def of_clients(self) -> list[torch.Generator]:
        """A new generator for each client, on the CPU."""
        return client_generators(self.seed, self.round, self.clients, purpose="privacy")

    def of_all(self) -> torch.Generator:
        """A new generator, on the CPU, whose draws are the same for all clients of the round."""
        return client_generators(self.seed, self.round, _ALL_CLIENTS, purpose="privacy of all")[0]


def _share_below_one(method: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"privacy.strength must be from 0 to below 1 for obfuscation {method!r}, got {value!r}")


@OBFUSCATIONS.register("none")
def none(rows_NP: Tensor, draws: Draws, layers: Mapping[str, slice]) -> Tensor:
    """The rows as they are."""
    return rows_NP


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Settings of ``mask``.

    Attributes:
        strength: p, the probability that an entry is set to zero; from 0 to below 1.
        scale: divide what is left by 1 - p, so that the mean over all draws is the update.
        shared: all clients of a round have the same mask.

    Raises:
        ValueError: the strength is out of its range.
    """

    strength: float
    scale: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        _share_below_one("mask", self.strength)


@OBFUSCATIONS.register("mask", settings=Mask)
def mask(rows_NP: Tensor, draws: Draws, layers: Mapping[str, slice], settings: Mask) -> Tensor:
    """Set each entry to zero with the probability p.

    Args:
        rows_NP: the updates, a floating dtype; they are overwritten.
        draws: the source of the masks.
        layers: each parameter's columns, by name; not used here.
        settings: how many entries are set to zero.

    Returns:
        The same tensor.

    Example:
        >>> draws, half = Draws(0, 0, torch.arange(2)), Mask(strength=0.5, shared=True)
        >>> rows = mask(torch.ones(2, 6), draws, {}, half)
        >>> bool(rows[0].equal(rows[1])), sorted(set(rows[0].tolist()))
        (True, [0.0, 1.0])
    """

    def dropped(generator: torch.Generator) -> Tensor:
        u_P = torch.rand(rows_NP.shape[1], generator=generator, dtype=torch.float32)
        return (u_P < settings.strength).to(rows_NP.device)

    if settings.shared:
        rows_NP.masked_fill_(dropped(draws.of_all()), 0)
    else:
        for row_P, generator in zip(rows_NP, draws.of_clients(), strict=True):
            row_P.masked_fill_(dropped(generator), 0)
    return rows_NP.div_(1 - settings.strength) if settings.scale else rows_NP


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Settings of ``clip``.

    Attributes:
        strength: c, the largest magnitude that is sent, above 0.
        relative: c is a quantile of each row's own magnitudes, and the strength is that quantile,
            above 0 and at most 1. With strength q, round(q P) of P entries stay as they are.

    Raises:
        ValueError: the strength is out of its range.
    """

    strength: float
    relative: bool = False

    def __post_init__(self) -> None:
        (positive_share if self.relative else above_zero)("privacy.strength", self.strength)


@OBFUSCATIONS.register("clip", settings=Clip)
def clip(rows_NP: Tensor, draws: Draws, layers: Mapping[str, slice], settings: Clip) -> Tensor:
    """Clamp each entry to [-c, c].

    Args:
        rows_NP: the updates, a floating dtype; they are overwritten.
        draws: not used here.
        layers: each parameter's columns, by name; not used here.
        settings: the bound c.

    Returns:
        The same tensor.

    Example:
        >>> rows = torch.tensor([[-3.0, 1.0, 2.0, 4.0]])
        >>> clip(rows, Draws(0, 0, torch.arange(1)), {}, Clip(strength=0.5, relative=True))
        tensor([[-2.,  1.,  2.,  2.]])
    """
    if not settings.relative:
        return rows_NP.clamp_(-settings.strength, settings.strength)
    # torch.quantile takes at most 2**24 values, so the k-th smallest magnitude is asked for.
    rank = max(1, round(settings.strength * rows_NP.shape[1]))
    for row_P in rows_NP:
        bound = row_P.abs().kthvalue(rank).values
        row_P.clamp_(-bound, bound)
    return rows_NP


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Settings of ``prune``.

    Attributes:
        strength: q, the share of each layer's entries that is set to zero; from 0 to below 1. In a
            layer of n entries these are round(q n).

    Raises:
        ValueError: the strength is out of its range.
    """

    strength: float

    def __post_init__(self) -> None:
        _share_below_one("prune", self.strength)


@OBFUSCATIONS.register("prune", settings=Prune)
def prune(rows_NP: Tensor, draws: Draws, layers: Mapping[str, slice], settings: Prune) -> Tensor:
    """Set the entries of smallest magnitude in each layer to zero.

    If two entries have the same magnitude, the one on the left is set to zero first.

    Args:
        rows_NP: the updates, a floating dtype; they are overwritten.
        draws: not used here.
        layers: each parameter's columns, by name.
        settings: how many entries are set to zero.

    Returns:
        The same tensor.

    Example:
        >>> rows = torch.tensor([[-3.0, 1.0, 0.1, 0.2]])
        >>> layers = {"weight": slice(0, 2), "bias": slice(2, 4)}
        >>> prune(rows, Draws(0, 0, torch.arange(1)), layers, Prune(strength=0.5))
        tensor([[-3.0000,  0.0000,  0.0000,  0.2000]])
    """
    for columns in layers.values():
        num_zeros = round(settings.strength * (columns.stop - columns.start))
        for layer_p in rows_NP[:, columns] if num_zeros else ():
            _zero_smallest(layer_p, num_zeros)
    return rows_NP


def _zero_smallest(values_p: Tensor, num_zeros: int) -> None:
    """Set the ``num_zeros`` values of smallest magnitude to zero, in place."""
    # A stable sort would give the same entries, but takes several times as long as one selection.
    magnitudes_p = values_p.abs()
    largest = magnitudes_p.kthvalue(num_zeros).values
    below_p = magnitudes_p < largest
    equal = (magnitudes_p == largest).nonzero()[:, 0]
    values_p.masked_fill_(below_p, 0)
    values_p[equal[: num_zeros - int(below_p.sum())]] = 0


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Settings of ``noise``.

    Attributes:
        strength: s, the standard deviation of the noise, at least 0.
        relative: s is in units of the root mean square of each row's own entries.

    Raises:
        ValueError: the strength is out of its range.
    """

    strength: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"privacy.strength must be finite and at least 0 for obfuscation 'noise', got {self.strength!r}")


@OBFUSCATIONS.register("noise", settings=Noise)
def noise(rows_NP: Tensor, draws: Draws, layers: Mapping[str, slice], settings: Noise) -> Tensor:
    """Add normal noise to each entry.

    Args:
        rows_NP: the updates, a floating dtype; they are overwritten.
        draws: the source of the noise.
        layers: each parameter's columns, by name; not used here.
        settings: the standard deviation of the noise.

    Returns:
        The same tensor.

    Example:
        >>> draws = Draws(0, 0, torch.arange(1))
        >>> rows = noise(torch.zeros(1, 10_000), draws, {}, Noise(strength=2.0))
        >>> round(float(rows.std()), 1)
        2.0
    """
    for row_P, generator in zip(rows_NP, draws.of_clients(), strict=True):
        z_P = torch.randn(len(row_P), generator=generator, dtype=torch.float32).to(row_P)
        # The squares of large float32 entries would overflow, so they are added in float64.
        unit = row_P.double().square().mean().sqrt().to(row_P.dtype) if settings.relative else 1.0
        row_P += z_P * (settings.strength * unit)
    return rows_NP
