"""The TOML file of a federated run: its tables as dataclasses, and errors that name the nearest known key."""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skymask_gpu.engine import SOLVERS, Clustering, MaskTraining
from skymask_gpu.federation.attacks import ATTACKS
from skymask_gpu.federation.data import DATASETS
from skymask_gpu.federation.local_training import LocalTraining
from skymask_gpu.federation.models import MODELS
from skymask_gpu.federation.rules import RULES

__all__ = ["AttackConfig", "DataConfig", "DefenceConfig", "ModelConfig", "RunConfig", "read_config"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``[data]``: the data set, how it is shared among the clients, and the server's root set."""

    dataset: str = "digits"
    data_dir: str = ""
    clients: int = 100
    bias: float = 0.5  # q of Fang et al. 2020; one over the number of classes is IID
    root_samples: int = 100

    def __post_init__(self) -> None:
        _one_of("data.dataset", self.dataset, DATASETS)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """``[model]``: the network."""

    name: str = "mlp"

    def __post_init__(self) -> None:
        _one_of("model.name", self.name, MODELS)


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """``[attack]``: what the malicious clients do, and how many there are (the first ones, spread over the label groups)."""

    name: str = "none"
    malicious: int = 0

    def __post_init__(self) -> None:
        _one_of("attack.name", self.name, ATTACKS)
        if self.malicious < 0:
            raise ValueError(f"attack.malicious must be at least 0, got {self.malicious}")


@dataclass(frozen=True, kw_only=True)
class DefenceConfig:
    """``[defence]``: the aggregation rule, and for SkyMask how masks are trained and clustered."""

    rule: str = "skymask"
    solver: str = "auto"
    clustering: str = "two-stage"
    mask_steps: int = 20
    mask_lr: float = 1e7
    mask_grad_clip: float = 1e-7

    def __post_init__(self) -> None:
        _one_of("defence.rule", self.rule, RULES)
        _one_of("defence.solver", self.solver, ("auto", *SOLVERS))

    @property
    def training(self) -> MaskTraining:
        return MaskTraining(steps=self.mask_steps, lr=self.mask_lr, grad_clip=self.mask_grad_clip)

    @property
    def clustering_config(self) -> Clustering:
        return Clustering(rule=self.clustering)  # type: ignore[arg-type]  # checked by Clustering


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One federated run."""

    name: str = "run"
    seed: int = 0
    rounds: int = 10
    server_lr: float = 1.0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalTraining = field(default_factory=LocalTraining)
    attack: AttackConfig = field(default_factory=AttackConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not self.name or set(self.name) & set('/\\:*?"<>|') or self.name.startswith("."):
            raise ValueError(f"name must be usable as a folder's name, got {self.name!r}")
        if self.attack.name != "none" and not 0 < self.attack.malicious < self.data.clients:
            raise ValueError(
                f"attack.malicious must be between 1 and {self.data.clients - 1} of {self.data.clients} clients for attack "
                f"{self.attack.name!r}, got {self.attack.malicious}"
            )
        if self.attack.name == "none" and self.attack.malicious != 0:
            raise ValueError(f"attack.malicious must be 0 for attack 'none', got {self.attack.malicious}")
        if not math.isfinite(self.server_lr):
            raise ValueError(f"server_lr must be finite, got {self.server_lr}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2**31 - 1, got {self.seed}")
        # raise now, not after the first round
        _ = self.defence.training, self.defence.clustering_config


def read_config(path: Path) -> list[RunConfig]:
    """The runs of a TOML file: one, or one for each ``[[variants]]`` table, which overrides keys of the file and has a name.

    Raises:
        ValueError: no such file, no TOML, an unknown key, or a value out of range.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"config: no file {path}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} is no TOML: {error}") from error
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


def _merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in override.items():
        result[key] = _merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def _build(kind: type[Any], content: dict[str, Any], prefix: str) -> Any:
    """An instance of a config dataclass from a TOML table; types are checked, unknown keys refused."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(fields)}"
            raise ValueError(f"config: unknown key {prefix}{key}{hint}")
        wanted: Any = fields[key].type
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise ValueError(f"config: {prefix}{key} must be a table, got {value!r}")
            values[key] = _build(wanted, value, f"{key}.")
            continue
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            raise ValueError(f"config: {prefix}{key} must be {wanted.__name__}, got {value!r}")
        values[key] = value
    return kind(**values)


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")
