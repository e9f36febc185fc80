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

__all__ = ["TRANSFORMS", "TransformConfig", "client_generators", "transformed"]

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
        if not isinstance(rows_NP, Tensor) or (rows_NP.shape, rows_NP.dtype) != (before.shape, before.dtype):
            got = f"{rows_NP.dtype} {tuple(rows_NP.shape)}" if isinstance(rows_NP, Tensor) else type(rows_NP).__name__
            raise ValueError(
                f"transforms.name {transform.name!r} must return {before.dtype} {tuple(before.shape)}, like the rows it is "
                f"given, got {got}"
            )
    return rows_NP


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
