"""``build_rule``: a rule by its name, ready to be called."""

import inspect
from typing import Any

from skymask_gpu.federation.choices import NoSettings, with_settings
from skymask_gpu.federation.rules.interface import RULES, Rule, RuleContext
from skymask_gpu.federation.rules.wrappers import FiniteRows, Stateless

__all__ = ["build_rule"]


def build_rule(name: str, context: RuleContext, settings: Any = None) -> Rule:
    """The rule called ``name``.

    Args:
        name: key of :data:`RULES`.
        context: the server's model and data.
        settings: the rule's own settings; None means their defaults.

    Raises:
        ValueError: unknown name, or the rule does not fit the model.
    """
    entry = RULES[name]
    settings = RULES.settings_of(name)() if settings is None else settings
    if not inspect.isclass(entry):
        rule: Rule = Stateless(entry, settings)
    else:
        made = with_settings(entry, settings, context)
        rule = made if hasattr(made, "state") else Stateless(made, NoSettings())
    return rule if hasattr(entry, "_takes_any_row") else FiniteRows(rule)
