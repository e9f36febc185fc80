"""What every aggregation rule is given, and what it gives back."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skymask_gpu.defence import Aggregation

__all__ = ["RoundInfo", "Rule", "RuleResult"]


@dataclass(frozen=True)
class RoundInfo:
    """What a rule may know of a round besides the M updates.

    Attributes:
        global_params: ``(P,)`` of the model that the clients started from.
        root_update: ``(P,)`` update of the root model, trained like a client on the server's root data set.
        clients: ``(M,)`` int64, which clients the rows are; only some may take part in a round.
        num_malicious: how many of the M rows the server assumes to be malicious; ``f`` in the papers.
        generator: on the CPU, seeded by the run's seed and the round.
    """

    global_params: Tensor
    root_update: Tensor
    clients: Tensor
    num_malicious: int
    generator: torch.Generator


@dataclass(frozen=True)
class RuleResult:
    """The server's step.

    Attributes:
        update: ``(P,)``.
        kept: ``(M,)`` bool, which clients it is made of; None from a rule that judges no client (a median).
        aggregation: SkyMask's own result, if it was SkyMask.
    """

    update: Tensor
    kept: Tensor | None
    aggregation: Aggregation | None = None


class Rule(Protocol):
    """From the updates ``(M, P)`` of a round's clients to the server's step."""

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult: ...

    def state(self) -> dict[str, Tensor]:
        """What it remembers from round to round; a checkpoint holds it. Empty for most rules."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a ``state``."""
        ...
