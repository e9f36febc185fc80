"""A simulated federation: data, models, local training, attacks, aggregation rules and rounds.

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> from skymask_gpu.federation import AttackConfig, DataConfig, DefenceConfig, Federation
>>> from skymask_gpu.federation import RunConfig, play
>>> run = RunConfig(
...     rounds=2,
...     data=DataConfig(dataset="digits", clients=20),
...     attack=AttackConfig(name="sign-flip", share=0.2),
...     defence=DefenceConfig(rule="median"),
... )
>>> with TemporaryDirectory() as folder:
...     for record in play(Federation.build(run), Path(folder)):
...         print(record["round"], record["participants"], 0 <= record["accuracy"] <= 1)
0 20 True
1 20 True

| file | what |
| --- | --- |
| ``config.py`` | ``RunConfig`` and its tables |
| ``tables.py``, ``choices.py`` | from TOML to dataclasses; attacks and rules by name |
| ``changes.py`` | ``--set key=value``: settings that the command line changes |
| ``datasets/`` | data sets, their downloads, and each client's share of them |
| ``models/``, ``clients/`` | the networks; how many clients train at once |
| ``transforms/`` | what clients do to their updates before they send them |
| ``privacy.py`` | the ``[privacy]`` table: which of them hides a client's data |
| ``attacks/``, ``rules/`` | what malicious clients do; how the server aggregates |
| ``sharing.py`` | which samples each client and the server have |
| ``tracking/`` | TensorBoard and other programs that follow a run |
| ``simulation.py`` | ``Federation``: one round |
| ``playing.py`` | ``play``: all rounds, recorded and resumed |
| ``record.py``, ``run_folder.py`` | a round's line and files; the run's folder and its checkpoint |
| ``sweep.py`` | many runs, each in a process of its own |
| ``runs.py`` | ``load_runs``: what folders hold, as a table for a notebook |
| ``board/`` | every attack against every rule, on the same honest updates |
| ``arena/`` | rules against attacks in whole runs, scored by the worst attack |
| ``leak/`` | how many private images can be reconstructed from obfuscated gradients |
| ``example.py`` | the files of one round, to try ``skymask-gpu aggregate`` on |

The names below are imported when they are first asked for, since they import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skymask_gpu.federation.attacks import AttackConfig
    from skymask_gpu.federation.config import DataConfig, DefenceConfig, ModelConfig, RunConfig
    from skymask_gpu.federation.playing import play
    from skymask_gpu.federation.privacy import PrivacyConfig
    from skymask_gpu.federation.runs import load_runs
    from skymask_gpu.federation.simulation import Federation

__all__ = [
    "AttackConfig",
    "DataConfig",
    "DefenceConfig",
    "Federation",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "load_runs",
    "play",
]

_HOMES = {
    "AttackConfig": "skymask_gpu.federation.attacks",
    "DataConfig": "skymask_gpu.federation.config",
    "DefenceConfig": "skymask_gpu.federation.config",
    "Federation": "skymask_gpu.federation.simulation",
    "ModelConfig": "skymask_gpu.federation.config",
    "PrivacyConfig": "skymask_gpu.federation.privacy",
    "RunConfig": "skymask_gpu.federation.config",
    "load_runs": "skymask_gpu.federation.runs",
    "play": "skymask_gpu.federation.playing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
