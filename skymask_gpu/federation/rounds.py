"""What goes from one round to the next, and what a round results in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skymask_gpu.federation.rules import RuleResult

__all__ = ["GlobalModel", "RoundResult"]


@dataclass(frozen=True)
class GlobalModel:
    """The global model before a round.

    Attributes:
        params: ``(P,)`` the parameters.
        buffers: the buffers, by name.
        previous: ``(P,)`` the parameters before the last round; None before the first round.
    """

    params: Tensor
    buffers: dict[str, Tensor]
    previous: Tensor | None = None

    def is_finite(self) -> bool:
        """Whether no value is NaN or Inf."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.params, *self.buffers.values()))


@dataclass(frozen=True)
class RoundResult:
    """The result of a round.

    Attributes:
        model: the global model after the round.
        clients: ``(M,)`` int64, the numbers of the clients that took part.
        rule_result: the result of the aggregation rule.
        seconds: how long local training and aggregation took.
    """

    model: GlobalModel
    clients: Tensor
    rule_result: RuleResult
    seconds: dict[str, float]
