"""The TOML file of a federated run or a sweep: its tables as dataclasses, and errors that name the nearest known key."""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skymask_gpu.engine import SOLVERS, Clustering, MaskTraining
from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.federation.datasets.partition import PARTITIONS
from skymask_gpu.federation.models import MODELS
from skymask_gpu.federation.rules import RULES

__all__ = ["DataConfig", "DefenceConfig", "ModelConfig", "RunConfig", "read_config", "read_grid"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``[data]``: the data set, how it is shared among the clients, and the server's root data set.

    Attributes:
        dataset: its name.
        data_dir: folder with its standard files.
        clients: how many there are.
        partition: how samples are shared out.
        bias: q of partition ``"bias"`` (Fang et al. 2020); one over the number of classes is IID.
        alpha: of partition ``"dirichlet"``; the smaller, the less alike clients are.
        root_samples: size of the root data set, drawn from the training data.
        root_bias: share of its first class; 0: all classes alike.
    """

    dataset: str = "digits"
    data_dir: str = ""
    clients: int = 100
    partition: str = "bias"
    bias: float = 0.5
    alpha: float = 0.5
    root_samples: int = 100
    root_bias: float = 0.0

    def __post_init__(self) -> None:
        one_of("data.dataset", self.dataset, DATASETS)
        one_of("data.partition", self.partition, PARTITIONS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """``[model]``: the network, by name, or as ``file.py:Class`` of the user's own, which is called without arguments."""

    name: str = "mlp"

    def __post_init__(self) -> None:
        if ".py:" not in self.name:
            one_of("model.name", self.name, MODELS)


@dataclass(frozen=True, kw_only=True)
class DefenceConfig:
    """``[defence]``: the aggregation rule, and for SkyMask how masks are trained and clustered.

    Attributes:
        rule: its name.
        assumed_malicious: how many malicious clients the rule reckons with (f of Krum and others); -1: as many as there are.
        solver: of SkyMask.
        clustering: SkyMask's rule from masks to a verdict.
        mask_steps: of mask training.
        mask_lr: its learning rate.
        mask_grad_clip: bound on each element of its gradient.
    """

    rule: str = "skymask"
    assumed_malicious: int = -1
    solver: str = "auto"
    clustering: str = "two-stage"
    mask_steps: int = 20
    mask_lr: float = 1e7
    mask_grad_clip: float = 1e-7

    def __post_init__(self) -> None:
        one_of("defence.rule", self.rule, RULES)
        one_of("defence.solver", self.solver, ("auto", *SOLVERS))
        if self.assumed_malicious < -1:
            raise ValueError(f"defence.assumed_malicious must be at least -1, got {self.assumed_malicious}")

    @property
    def training(self) -> MaskTraining:
        return MaskTraining(steps=self.mask_steps, lr=self.mask_lr, grad_clip=self.mask_grad_clip)

    @property
    def clustering_config(self) -> Clustering:
        return Clustering(rule=self.clustering)  # type: ignore[arg-type]  # checked by Clustering


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One federated run.

    Attributes:
        name: of the run, and of its folder where there are several.
        seed: of everything that is random.
        rounds: how many.
        server_lr: the server adds this times the aggregated update.
        clients_per_round: how many clients, drawn anew, take part in a round; 0: all.
        checkpoint_every: rounds from checkpoint to checkpoint; a stopped run goes on from the last one.
        evaluate_every: rounds from test to test of the global model; the last round is always tested.
    """

    name: str = "run"
    seed: int = 0
    rounds: int = 10
    server_lr: float = 1.0
    clients_per_round: int = 0
    checkpoint_every: int = 1
    evaluate_every: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalTraining = field(default_factory=LocalTraining)
    attack: AttackConfig = field(default_factory=AttackConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)

    def __post_init__(self) -> None:
        for name in ("rounds", "checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.name or set(self.name) & set('/\\:*?"<>|') or self.name.startswith("."):
            raise ValueError(f"name must be usable as a folder's name, got {self.name!r}")
        if not math.isfinite(self.server_lr):
            raise ValueError(f"server_lr must be finite, got {self.server_lr}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2**31 - 1, got {self.seed}")
        if not 0 <= self.clients_per_round <= self.data.clients:
            raise ValueError(
                f"clients_per_round must be between 0 (all) and data.clients = {self.data.clients}, "
                f"got {self.clients_per_round}"
            )
        self._check_assumed_malicious()
        # raise now, not after the first round
        _ = self.defence.training, self.defence.clustering_config, self.attack.num_malicious(self.data.clients)

    def _check_assumed_malicious(self) -> None:
        """Krum and what is built on it are defined for few malicious clients; f that is as many as there are may be more."""
        clients, f, rule = self.clients_per_round or self.data.clients, self.defence.assumed_malicious, self.defence.rule
        factor = {"krum": 2, "multi-krum": 2, "bulyan": 4}.get(rule)
        if factor is not None and f > 0 and clients < factor * f + 3:
            raise ValueError(
                f"defence.assumed_malicious must be at most {max(0, (clients - 3) // factor)} for defence.rule {rule!r} and "
                f"{clients} clients a round (n >= {factor} f + 3), got {f}; take fewer, or -1 for as many as there are"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested tables, as JSON can hold them."""
        return json.loads(json.dumps(asdict(self)))


def read_config(path: Path) -> list[RunConfig]:
    """The runs of a TOML file: one, or one for each ``[[variants]]`` table, which overrides keys of the file and has a name.

    Raises:
        ValueError: no such file, no TOML, an unknown key, or a value out of range.
    """
    content = _read_toml(path)
    if "grid" in content:
        raise ValueError(f"config: {path} has a [grid] table; play it with: skymask-gpu sweep {path}")
    variants = content.pop("variants", None)
    if variants is None:
        return [_build(RunConfig, {"name": path.stem, **content}, "")]
    if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) and v.get("name") for v in variants):
        raise ValueError("config: variants must be [[variants]] tables, each with a name")
    runs = [_build(RunConfig, _merged(content, variant), "") for variant in variants]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"config: the names of the variants must differ, got {', '.join(names)}")
    return runs


