"""Attacks that wrap another one, which acts only in some layers or some parameters."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks.interface import ATTACKS, Attack, AttackContext, Threat, build_attack
from skymask_gpu.federation.choices import Choice, Choices, positive_share

__all__ = ["BaseAttack", "Layers", "Sparse", "base_names", "poisoned_columns"]


def base_names() -> list[str]:
    """The attacks that can be wrapped: those that are a function of the updates, without "none"."""
    return [name for name, entry in ATTACKS.items() if name != "none" and not inspect.isclass(entry)]


@dataclass(frozen=True, kw_only=True)
class BaseAttack(Choice):
    """``attack.base``: the attack in the poisoned parameters, a name or a table with settings.

    Attributes:
        name: one of :func:`base_names`.
        settings: the attack's own keys; None means their defaults.
    """

    registry: ClassVar[Choices] = ATTACKS
    table: ClassVar[str] = "attack.base"

    name: str = "sign-flip"

    @classmethod
    def check_name(cls, name: object) -> None:
        one_of("attack.base", name, base_names())


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Settings of ``layers``.

    Attributes:
        layers: names of the poisoned parameters (``"conv1.weight"``), or of modules that hold them
            (``"conv1"``).
        base: the attack in the poisoned parameters.
    """

    layers: tuple[str, ...] = ()
    base: BaseAttack = field(default_factory=BaseAttack)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("attack.layers must name at least one parameter or module for attack 'layers', got none")


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Settings of ``sparse``.

    Attributes:
        params_share: the share of the parameters that are poisoned.
        base: the attack in the poisoned parameters.
    """

    params_share: float = 0.1
    base: BaseAttack = field(default_factory=BaseAttack)

    def __post_init__(self) -> None:
        positive_share("attack.params_share", self.params_share)


class _Partial(Attack):
    """Sends the base attack's values in some parameters and the client's own in the others."""

    def __init__(self, context: AttackContext, settings: Layers | Sparse) -> None:
        self._base = build_attack(settings.base, context)

    def poisoned(self, num_params: int, threat: Threat) -> Tensor:
        """The parameters in which the base attack acts in this round, ``(P,)`` bool, on the CPU."""
        raise NotImplementedError

    def send(self, updates_NP: Tensor, malicious_N: Tensor, threat: Threat) -> Tensor:
        poisoned_P = self.poisoned(updates_NP.shape[1], threat).to(updates_NP.device)
        return torch.where(poisoned_P, self._base.send(updates_NP, malicious_N, threat), updates_NP[malicious_N])


@ATTACKS.register("layers", settings=Layers)
class InLayers(_Partial):
    """Only some layers are poisoned.

    Raises:
        ValueError: the model has no parameters of the names in ``attack.layers``.
    """

    def __init__(self, context: AttackContext, settings: Layers) -> None:
        super().__init__(context, settings)
        self._columns = poisoned_columns(settings.layers, context.layers)

    def poisoned(self, num_params: int, threat: Threat) -> Tensor:
        poisoned_P = torch.zeros(num_params, dtype=torch.bool)
        for columns in self._columns:
            poisoned_P[columns] = True
        return poisoned_P


@ATTACKS.register("sparse", settings=Sparse)
class InSomeParams(_Partial):
    """Some parameters are poisoned: drawn anew each round, the same for all malicious clients."""

    def __init__(self, context: AttackContext, settings: Sparse) -> None:
        super().__init__(context, settings)
        self._share = settings.params_share

    def poisoned(self, num_params: int, threat: Threat) -> Tensor:
        order = torch.randperm(num_params, generator=threat.generator)
        poisoned_P = torch.zeros(num_params, dtype=torch.bool)
        poisoned_P[order[: max(1, round(self._share * num_params))]] = True
        return poisoned_P


def poisoned_columns(wanted: Iterable[str], layers: Mapping[str, slice]) -> list[slice]:
    """The columns of each parameter that is wanted by its name or its module's.

    Raises:
        ValueError: a name stands for no parameter.
    """
    columns = []
    for name in wanted:
        found = [part for layer, part in layers.items() if layer == name or layer.startswith(f"{name}.")]
        if not found:
            raise ValueError(
                f"attack.layers must name parameters of the model or modules that hold some, got {name!r}; "
                f"the model has {', '.join(layers)}"
            )
        columns += found
    return columns
