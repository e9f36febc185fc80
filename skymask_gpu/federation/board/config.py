"""The TOML file of a board: a run's tables, with several recipes, attacks, rules and rounds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from skymask_gpu.engine import Clustering
from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, ModelConfig, RunConfig, read_toml
from skymask_gpu.federation.rules.skymask import SkyMaskSettings
from skymask_gpu.federation.tables import Table, as_table, merged, read_table
from skymask_gpu.federation.transforms import TransformConfig

__all__ = [
    "CLUSTERINGS",
    "Board",
    "Recipe",
    "RecipesFile",
    "SetKey",
    "Trajectories",
    "all_differ",
    "name_of",
    "read_attacks",
    "read_board",
    "read_recipes",
    "usable_label",
]

CLUSTERINGS: tuple[str, ...] = get_args(get_type_hints(Clustering)["rule"])
# The tables that a run's file may have, too. They hold for all recipes that say nothing else.
_OF_A_RUN = ("server_lr", "plugins", "transforms", "data", "model", "local")
_SHARE = 0.2


@dataclass(frozen=True, order=True)
class SetKey:
    """What names a mask set: a recipe, a seed, an attack's label, and a round (0 is the first)."""

    recipe: str
    seed: int
    attack: str
    round: int

    @property
    def file_name(self) -> str:
        return f"{self.recipe}.{self.seed}.{self.attack}.{self.round}.safetensors"


def name_of(clustering: str) -> str:
    """The name of one of SkyMask's rules in the table."""
    return f"skymask {clustering}"


@dataclass(frozen=True)
class Trajectories:
    """Whole runs that the board plays, each with one rule under one attack.

    Attributes:
        rounds: the number of rounds of each run.
        recipes: the names of the recipes.
        attacks: the labels of the attacks.
        rules: the rules, by their names in the table.
    """

    rounds: int
    recipes: tuple[str, ...]
    attacks: tuple[str, ...]
    rules: dict[str, DefenceConfig]


