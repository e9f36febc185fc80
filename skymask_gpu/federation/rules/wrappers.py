"""Wrappers that make a rule from a function, and that keep NaN and Inf away from a rule."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skymask_gpu.federation.choices import with_settings
from skymask_gpu.federation.rules.interface import RoundInfo, Rule, RuleResult

__all__ = ["FiniteRows", "Stateless"]


class Stateless:
    """A rule that remembers nothing, made from a function of ``(updates_MP, info[, settings])``."""

    def __init__(self, function: Callable[..., RuleResult], settings: Any) -> None:
        self._function, self._settings = function, settings

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        return with_settings(self._function, self._settings, updates_MP, info)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


class FiniteRows:
    """Gives a rule only the rows without NaN and Inf; the others are not kept.

    Each rejected row counts as one of the ``num_malicious``. If no row is left, the update is zero
    and nobody is kept.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        finite_M = torch.isfinite(updates_MP).all(1)
        if finite_M.all():
            return self._rule(updates_MP, info)
        if not finite_M.any():
            return RuleResult(updates_MP.new_zeros(updates_MP.shape[1]), finite_M)
        num_rejected = int((~finite_M).sum())
        info = dataclasses.replace(
            info,
            clients=info.clients[finite_M.to(info.clients.device)],
            num_malicious=max(0, info.num_malicious - num_rejected),
        )
        result = self._rule(updates_MP[finite_M], info)
        if result.kept is None:
            return result
        kept_M = torch.zeros_like(finite_M)
        kept_M[finite_M] = result.kept
        return dataclasses.replace(result, kept=kept_M)

    def state(self) -> dict[str, Tensor]:
        return self._rule.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._rule.restore(state)
