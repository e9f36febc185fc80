"""What an aggregation rule is: how it is registered, what it is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from skymask_gpu.defence import RootTraining
from skymask_gpu.federation.choices import Choices

__all__ = ["RULES", "RoundInfo", "Rule", "RuleContext", "RuleResult", "clients_per_malicious", "needs_clients", "takes_any_row"]

# Every rule by name. An entry is a function of one round, rule(updates_MP, info[, settings]) ->
# RuleResult, or a class, which is made once per run as rule(context[, settings]) and then called as
# rule(updates_MP, info). A class that remembers something from round to round also has state() and
# restore(), see Rule.
RULES = Choices("defence.rule", common=("rule", "assumed_malicious"))

Entry = TypeVar("Entry", bound=Callable[..., Any])


def takes_any_row(rule: Entry) -> Entry:
    """A decorator for a rule that NaN and Inf may reach; all others get only finite rows."""
    setattr(rule, "_takes_any_row", True)  # noqa: B010
    return rule


def needs_clients(per_malicious: int) -> Callable[[Entry], Entry]:
    """A decorator for a rule that is defined only if n >= ``per_malicious * f + 3``.

    There are n clients in a round, of which the rule takes f for malicious.
    """

    def mark(rule: Entry) -> Entry:
        setattr(rule, "_per_malicious", per_malicious)  # noqa: B010
        return rule

    return mark


def clients_per_malicious(name: str) -> int | None:
    """What :func:`needs_clients` says of a rule; None: it is defined for any number of clients."""
    return getattr(RULES[name], "_per_malicious", None)


@dataclass(frozen=True, kw_only=True)
class RuleContext:
    """What a rule is built from, once per run: the server's model and its data.

    Attributes:
        module: the model; its trainable parameters are those of an update, in
            ``named_parameters()`` order. Not modified.
        root_inputs: ``(n, ...)`` the server's own samples.
        root_labels: ``(n, ...)``.
        num_clients: of the run; clients are numbered from 0.
        root_training: the local recipe, for a rule that trains a model on the server's samples as
            clients do.
        seed: the run's.
    """

    module: nn.Module
    root_inputs: Tensor
    root_labels: Tensor
    num_clients: int
    root_training: RootTraining
    seed: int


@dataclass(frozen=True)
class RoundInfo:
    """What a rule may know of a round besides the M updates.

    Attributes:
        global_params: ``(P,)`` of the model that the clients started from.
        root_update: ``(P,)`` update of the root model, trained like a client on the server's root
            data set.
        clients: ``(M,)`` int64, which clients the rows are; only some may take part in a round.
        num_malicious: how many of the M rows the server assumes to be malicious; ``f`` in the
            papers.
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
        kept: ``(M,)`` bool, which clients it is made of; None from a rule that judges no client (a
            median).
        record: what the round's line in ``metrics.jsonl`` says besides; JSON values.
        seconds: what took the rule's time, by phase.
        tensors: makes what the round stores beside its line, tensors by name and texts about them;
            rows of ``"clients"`` are client numbers. It is called only where a file is written, so
            that a rule that is only asked for its update does not pay for it.
    """

    update: Tensor
    kept: Tensor | None
    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tensors: Callable[[], tuple[dict[str, Tensor], dict[str, str]]] | None = None


class Rule(Protocol):
    """From the updates ``(M, P)`` of a round's clients to the server's step."""

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult: ...

    def state(self) -> dict[str, Tensor]:
        """What it remembers from round to round; a checkpoint holds it. Empty for most rules."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a ``state``."""
        ...