@dataclass(frozen=True)
class Board:
    """What a board's file asks for.

    Attributes:
        recipes: the run of honest clients of each recipe, by name, with the board's first seed.
        seeds: each recipe is trained once with each of these seeds.
        rounds: the rounds in which the attacks strike; 0 is the first.
        attacks: the attacks, by label.
        clusterings: SkyMask's rules.
        rules: other aggregation rules.
        trajectories: whole runs that are also played; None if the file asks for none.
    """

    recipes: dict[str, RunConfig]
    seeds: tuple[int, ...]
    rounds: tuple[int, ...]
    attacks: dict[str, AttackConfig]
    clusterings: tuple[str, ...]
    rules: tuple[DefenceConfig, ...]
    trajectories: Trajectories | None = None

    def runs(self) -> list[RunConfig]:
        """The run of honest clients for each recipe and seed."""
        return [replace(recipe, seed=seed) for recipe in self.recipes.values() for seed in self.seeds]

    def set_keys(self) -> Iterator[SetKey]:
        """All mask sets of the board, in the order in which they are made."""
        for run in self.runs():
            yield from (SetKey(run.name, run.seed, attack, number) for number in self.rounds for attack in self.attacks)

    def run_of(self, key: SetKey) -> RunConfig:
        """The run from which a mask set is taken."""
        return replace(self.recipes[key.recipe], seed=key.seed, attack=self.attacks[key.attack].in_every_round())

    def rule_tables(self) -> dict[str, Table]:
        """The settings of each rule by name, in a form that JSON can hold."""
        return {rule.rule: as_table(rule) for rule in self.rules}

    def with_data(self, data_dir: Path | None) -> "Board":
        """The same board with the data set's files in another folder."""
        if data_dir is None:
            return self
        recipes = {name: replace(run, data=replace(run.data, data_dir=str(data_dir))) for name, run in self.recipes.items()}
        return replace(self, recipes=recipes)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``[[recipes]]``: a name, and keys that differ from the file's."""

    name: str
    data: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Trajectories:
    """``[trajectories]``; 0 rounds mean none, and an empty list means all of the board's."""

    rounds: int = 0
    recipes: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"trajectories.rounds must be at least 0, which means none, got {self.rounds}")
        for name in ("recipes", "attacks", "rules"):
            all_differ(f"trajectories.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RecipesFile:
    """What a file with several recipes and attacks holds: these, and the tables of a run."""

    recipes: tuple[Recipe, ...]
    attacks: tuple[dict, ...]
    seeds: tuple[int, ...] = (0,)
    server_lr: float = 1.0
    plugins: tuple[str, ...] = ()
    transforms: tuple[TransformConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    local: LocalTraining = field(default_factory=LocalTraining)

    def __post_init__(self) -> None:
        for name in ("recipes", "attacks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        all_differ("seeds", self.seeds)
        all_differ("the names of recipes", [recipe.name for recipe in self.recipes])


@dataclass(frozen=True, kw_only=True)
class _File(RecipesFile):
    """The keys of a board's file."""

    rounds: tuple[int, ...] = (1, 4, 9)
    clusterings: tuple[str, ...] = CLUSTERINGS
    rules: tuple[DefenceConfig, ...] = ()
    trajectories: _Trajectories = field(default_factory=_Trajectories)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rounds:
            raise ValueError("rounds must not be empty")
        if min(self.rounds) < 0:
            raise ValueError(f"rounds must be at least 0, which is the first, got {min(self.rounds)}")
        for name in self.clusterings:
            one_of("clusterings", name, CLUSTERINGS)
        if not self.clusterings and not self.rules:
            raise ValueError("clusterings and rules must not both be empty: nothing would judge")
        all_differ("rounds", self.rounds)
        all_differ("clusterings", self.clusterings)
        all_differ("rules", [rule.rule for rule in self.rules])


def read_board(path: Path, changes: Sequence[str] = ()) -> Board:
    """Read the board of a TOML file, after importing its plugins.

    ``changes`` of the command line, each as ``"key=value"``, replace settings of the file.

    Raises:
        ValueError: no such file, no TOML, an unknown key, a name given twice, or a value out of
            range.
    """
    content, source = read_toml(path, changes), str(path)
    file: _File = read_table(_File, content, source)
    recipes = read_recipes(file, content, path, rounds=max(file.rounds) + 1)
    attacks = read_attacks(file.attacks, source)
    # A seed, a share or an f that does not fit the clients is refused now, not in the middle of a
    # run.
    for run in recipes.values():
        for seed in file.seeds:
            replace(run, seed=seed)
        for attack in attacks.values():
            for rule in file.rules:
                replace(run, attack=attack.in_every_round(), defence=rule)
            attack.num_malicious(run.data.clients)
    board = Board(recipes, file.seeds, tuple(sorted(file.rounds)), attacks, file.clusterings, file.rules)
    return board if file.trajectories.rounds == 0 else replace(board, trajectories=_asked_for(file.trajectories, board))


def _asked_for(table: _Trajectories, board: Board) -> Trajectories:
    """The trajectories of the file, by the names of the board's recipes, attacks and rules."""
    skymask = {name_of(one): SkyMaskSettings(clustering=one) for one in board.clusterings}
    rules = {name: DefenceConfig(rule="skymask", settings=settings) for name, settings in skymask.items()}
    rules |= {rule.rule: rule for rule in board.rules}
    chosen = {}
    for name, known in (("recipes", board.recipes), ("attacks", board.attacks), ("rules", rules)):
        chosen[name] = getattr(table, name) or tuple(known)
        for one in chosen[name]:
            one_of(f"trajectories.{name}", one, known)
    return Trajectories(table.rounds, chosen["recipes"], chosen["attacks"], {name: rules[name] for name in chosen["rules"]})


def read_recipes(file: RecipesFile, content: Table, path: Path, **settings: Any) -> dict[str, RunConfig]:
    """The run of each recipe by name, without attack and with the file's first seed.

    Args:
        file: the file, read.
        content: its tables, which a recipe overrides.
        path: where it is, for errors.
        settings: keys that all of these runs have.
    """
    base = {key: content[key] for key in _OF_A_RUN if key in content}
    base |= {"seed": file.seeds[0], **settings}
    recipes = {}
    for recipe in file.recipes:
        if "." in recipe.name:
            raise ValueError(f"config: {path}: the name of a recipe must have no dot, got {recipe.name!r}")
        own = {"name": recipe.name, "data": recipe.data, "model": recipe.model, "local": recipe.local}
        recipes[recipe.name] = read_table(RunConfig, merged(base, own), f"{path}, recipe {recipe.name!r}")
    return recipes


def read_attacks(tables: tuple[Table, ...], source: str) -> dict[str, AttackConfig]:
    """The attacks by label: one for each of a table's ``shares``."""
    labelled: list[tuple[str, AttackConfig]] = []
    for number, table in enumerate(tables):
        where = f"config: {source}: attacks[{number}]"
        if not isinstance(table.get("name"), str):
            raise ValueError(f"{where}.name must be given, as a string, got {table.get('name')!r}")
        if "share" in table:
            raise ValueError(f"{where}.share: write shares = [{table['share']!r}], a list")
        label: Any = table.get("label", table["name"])
        usable_label(where, label)
        shares: Any = table.get("shares", [0.0 if table["name"] == "none" else _SHARE])
        if not isinstance(shares, list) or not shares:
            raise ValueError(f"{where}.shares must be a list of numbers, got {shares!r}")
        own = {key: value for key, value in table.items() if key not in ("label", "shares")}
        for share in shares:
            attack = read_table(AttackConfig, {**own, "share": share}, source, f"attacks[{number}].")
            labelled.append((label if len(shares) == 1 else f"{label} {100 * share:g}%", attack))
    all_differ(f"config: {source}: the labels of attacks (label = ..., or the name)", [label for label, _ in labelled])
    return dict(labelled)


def usable_label(where: str, label: object) -> None:
    """Raise a ValueError unless files can be named after a label."""
    if not isinstance(label, str) or not label or set(label) & set('/\\:*?"<>|') or label.startswith("."):
        raise ValueError(f"{where}.label must be usable as a file's name, got {label!r}")


def all_differ(what: str, values: Any) -> None:
    """Raise a ValueError if a value occurs twice."""
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise ValueError(f"{what} must differ, got {', '.join(twice)} more than once")
