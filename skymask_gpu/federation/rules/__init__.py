"""Aggregation rules: from the clients' updates to the server's step.

| file | what |
| --- | --- |
| ``interface.py`` | ``RULES``, the registry; what a rule is given and gives back |
| ``averages.py`` | fedavg, median, trimmed-mean, geometric-median: they judge nobody |
| ``krum.py`` | krum, multi-krum, bulyan |
| ``fltrust.py``, ``flame.py``, ``deepsight.py`` | one rule each |
| ``tolpegin.py``, ``fldetector.py``, ``skymask.py`` | one rule each |
| ``wrappers.py`` | a function as a rule; a rule that NaN and Inf do not reach |
| ``rows.py``, ``clustering.py``, ``last_layer.py`` | what several rules share |
"""

import inspect
from typing import Any

# Importing a file registers its rules.
from skymask_gpu.federation.choices import NoSettings, with_settings
from skymask_gpu.federation.rules.averages import fedavg as fedavg
from skymask_gpu.federation.rules.deepsight import DeepSight as DeepSight
from skymask_gpu.federation.rules.flame import flame as flame
from skymask_gpu.federation.rules.fldetector import FLDetector as FLDetector
from skymask_gpu.federation.rules.fltrust import fltrust as fltrust
from skymask_gpu.federation.rules.interface import RULES, RoundInfo, Rule, RuleContext, RuleResult
from skymask_gpu.federation.rules.krum import krum as krum
from skymask_gpu.federation.rules.skymask import SkyMaskSettings
from skymask_gpu.federation.rules.tolpegin import Tolpegin as Tolpegin
from skymask_gpu.federation.rules.wrappers import FiniteRows, Stateless

__all__ = ["RULES", "RoundInfo", "Rule", "RuleContext", "RuleResult", "SkyMaskSettings", "build_rule"]


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
