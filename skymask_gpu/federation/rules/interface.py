"""What an aggregation rule is: how it is registered, what it is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from skymask_gpu.defence import RootTraining
from skymask_gpu.federation.choices import Choices

__all__ = [
    "RULES",
    "RoundInfo",
    "Rule",
    "RuleContext",
    "RuleResult",
    "clients_per_malicious",
    "needs_clients",
    "needs_root_data",
    "takes_any_row",
    "uses_root_data",
]

# Every rule by name. An entry is a function of one round, rule(updates_MP, info[, settings]) ->
# RuleResult, or a class, which is made once per run as rule(context[, settings]) and then called as
# rule(updates_MP, info). A class that remembers something from round to round also has state() and
# restore(), see Rule.
RULES = Choices("defence.rule", common=("rule", "assumed_malicious"))

Entry = TypeVar("Entry", bound=Callable[..., Any])


def takes_any_row(rule: Entry) -> Entry:
    """A decorator for a rule that takes rows with NaN and Inf; all others get only finite rows."""
    setattr(rule, "_takes_any_row", True)  # noqa: B010
    return rule


def needs_clients(per_malicious: int) -> Callable[[Entry], Entry]:
    """A decorator for a rule that is defined only if n >= ``per_malicious * f + 3``.

    A round has n clients, and the rule assumes that f of them are malicious.
    """

    def mark(rule: Entry) -> Entry:
        setattr(rule, "_per_malicious", per_malicious)  # noqa: B010
        return rule

    return mark


def clients_per_malicious(name: str) -> int | None:
    """``per_malicious`` of :func:`needs_clients`; None if any number of clients will do."""
    return getattr(RULES[name], "_per_malicious", None)


def needs_root_data(rule: Entry) -> Entry:
    """A decorator for a rule that looks at the server's samples, or at what was learnt on them."""
    setattr(rule, "_needs_root_data", True)  # noqa: B010
    return rule


def uses_root_data(name: str) -> bool:
    """Whether a rule is marked by :func:`needs_root_data`."""
    return getattr(RULES[name], "_needs_root_data", False)


@dataclass(frozen=True, kw_only=True)
class RuleContext:
    """What a rule is built from, once per run: the server's model and its data.

    Attributes:
        module: the model; its trainable parameters are those of an update, in
            ``named_parameters()`` order. Not modified.
        root_inputs: ``(n, ...)``, the server's own samples.
        root_labels: ``(n, ...)``, their labels.
        num_clients: the number of clients of the run; they are numbered from 0. It is 0 where
            nobody knows it; a rule that remembers clients then makes room for each that comes.
        root_training: the local recipe, for a rule that trains a model on the server's samples as
            clients do.
        seed: the seed of the run.
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
        global_params: ``(P,)``, the parameters of the model that the clients started from.
        root_update: ``(P,)``, the update of the root model, which is trained like a client on the
            server's root data set.
        clients: ``(M,)`` int64, the number of each row's client; perhaps not all clients take part
            in a round.
        num_malicious: the number of rows that the server assumes to be malicious; ``f`` in the
            papers.
        generator: the source of randomness, on the CPU, seeded by the run's seed and the round.
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
        update: ``(P,)``, the aggregated update.
        kept: ``(M,)`` bool, the clients whose updates it is made of; None from a rule that judges
            no client, such as a median.
        record: JSON values that are added to the round's line in ``metrics.jsonl``.
        seconds: the rule's time, by phase.
        tensors: a function that makes what the round stores in a file: tensors by name, of which
            ``"clients"`` holds client numbers, and texts about them. It is called only if a file
            is written, so that nobody else pays for it.
    """

    update: Tensor
    kept: Tensor | None
    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tensors: Callable[[], tuple[dict[str, Tensor], dict[str, str]]] | None = None


class Rule(Protocol):
    """An aggregation rule: it turns the updates of a round's clients, ``(M, P)``, into a step."""

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult: ...

    def state(self) -> dict[str, Tensor]:
        """What the rule remembers from round to round, for the checkpoint; empty for most rules."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state``."""
        ...
