"""The TOML file of an arena, and the runs that it asks for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.board.config import (
    Recipe,
    RecipesFile,
    all_differ,
    read_attacks,
    read_recipes,
    usable_label,
)
from skymask_gpu.federation.config import DefenceConfig, RunConfig, read_toml
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.federation.run_folder import CHECKPOINT
from skymask_gpu.federation.sweep import cell_folder, shard_of
from skymask_gpu.federation.tables import read_table

__all__ = ["EARLY", "NO_ATTACK", "TRAINED", "Arena", "Key", "Part", "read_arena"]

EARLY, TRAINED = "early", "trained"
NO_ATTACK = "none"


@dataclass(frozen=True, order=True)
class Key:
    """What names a run of the arena.

    Attributes:
        recipe: the name of its recipe: the data, the model and the local training.
        start: ``"early"``, from a fresh model, or ``"trained"``, from that of the warm-up.
        share: the share of clients that attack; 0 without attack.
        attack: the label of the attack; ``"none"`` without.
        rule: the label of the rule.
        seed: its seed.
    """

    recipe: str
    start: str
    share: float
    attack: str
    rule: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its cell."""
        attackers = f" {100 * self.share:g}%" if self.share else ""
        return f"{self.recipe},{self.start},{self.attack}{attackers},{self.rule},seed={self.seed}"


