"""Strategies for a Flower server: SkyMask, and every other rule of this package.

They are made for Flower's message API (``flwr.serverapp.strategy``, Flower 1.42 and up). How to use
them, and what they do not trust, is in ``docs/flower.md``.

| file | what |
| --- | --- |
| ``skymask.py`` | ``SkyMaskStrategy`` |
| ``rule.py`` | ``RuleStrategy``: any rule by its name |
| ``strategy.py`` | what both share: a round from the replies to the new model |
| ``replies.py`` | from replies to rows; a node with an unusable reply is rejected |
| ``arrays.py`` | one array: checks, then a view of the client's bytes |
| ``metrics.py`` | metrics and example counts, which clients report about themselves |
| ``verdict.py`` | ``RoundVerdict``: whom a strategy kept, and why it rejected the others |
"""

from importlib.util import find_spec

if find_spec("flwr") is None:
    raise ModuleNotFoundError("skymask_gpu.integrations.flower needs Flower: pip install 'skymask-gpu[flower]'", name="flwr")

from skymask_gpu.integrations.flower.rule import RuleStrategy
from skymask_gpu.integrations.flower.skymask import SkyMaskStrategy
from skymask_gpu.integrations.flower.verdict import RoundVerdict

__all__ = ["RoundVerdict", "RuleStrategy", "SkyMaskStrategy"]
