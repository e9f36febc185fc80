"""The TOML file of a federated run or a sweep: its tables as dataclasses, and its runs."""

import functools
import itertools
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.cell_names import cell_name, with_hash
from skymask_gpu.federation.changes import changed, changed_keys
from skymask_gpu.federation.choices import Choice, Choices
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.federation.datasets.partition import PARTITIONS
from skymask_gpu.federation.models import MODELS
from skymask_gpu.federation.plugins import load_plugins
from skymask_gpu.federation.privacy import PrivacyConfig
from skymask_gpu.federation.rules import RULES
from skymask_gpu.federation.rules.interface import clients_per_malicious
from skymask_gpu.federation.tables import Table, applied, as_table, dotted, merged, read_table
from skymask_gpu.federation.tracking import TrackingConfig
from skymask_gpu.federation.transforms import TransformConfig

__all__ = ["DataConfig", "DefenceConfig", "ModelConfig", "RunConfig", "read_config", "read_grid", "read_toml"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """``[data]``: the data set, how it is shared among the clients, and the server's root data set.

    Attributes:
        dataset: the data set's name.
        data_dir: the folder with its standard files.
        clients: the number of clients.
        partition: how samples are shared out among the clients.
        bias: q of partition ``"bias"`` (Fang et al. 2020); one over the number of classes is IID.
        alpha: the concentration of partition ``"dirichlet"``; the smaller it is, the more clients
            differ.
        root_samples: the size of the root data set, which is drawn from the training data.
        root_bias: the share of the first class in it; 0 means equal shares of all classes.

    Example:
        >>> data = DataConfig(dataset="digits", clients=20, partition="dirichlet", alpha=0.1)
        >>> data.root_samples
        100
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
    """``[model]``: the network, by name, or as ``file.py:Class``.

    Attributes:
        name: key of :data:`~skymask_gpu.federation.models.MODELS`, or a class of the user's own,
            which is called without arguments.

    Example:
        >>> ModelConfig(name="cnn")
        ModelConfig(name='cnn')
    """

    name: str = "mlp"

    def __post_init__(self) -> None:
        if ".py:" not in self.name:
            one_of("model.name", self.name, MODELS)


@dataclass(frozen=True, kw_only=True)
class DefenceConfig(Choice):
    """``[defence]``: the aggregation rule.

    Attributes:
        rule: key of :data:`~skymask_gpu.federation.rules.RULES`.
        assumed_malicious: the number of malicious clients that the rule assumes (f of Krum and
            others); -1 means the true number.
        settings: the rule's own keys; None means their defaults.

    Example:
        >>> DefenceConfig(rule="multi-krum", assumed_malicious=4).settings is not None
        True
    """

    registry: ClassVar[Choices] = RULES
    key: ClassVar[str] = "rule"
    table: ClassVar[str] = "defence"

    rule: str = "skymask"
    assumed_malicious: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assumed_malicious < -1:
            raise ValueError(f"defence.assumed_malicious must be at least -1, got {self.assumed_malicious}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One federated run.

    Attributes:
        name: the name of the run, and of its folder if the file has several runs.
        seed: the seed of everything that is random.
        rounds: the number of rounds.
        server_lr: the server adds this times the aggregated update.
        clients_per_round: the number of clients that take part in a round, drawn anew each time; 0
            means all.
        checkpoint_every: the number of rounds from one checkpoint to the next; a stopped run goes
            on from the last one.
        evaluate_every: the number of rounds from one test of the global model to the next; the
            last round is always tested.
        start: the checkpoint of another run, an absolute path, from whose global model this run
            starts; empty means a fresh model.
        plugins: absolute paths of Python files that register attacks, rules, transforms, models or
            data sets.
        transforms: what clients do to their updates before they send them, in this order.
        privacy: what they do to them after that, to hide their data.
        tracking: who follows the run, such as TensorBoard.

    Example:
        >>> run = RunConfig(rounds=2, defence=DefenceConfig(rule="median"))
        >>> run.to_dict()["defence"]["rule"]
        'median'
        >>> RunConfig.from_dict(run.to_dict()) == run
        True
    """

    name: str = "run"
    seed: int = 0
    rounds: int = 10
    server_lr: float = 1.0
    clients_per_round: int = 0
    checkpoint_every: int = 1
    evaluate_every: int = 1
    start: str = ""
    plugins: tuple[str, ...] = ()
    transforms: tuple[TransformConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalTraining = field(default_factory=LocalTraining)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

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
        if self.attack.share > 0 and self.attack.first_round >= self.rounds:
            raise ValueError(
                f"attack.first_round must be below rounds = {self.rounds}, since rounds count from 0 and the attack would "
                f"never strike, got {self.attack.first_round}; take an earlier first_round, more rounds, or attack.name 'none'"
            )
        self._check_assumed_malicious()
        # What does not fit raises an error now, not after the first round.
        self.attack.num_malicious(self.data.clients)

    def _check_assumed_malicious(self) -> None:
        """Refuse an assumed f for which the rule is not defined. The true number may be larger."""
        clients, f, rule = self.clients_per_round or self.data.clients, self.defence.assumed_malicious, self.defence.rule
        factor = clients_per_malicious(rule)
        if factor is not None and f > 0 and clients < factor * f + 3:
            raise ValueError(
                f"defence.assumed_malicious must be at most {max(0, (clients - 3) // factor)} for defence.rule {rule!r} and "
                f"{clients} clients a round (n >= {factor} f + 3), got {f}; take fewer, or -1 for as many as there are"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as nested tables that JSON can hold."""
        return as_table(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "RunConfig":
        """Make the run of which :meth:`to_dict` made this table.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        load_plugins(table.get("plugins", []))
        return read_table(cls, table, "a run's settings")


def read_config(path: Path, changes: Sequence[str] = ()) -> list[RunConfig]:
    """The runs of a TOML file: one, or one for each ``[[variants]]`` table.

    A variant has a name and overrides keys of the file. Where variants have several attacks or
    rules, settings that only some of them have apply to these.

    Args:
        path: the file.
        changes: settings that replace those of the file, each as ``"key=value"``; see
            :func:`~skymask_gpu.federation.changes.changed`.

    Raises:
        ValueError: no such file, no TOML, an unknown key, or a value out of range.
    """
    content = read_toml(path, changes)
    if "grid" in content:
        raise ValueError(f"config: {path} has a [grid] table; play it with: skymask-gpu sweep {path}")
    contents = _variants(content, path)
    _apply(contents, _variants(read_toml(path), path) if changes else [], changes, path)
    runs = [read_table(RunConfig, one, str(path)) for one in contents]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"config: {path}: the names of the variants must differ, got {', '.join(names)}")
    return runs


def _variants(content: Table, path: Path) -> list[Table]:
    """The tables of each run of a file without a grid."""
    content = dict(content)
    variants = content.pop("variants", None)
    if variants is None:
        return [{"name": path.stem, **content}]
    if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) and v.get("name") for v in variants):
        raise ValueError(f"config: {path}: variants must be [[variants]] tables, each with a name")
    return [merged(content, variant) for variant in variants]