@dataclass(frozen=True)
class Part:
    """The starts, and the labels of the attacks and rules, that a recipe is played with."""

    starts: tuple[str, ...]
    attacks: tuple[str, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Arena:
    """What an arena's file asks for.

    Attributes:
        recipes: the run of each recipe by name, without attack, with the arena's first seed.
        pairs: the recipes and seeds that are played; of a shard, only its own.
        warmup_rounds: the number of rounds without attackers before a trained start.
        attacks: the attacks by share of attackers and by label.
        rules: the rules by label.
        parts: the starts, attacks and rules that each recipe is played with.
    """

    recipes: dict[str, RunConfig]
    pairs: tuple[tuple[str, int], ...]
    warmup_rounds: int
    attacks: dict[float, dict[str, AttackConfig]]
    rules: dict[str, DefenceConfig]
    parts: dict[str, "Part"]

    def warm_ups(self) -> list[RunConfig]:
        """The runs whose models trained runs start from, one per recipe and seed."""
        return [self._warm_up(recipe, seed) for recipe, seed in self.pairs if TRAINED in self.parts[recipe].starts]

    def cells(self) -> Iterator[Key]:
        """All runs but the warm-ups, in the order in which they are played."""
        for recipe, seed in self.pairs:
            part = self.parts[recipe]
            for start in part.starts:
                for rule in part.rules:
                    yield Key(recipe, start, 0.0, NO_ATTACK, rule, seed)
                for share in self.attacks:
                    yield from (Key(recipe, start, share, attack, rule, seed) for attack in part.attacks for rule in part.rules)

    def runs(self, folder: Path) -> list[RunConfig]:
        """The runs of :meth:`cells`, in the arena's ``folder``."""
        return [self.run_of(key, folder) for key in self.cells()]

    def run_of(self, key: Key, folder: Path) -> RunConfig:
        """The run of a key, in the arena's ``folder``."""
        start = ""
        if key.start == TRAINED:
            start = str((cell_folder(folder, self._warm_up(key.recipe, key.seed)) / CHECKPOINT).resolve())
        attack = self.attacks[key.share][key.attack] if key.share else AttackConfig()
        recipe = self.recipes[key.recipe]
        return replace(recipe, name=key.name, seed=key.seed, start=start, attack=attack, defence=self.rules[key.rule])

    def shard(self, shard: str) -> "Arena":
        """The part of the arena that one of several machines plays: some recipes and seeds.

        Raises:
            ValueError: ``shard`` is not of the form ``i/n`` with i from 1 to n.
        """
        names = [replace(self.recipes[recipe], name=f"{recipe},{seed}") for recipe, seed in self.pairs]
        own = {run.name for run in shard_of(names, shard)}
        return replace(self, pairs=tuple(pair for pair in self.pairs if f"{pair[0]},{pair[1]}" in own))

    def with_data(self, data_dir: Path | None) -> tuple["Arena", list[str]]:
        """The arena with its files in ``data_dir``, and the recipes that it must leave out.

        If there is no folder, these are the recipes whose data set needs one.

        Raises:
            ValueError: no recipe is left.
        """
        recipes = self.recipes
        if data_dir is not None:
            recipes = {name: replace(run, data=replace(run.data, data_dir=str(data_dir))) for name, run in recipes.items()}
        left_out = [name for name, run in recipes.items() if DATASETS[run.data.dataset].files and not run.data.data_dir]
        if len(left_out) == len(recipes):
            raise ValueError(
                f"--data-dir must be given: each recipe of the arena needs a data set's files, got {', '.join(recipes)}"
            )
        pairs = tuple(pair for pair in self.pairs if pair[0] not in left_out)
        kept = {name: run for name, run in recipes.items() if name not in left_out}
        return replace(self, recipes=kept, pairs=pairs), left_out

    def _warm_up(self, recipe: str, seed: int) -> RunConfig:
        rounds = self.warmup_rounds
        return replace(
            self.recipes[recipe],
            name=f"{recipe},warm-up,seed={seed}",
            seed=seed,
            rounds=rounds,
            evaluate_every=rounds,
            # A checkpoint from the middle must not be taken for the trained model.
            checkpoint_every=rounds,
            defence=DefenceConfig(rule="fedavg"),
        )


@dataclass(frozen=True, kw_only=True)
class _Recipe(Recipe):
    """``[[recipes]]``, and the part of the arena that it is played in; an empty list means all."""

    starts: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _File(RecipesFile):
    """The keys of an arena's file."""

    recipes: tuple[_Recipe, ...]
    rules: tuple[dict | str, ...]
    shares: tuple[float, ...] = (0.1, 0.2, 0.5, 0.8)
    starts: tuple[str, ...] = (EARLY, TRAINED)
    rounds: int = 10
    warmup_rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rules", "shares", "starts"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("rounds", "warmup_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for share in self.shares:
            if not 0 < share < 1:
                raise ValueError(f"shares must be above 0 and below 1, got {share!r}; runs without attack are always played")
        for start in self.starts:
            one_of("starts", start, (EARLY, TRAINED))
        all_differ("shares", self.shares)
        all_differ("starts", self.starts)


def read_arena(path: Path, changes: Sequence[str] = ()) -> Arena:
    """Read the arena of a TOML file, after importing its plugins.

    ``changes`` of the command line, each as ``"key=value"``, replace settings of the file.

    Raises:
        ValueError: no such file, no TOML, an unknown key, a name given twice, or a value out of
            range.
    """
    content, source = read_toml(path, changes), str(path)
    file: _File = read_table(_File, content, source)
    # Only the last model is tested: the score is that of the end.
    recipes = read_recipes(file, content, path, rounds=file.rounds, evaluate_every=file.rounds)
    for number, table in enumerate(file.attacks):
        if "shares" in table or table.get("name") == NO_ATTACK:
            what = "shares: the arena's own shares are those of all attacks" if "shares" in table else "name must not be 'none'"
            raise ValueError(f"config: {source}: attacks[{number}].{what}; runs without attack are always played")
    tables = {share: tuple({**table, "shares": [share]} for table in file.attacks) for share in file.shares}
    attacks = {share: read_attacks(own, source) for share, own in tables.items()}
    rules = _rules(file.rules, source)
    known = {"starts": file.starts, "attacks": tuple(attacks[file.shares[0]]), "rules": tuple(rules)}
    for what, labels in (("recipe", recipes), ("attack", known["attacks"]), ("rule", rules)):
        for label in labels:
            if "," in label:
                raise ValueError(f"config: {source}: the name of {what} {label!r} must have no comma")
    pairs = tuple((recipe, seed) for recipe in recipes for seed in file.seeds)
    parts = {recipe.name: _part(recipe, known, source) for recipe in file.recipes}
    arena = Arena(recipes, pairs, file.warmup_rounds, attacks, rules, parts)
    # A seed, a share or an f that does not fit the clients is refused now, not in the middle.
    arena.runs(Path())
    return arena


def _part(recipe: _Recipe, known: dict[str, tuple[str, ...]], source: str) -> Part:
    """What a recipe is played with, in the order of the arena."""
    chosen = {}
    for name, labels in known.items():
        wanted = getattr(recipe, name) or labels
        for one in wanted:
            one_of(f"config: {source}: {name} of recipe {recipe.name!r}", one, labels)
        chosen[name] = tuple(label for label in labels if label in wanted)
    return Part(**chosen)


def _rules(entries: tuple[dict[str, Any] | str, ...], source: str) -> dict[str, DefenceConfig]:
    """The rules by label, from names or tables."""
    labelled: list[tuple[str, DefenceConfig]] = []
    for number, entry in enumerate(entries):
        table = {"rule": entry} if isinstance(entry, str) else dict(entry)
        if not isinstance(table.get("rule"), str):
            raise ValueError(f"config: {source}: rules[{number}].rule must be given, as a string, got {table.get('rule')!r}")
        label = table.pop("label", table["rule"])
        usable_label(f"config: {source}: rules[{number}]", label)
        labelled.append((label, read_table(DefenceConfig, table, source, f"rules[{number}].")))
    all_differ(f"config: {source}: the labels of rules (label = ..., or the rule)", [label for label, _ in labelled])
    return dict(labelled)
