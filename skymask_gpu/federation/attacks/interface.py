"""What an attack is: its table in a run's file, what the attacker knows, and its hooks.

N clients, F of them malicious, H = N - F honest, P parameters.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from skymask_gpu.federation.choices import Choice, Choices, with_settings

if TYPE_CHECKING:
    from skymask_gpu.federation.attacks.lab import Lab

__all__ = ["ATTACKS", "Attack", "AttackConfig", "AttackContext", "Threat", "attack", "build_attack"]

# Every attack by name. An entry is a function from a round's updates to what malicious clients
# send,     attack(updates_NP, malicious_N, threat[, settings]) -> (F, P),
# or a subclass of Attack, which is made once per run as attack(context[, settings]).
ATTACKS = Choices("attack.name", common=("name", "share", "first_round", "last_round"))


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Choice):
    """``[attack]``: what the malicious clients do, and how many there are.

    Attributes:
        name: key of :data:`ATTACKS`.
        share: the share of all clients that attack, from 0 to below 1; above 0 unless the name is
            ``"none"``.
        first_round: the first round in which they attack; 0 is the run's first. Before it, they
            train and send as honest clients do.
        last_round: the last round in which they attack, after which they are honest again; -1 means
            the run's last.
        settings: the attack's own keys; None means their defaults.

    Example:
        >>> from skymask_gpu.federation.attacks import IPM, AttackConfig
        >>> AttackConfig(name="ipm", share=0.2, settings=IPM(epsilon=2.0)).num_malicious(50)
        10
    """

    registry: ClassVar[Choices] = ATTACKS
    table: ClassVar[str] = "attack"

    name: str = "none"
    share: float = 0.0
    first_round: int = 0
    last_round: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise ValueError(f"attack.share must be from 0 to below 1, got {self.share!r}")
        if self.first_round < 0:
            raise ValueError(f"attack.first_round must be at least 0, the run's first round, got {self.first_round!r}")
        if self.last_round != -1 and self.last_round < self.first_round:
            raise ValueError(
                f"attack.last_round must be at least attack.first_round = {self.first_round}, or -1 for the run's last round, "
                f"got {self.last_round!r}"
            )
        if self.name == "none" and self.share > 0:
            raise ValueError(f"attack.share must be 0 for attack 'none', got {self.share!r}; set attack.name")
        if self.name != "none" and self.share == 0:
            raise ValueError(f"attack.share must be above 0 for attack {self.name!r}, got {self.share!r}")

    def strikes_in(self, number: int) -> bool:
        """Whether the malicious clients attack in round ``number``."""
        return self.share > 0 and self.first_round <= number and (self.last_round == -1 or number <= self.last_round)

    def in_every_round(self) -> "AttackConfig":
        """The same attack from the first round to the last, as a board plays it."""
        return replace(self, first_round=0, last_round=-1)

    def num_malicious(self, num_clients: int) -> int:
        """The rounded share of ``num_clients``; at least one unless the share is 0.

        Raises:
            ValueError: no client would be honest.
        """
        if self.share == 0:
            return 0
        num_malicious = max(1, round(self.share * num_clients))
        if num_malicious >= num_clients:
            raise ValueError(
                f"attack.share must leave an honest client, got {self.share!r} of {num_clients}: {num_malicious} malicious; "
                "use a smaller share or more data.clients"
            )
        return num_malicious


@dataclass(frozen=True, kw_only=True)
class AttackContext:
    """The model and the data of a run, which an attack must fit.

    Attributes:
        layers: each parameter's columns in an update, by name.
        num_classes: the number of classes of the data set.
        input_shape: the shape of one sample, ``(channels, height, width)``, ``(features,)`` or
            ``(length,)`` of a sequence.
        brightest: the largest value in the training inputs; the pixels of a trigger have it.
        lab: where attackers train models of their own on their samples; None outside of a run.
    """

    layers: Mapping[str, slice]
    num_classes: int
    input_shape: tuple[int, ...]
    brightest: float
    lab: "Lab | None" = None


@dataclass(frozen=True)
class Threat:
    """What the attacker knows in a round besides the updates.

    Attributes:
        config: the attack.
        generator: the source of randomness, on the CPU; it is seeded anew each round.
        clients: ``(N,)`` int64, the number of each row's client; None outside of a run.
        global_params: ``(P,)``, the model that the clients started from; None outside of a run.
        previous_params: ``(P,)``, the model that they started from in the round before; None in the
            first round.
        buffers: the buffers of that model by name; None outside of a run.
        rule: the step that the server's rule would make of all clients' rows, ``(N, P) -> (P,)``;
            asking it changes nothing. None outside of a run, and on a board.
    """

    config: AttackConfig
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    clients: Tensor | None = None
    global_params: Tensor | None = None
    previous_params: Tensor | None = None
    buffers: Mapping[str, Tensor] | None = None
    rule: Callable[[Tensor], Tensor] | None = None


class Attack:
    """One run's attacker. A subclass overrides the hooks that it needs.

    Without any of them, malicious clients do what honest ones do. ``__init__`` takes an
    :class:`AttackContext`, and the attack's settings if it has some. It raises a ValueError if the
    attack does not fit the model or the data, so that this is known before anybody trains.

    Attributes:
        poisons_data: whether :meth:`poison` changes batches.
        target_class: the class for which a backdoor wants inputs with its trigger to be taken.
            None means that there is no backdoor, and that no success is measured.
    """

    poisons_data: ClassVar[bool] = False
    target_class: int | None = None

    def poison(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs and labels that malicious clients train on instead of these.

        Args:
            inputs: ``(..., B, *sample)``: one client's batch, or those of several clients.
            labels: ``(..., B)`` int64.
        """
        return inputs, labels

    def poison_of(self, inputs: Tensor, labels: Tensor, clients_C: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`poison` for batches of known clients, for an attack whose clients differ.

        Args:
            inputs: ``(C, B, *sample)``, a batch of each client.
            labels: ``(C, B)`` int64.
            clients_C: ``(C,)`` int64, the clients' numbers.
        """
        return self.poison(inputs, labels)

    def after_step(self, params_FP: Tensor, step: int, clients_F: Tensor, threat: Threat) -> Tensor | None:
        """Called after each local step of malicious clients, for some of these clients at a time.

        If they do not fit in memory together, their steps begin anew with fewer clients, and this
        is called again. What the attack remembers must not depend on the number of calls.

        Args:
            params_FP: ``(F, P)``, their local models after the step; they must not be written to.
            step: the number of the step; 0 is the first.
            clients_F: ``(F,)`` int64, the numbers of these clients.
            threat: what the attacker knows.

        Returns:
            The local models, ``(F, P)``, to go on from; None means those that it was given.
        """
        return None

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        """What the malicious clients send, ``(F, P)``.

        Args:
            updates_NP: float32, what each client got by its own training; do not write to it.
            malicious_N: ``(N,)`` bool.
            threat: what else the attacker knows.
        """
        return updates_NP[malicious_N]

    def trigger(self, inputs: Tensor) -> Tensor:
        """Copies of test inputs, ``(n, *sample)``, with the whole trigger of a backdoor."""
        raise NotImplementedError("an attack with a target_class must define its trigger, or its test_inputs")

    def test_inputs(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """What a backdoor's success is measured on, ``(k, *sample)``, the trigger included.

        Without an override, these are all test inputs whose true class is not the target class,
        with the trigger.

        Args:
            inputs: ``(n, *sample)``, the test inputs; do not write to them.
            labels: ``(n,)`` int64.
        """
        return self.trigger(inputs[labels != self.target_class])

    def state(self) -> dict[str, Tensor]:
        """What the attack remembers from round to round; a checkpoint holds it.

        The tensors are not written to later.
        """
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a ``state``; an empty one is the state before the first round."""

    def replaced(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        """A new ``(N, P)`` matrix with the malicious rows of :meth:`send`.

        If no row is malicious, the updates themselves are returned.
        """
        if not malicious_N.any():
            return updates_NP
        sent_NP = updates_NP.clone()
        sent_NP[malicious_N] = self.send(updates_NP, malicious_N, threat)
        return sent_NP


class _OnUpdates(Attack):
    """An attack that is one function of a round's updates."""

    def __init__(self, function: Callable[..., Tensor], settings: Any) -> None:
        self._function, self._settings = function, settings

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        return with_settings(self._function, self._settings, updates_NP, malicious_N, threat)


def build_attack(choice: Choice, context: AttackContext) -> Attack:
    """The attack that ``[attack]``, or another table that chooses an attack, asks for.

    Raises:
        ValueError: the attack does not fit the model or the data.
    """
    entry = ATTACKS[getattr(choice, choice.key)]
    return with_settings(entry, choice.settings, context) if inspect.isclass(entry) else _OnUpdates(entry, choice.settings)


def attack(updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
    """Run one round of an attack that is a function of the updates, outside of a run.

    Args:
        updates_NP: float32, what each client got by its own training.
        malicious_N: ``(N,)`` bool.
        threat: the attack, and its source of randomness.

    Returns:
        A new ``(N, P)`` matrix in which the malicious rows are replaced; without malicious rows,
        the updates themselves.

    Raises:
        ValueError: the attack looks at the model or the data, too, as backdoors do; build it with
            :func:`build_attack`.
    """
    name = threat.config.name
    if inspect.isclass(ATTACKS[name]):
        raise ValueError(f"attack.name {name!r} needs a run's model and data; use build_attack")
    return _OnUpdates(ATTACKS[name], threat.config.settings).replaced(updates_NP, malicious_N, threat)