def _apply(contents: list[Table], before: list[Table], changes: Sequence[str], path: Path) -> list[set[str]]:
    """Take settings out of those runs whose attack or rule does not have them, see ``applied``.

    What the file chose ``before`` the changes counts as well: whoever chooses another attack on the
    command line need not know the settings of the file's own.

    Raises:
        ValueError: no run chooses what has the setting that a change names.
    """
    keys = changed_keys(changes)
    for number, content in enumerate(contents):
        attack = content.get("attack")
        # As in a grid: nobody attacks, so there is no share of attackers.
        if "attack.name" in keys and "attack.share" not in keys and isinstance(attack, dict) and attack["name"] == "none":
            contents[number] = merged(content, {"attack": {"share": 0.0}})
    dropped = applied(RunConfig, [*before, *contents], str(path))[len(before) :]
    for key in keys:
        if all(key in one for one in dropped):
            raise ValueError(f"--set {key}: no run of {path} chooses an attack, a rule or an obfuscation that has it")
    return dropped


def read_grid(path: Path, changes: Sequence[str] = ()) -> list[RunConfig]:
    """The runs of a sweep: every combination of the lists in the file's ``[grid]`` table.

    The keys are dotted keys of a run. A table of a run is a key, too, so that some of its keys
    change together: ``privacy = [{obfuscation = "mask", strength = 0.9}]``. The settings of an
    attack or a rule apply only to the cells that have it, and cells that are then the same are
    played once. With attack ``"none"`` the share of attackers is 0, so that several shares give one
    such run.

    Args:
        path: the file.
        changes: as for :func:`read_config`.

    Raises:
        ValueError: as for :func:`read_config`, or there is no grid.
    """
    cells, choices = _combinations(read_toml(path, changes), path)
    before = _combinations(read_toml(path), path)[0] if changes else []
    runs: dict[str, RunConfig] = {}
    for cell, chosen, dropped in zip(cells, choices, _apply(cells, before, changes, path), strict=True):
        own = {key: value for key, value in dotted(chosen).items() if key not in dropped}
        run = read_table(RunConfig, {**cell, "name": cell_name(own)}, str(path))
        if runs.get(run.name, run) != run:
            run = replace(run, name=with_hash(run.name, own))
        runs[run.name] = run
    return list(runs.values())


def _combinations(content: Table, path: Path) -> tuple[list[Table], list[Table]]:
    """The tables of each cell of a grid, and what the cell chooses of the grid, by dotted key."""
    content = dict(content)
    grid = content.pop("grid", None)
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f'config: {path} must have a [grid] table of lists, as "attack.name" = ["min-max", "trim"]')
    for key, values in grid.items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise ValueError(f"config: {path}: grid.{key} must be a list of different values, got {values!r}")
    choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    cells = []
    for chosen in choices:
        cell = content
        for key, value in chosen.items():
            cell = merged(cell, functools.reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), value))
        attack = cell.get("attack", {})
        if isinstance(attack, dict) and attack.get("name", "none") == "none":
            cell = merged(cell, {"attack": {"share": 0.0}})
            chosen.pop("attack.share", None)
        cells.append(cell)
    return cells, choices


def read_toml(path: Path, changes: Sequence[str] = ()) -> Table:
    """Read the tables of a TOML file, make its plugins' paths absolute, and import the plugins.

    ``changes`` of the command line, each as ``"key=value"``, replace settings of the file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"config: no file {path}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} is no TOML: {error}") from error
    content = changed(content, changes, str(path))
    plugins = content.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise ValueError(f"config: {path}: plugins must be a list of strings, got {plugins!r}")
    variants, grid = content.get("variants"), content.get("grid")
    inner = [*(variants if isinstance(variants, list) else []), grid]
    if any(isinstance(table, dict) and "plugins" in table for table in inner):
        raise ValueError(f"config: {path}: plugins must stand at the top of the file, not in [[variants]] or [grid]")
    content["plugins"] = [str((path.parent / plugin).resolve()) for plugin in plugins]
    for table in (content, *inner):
        start = table.get("start") if isinstance(table, dict) else None
        if isinstance(start, str) and start:
            table["start"] = str((path.parent / start).resolve())
        elif isinstance(start, list):
            table["start"] = [str((path.parent / one).resolve()) if isinstance(one, str) and one else one for one in start]
    load_plugins(content["plugins"])
    return content
