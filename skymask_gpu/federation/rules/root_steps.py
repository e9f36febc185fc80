"""Controls of the rules that learn on the server's samples: what these samples give by themselves.

A rule with root data can end above plain averaging for two reasons: it judges clients well, or it
trains on the root data. ``root-only`` trains on them and looks at no client. ``root-finetune`` lets
another rule judge, and then trains the result on them.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from skymask_gpu.defence.root import root_direction
from skymask_gpu.engine import FlatModel
from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.choices import Choice, Choices
from skymask_gpu.federation.rules.building import build_rule
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, RuleContext, RuleResult, needs_root_data, takes_any_row

__all__ = ["FinetunedRule", "RootFinetune", "RootFinetuneSettings", "RootOnly"]

_FINETUNE = "root-finetune"


class _RootSteps:
    """The server's own steps on its samples, with the clients' recipe, as many as SkyMask takes."""

    def __init__(self, context: RuleContext) -> None:
        self._loss = FlatModel(context.module, context.root_inputs, context.root_labels)
        self._training = context.root_training

    def from_params(self, params_P: Tensor) -> Tensor:
        """``(P,)``: where the steps lead from ``params_P``, as a difference."""
        return root_direction(self._loss.to(params_P.device), params_P, self._training, small_batches=True)


@RULES.register("root-only")
@needs_root_data
@takes_any_row
class RootOnly:
    """Training on the server's samples alone: no client's update enters, and nobody is judged.

    A rule with root data that ends below it would do better without its clients. The steps are
    those of SkyMask's root direction (:func:`~skymask_gpu.defence.root.root_direction`).
    """

    def __init__(self, context: RuleContext) -> None:
        self._steps = _RootSteps(context)

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        return RuleResult(self._steps.from_params(info.global_params).to(updates_MP.dtype), None)


@dataclass(frozen=True, kw_only=True)
class FinetunedRule(Choice):
    """``defence.base``: the rule whose result is trained further, a name or a table with settings.

    Attributes:
        name: a rule.
        settings: the rule's own keys; None means their defaults.
    """

    registry: ClassVar[Choices] = RULES
    table: ClassVar[str] = "defence.base"

    name: str = "skymask"

    @classmethod
    def check_name(cls, name: object) -> None:
        one_of("defence.base", name, [known for known in RULES if known != _FINETUNE])


@dataclass(frozen=True, kw_only=True)
class RootFinetuneSettings:
    """Settings of ``root-finetune``.

    Attributes:
        base: the rule whose result is trained further on the root data.
    """

    base: FinetunedRule = field(default_factory=FinetunedRule)


@RULES.register(_FINETUNE, settings=RootFinetuneSettings)
@needs_root_data
@takes_any_row
class RootFinetune:
    """Another rule's result, trained further on the server's samples.

    It is the control of ``mean = "masked"``: it gives the root data a say, too, but only after the
    clients' updates were averaged. If the other rule's result leaves a model from which training
    diverges, no step is taken, so that the run goes on as it would without this rule.
    """

    def __init__(self, context: RuleContext, settings: RootFinetuneSettings) -> None:
        self._base = build_rule(settings.base.name, context, settings.base.settings)
        self._steps = _RootSteps(context)

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        result = self._base(updates_MP, info)
        try:
            further_P = self._steps.from_params(info.global_params + result.update)
        except ValueError:
            return result
        return replace(result, update=result.update + further_P.to(result.update.dtype))

    def state(self) -> dict[str, Tensor]:
        """What the other rule remembers."""
        return self._base.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._base.restore(state)