def read_grid(path: Path) -> list[RunConfig]:
    """The runs of a sweep: every combination of the lists in the file's ``[grid]`` table, whose keys are dotted ones of a run.

    With attack ``"none"`` the share of attackers is 0, so that several shares give one such run.

    Raises:
        ValueError: as for :func:`read_config`, or there is no grid.
    """
    content = _read_toml(path)
    grid = content.pop("grid", None)
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f'config: {path} must have a [grid] table of lists, as "attack.name" = ["min-max", "trim"]')
    for key, values in grid.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise ValueError(f"config: grid.{key} must be a list of different values, got {values!r}")
    runs: dict[str, RunConfig] = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        cell = content
        for key, value in chosen.items():
            cell = _merged(cell, functools.reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), value))
        if cell.get("attack", {}).get("name", "none") == "none":
            cell = _merged(cell, {"attack": {"share": 0.0}})
            chosen.pop("attack.share", None)
        name = ",".join(f"{_short(key)}={value}" for key, value in chosen.items())
        name = "".join("_" if character in '/\\:*?"<>|' else character for character in name)
        runs[name] = _build(RunConfig, {**cell, "name": name}, "")
    return list(runs.values())


def _short(key: str) -> str:
    """``attack.name`` is called attack, ``defence.rule`` rule."""
    *tables, last = key.split(".")
    return tables[-1] if last == "name" and tables else last


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"config: no file {path}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} is no TOML: {error}") from error


def _merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in override.items():
        inner = result.get(key, {})
        result[key] = _merged(inner if isinstance(inner, dict) else {}, value) if isinstance(value, dict) else value
    return result


def _build(kind: type[Any], content: dict[str, Any], prefix: str) -> Any:
    """An instance of a config dataclass from a TOML table; types are checked, unknown keys refused."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise ValueError(f"config: unknown key {prefix}{key}{_hint(key, prefix, fields)}")
        wanted: Any = fields[key].type
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise ValueError(f"config: {prefix}{key} must be a table, got {value!r}")
            values[key] = _build(wanted, value, f"{key}.")
        else:
            values[key] = _checked(f"{prefix}{key}", value, wanted)
    return kind(**values)


def _checked(name: str, value: Any, wanted: Any) -> Any:
    """A TOML value as the type that a field has: integers are floats where floats are wanted, lists tuples."""
    if wanted == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"config: {name} must be a list of strings, got {value!r}")
        return tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise ValueError(f"config: {name} must be {wanted.__name__}, got {value!r}")
    return value


def _hint(key: str, prefix: str, fields: dict[str, Any]) -> str:
    """The nearest known key: of the same table or, written into the wrong one, of another."""
    if near := difflib.get_close_matches(key, fields, n=1):
        return f"; did you mean {prefix}{near[0]}?"
    elsewhere = [
        f"{table.name}.{inner.name}"
        for table in dataclasses.fields(RunConfig)
        if isinstance(table.type, type) and dataclasses.is_dataclass(table.type)
        for inner in dataclasses.fields(table.type)
        if inner.name == key
    ]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known are {', '.join(fields)}"
