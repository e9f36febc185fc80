"""Row transforms: what clients do to their updates before they send them, such as adding noise.

In a round: local training -> row transforms, in the order of the file -> the attack -> the
aggregation rule. A plugin registers a transform:

>>> from skymask_gpu.federation.transforms import TRANSFORMS
>>> @TRANSFORMS.register("halve")
... def halve(rows_NP, generators, layers):
...     return rows_NP / 2
>>> TRANSFORMS.remove("halve")

``obfuscation.py`` holds what clients do for their privacy, which a table of its own chooses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor

from skymask_gpu.federation.choices import Choice, Choices, with_settings

__all__ = ["TRANSFORMS", "TransformConfig", "check_like", "client_generators", "transformed"]

# Every transform by name: a function transform(rows_NP, generators, layers[, settings]) -> (N, P).
# It may write to the rows.
TRANSFORMS = Choices("transforms.name")


@dataclass(frozen=True, kw_only=True)
class TransformConfig(Choice):
    """One of the ``[[transforms]]`` tables.

    Attributes:
        name: key of :data:`TRANSFORMS`.
        settings: the transform's own keys; None means their defaults.
    """

    registry: ClassVar[Choices] = TRANSFORMS
    table: ClassVar[str] = "transforms"

    name: str


def transformed(
    rows_NP: Tensor,
    transforms: Sequence[TransformConfig],
    generators: Sequence[torch.Generator],
    layers: Mapping[str, slice],
) -> Tensor:
    """The clients' updates after all transforms.

    Args:
        rows_NP: the updates; they may be overwritten.
        transforms: the transforms, in the order in which they are applied.
        generators: each client's own source of randomness, on the CPU, see
            :func:`client_generators`.
        layers: each parameter's columns, by name.

    Raises:
        ValueError: a transform returns rows of another shape or type.
    """
    for transform in transforms:
        before = rows_NP
        rows_NP = with_settings(TRANSFORMS[transform.name], transform.settings, before, generators, layers)
        check_like(f"transforms.name {transform.name!r}", before, rows_NP)
    return rows_NP


def check_like(which: str, before_NP: Tensor, after_NP: object) -> None:
    """Refuse what a transform returns unless it is a tensor like the rows that it was given.

    Args:
        which: the setting and the name that it has there; the error names it.
        before_NP: the rows that it was given.
        after_NP: what it returned.

    Raises:
        ValueError: the shape or the type is another one.
    """
    if not isinstance(after_NP, Tensor) or (after_NP.shape, after_NP.dtype) != (before_NP.shape, before_NP.dtype):
        got = f"{after_NP.dtype} {tuple(after_NP.shape)}" if isinstance(after_NP, Tensor) else type(after_NP).__name__
        raise ValueError(
            f"{which} must return {before_NP.dtype} {tuple(before_NP.shape)}, like the rows it is given, got {got}"
        )


def client_generators(seed: int, number: int, clients: Tensor, purpose: str = "") -> list[torch.Generator]:
    """A generator for each client, from the run's seed, the round and the client's number only.

    A client's draws are therefore the same whoever else takes part in the round. Another
    ``purpose`` gives other draws.

    Example:
        >>> first, _ = client_generators(0, 5, torch.tensor([7, 8]))
        >>> (again,) = client_generators(0, 5, torch.tensor([7]))
        >>> bool(torch.rand(3, generator=first).equal(torch.rand(3, generator=again)))
        True
    """
    generators = []
    for client in clients.tolist():
        # The three numbers are hashed. Their sum would give clients of neighbouring rounds the same
        # draws.
        digest = blake2b(f"{seed} {number} {client}{purpose}".encode(), digest_size=8).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little")))
    return generators
