"""Runs sorted into blocks, as in the tables of papers.

There is one block per setting, with one row per attack and one column per rule; a cell holds the
runs of all seeds. Two runs share a cell only if nothing differs between them but the seed and what
cannot change a result. If an ``attack.*`` key differs, they are in two rows; if a ``defence.*`` key
differs, in two columns; if any other key differs, in two blocks. Each is labelled by the keys that
differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from skymask_gpu.report.summary import FinishedRun, flat_settings

__all__ = ["Block", "Sweep", "arrange", "differing_keys", "sort_key"]

# The keys of [data] that each kind of partition reads.
_PARTITION_KEYS = {"bias": ("data.bias",), "dirichlet": ("data.alpha",), "iid": (), "subject": ()}
_ANY_PARTITION = ("data.bias", "data.alpha")
_HEAD = ("data.dataset", "model.name", "data.partition", *_ANY_PARTITION, "data.clients")
_SHARE = "attack.share"
# The folder of a run, where folders are compared: no setting, but it parts columns like one.
_ORIGIN = "defence.folder"
# Keys that cannot change a result.
_NO_SETTINGS = ("name", "seed", "checkpoint_every", "evaluate_every", "plugins", "data.data_dir")


@dataclass(frozen=True)
class Block:
    """Runs that differ in attack, rule and seed only.

    Attributes:
        values: the settings that tell blocks apart, by dotted key; ``attack.share`` is None if
            nobody attacks.
        labels: the same settings for people to read, in the order in which a title names them.
        cells: (attack, rule) -> runs in the order of their seeds, each seed once.
    """

    values: dict[str, Any]
    labels: dict[str, str]
    cells: dict[tuple[str, str], list[FinishedRun]]

    @property
    def attacks(self) -> list[str]:
        """The rows, "none" first."""
        return sorted({attack for attack, _ in self.cells}, key=lambda name: (name != "none", name))

    @property
    def rules(self) -> list[str]:
        """The columns, plain averaging first and SkyMask last."""
        return sorted({rule for _, rule in self.cells}, key=rule_order)

    @property
    def title(self) -> str:
        return ", ".join(self.labels.values())


@dataclass(frozen=True)
class Sweep:
    """The blocks, and the name of each run that is in none of them, with the reason."""

    blocks: list[Block]
    left_out: list[tuple[str, str]]


def arrange(runs: list[FinishedRun]) -> Sweep:
    """Sort the complete runs into blocks; a run without attackers is in those of all shares."""
    left_out = [(r.name, f"{r.rounds_done} of {r.rounds} rounds") for r in runs if not r.is_complete]
    complete = [run for run in runs if run.is_complete]
    settings = [_settings(run) for run in complete]
    shown = [
        *_HEAD,
        *(key for key in differing_keys(settings) if not key.startswith(("attack.", "defence.")) and key not in _HEAD),
    ]
    attacks, rules = _variants(settings, "attack.", "name"), _variants(settings, "defence.", "rule")

    shares: dict[tuple[Any, ...], set[Any]] = {}
    for flat in settings:
        if flat.get("attack.name", "none") != "none":
            shares.setdefault(_pick(flat, shown), set()).add(flat.get(_SHARE))
    cells: dict[tuple[Any, ...], dict[tuple[str, str], dict[int, FinishedRun]]] = {}
    for run, flat, attack, rule in zip(complete, settings, attacks, rules, strict=True):
        key = _pick(flat, shown)
        for share in shares.get(key, {None}) if attack == "none" else {flat.get(_SHARE)}:
            seeds = cells.setdefault((*key, share), {}).setdefault((attack, rule), {})
            first = seeds.setdefault(run.seed, run)
        if first is not run:
            left_out.append((run.name, f"same settings and seed as {first.name}"))
    blocks = []
    for values in sorted(cells, key=lambda values: [sort_key(value) for value in values]):
        by_key = dict(zip((*shown, _SHARE), values, strict=True))
        by_cell = {cell: [seeds[seed] for seed in sorted(seeds)] for cell, seeds in cells[values].items()}
        blocks.append(Block(by_key, _labels(by_key), by_cell))
    return Sweep(blocks, left_out)


def differing_keys(settings: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all runs; a missing key counts as None.

    A key that only some attacks or rules have differs only if its values do.

    Example:
        >>> differing_keys([{"seed": 1, "rounds": 5}, {"seed": 2, "rounds": 5}])
        ['seed']
    """

    def values(key: str) -> set[Any]:
        own = key.startswith(("attack.", "defence."))
        return {flat.get(key) for flat in settings if key in flat or not own}

    return [key for key in sorted({key for flat in settings for key in flat}) if len(values(key)) > 1]


def rule_order(rule: str) -> tuple[int, str]:
    """The sort key of rules: plain averaging comes first and SkyMask last, as in papers."""
    name = rule.split(" ")[0]
    return (0 if name == "fedavg" else 2 if name == "skymask" else 1, rule)


def sort_key(value: Any) -> tuple[int, float, str]:
    """The sort key of settings: numbers come first, then text, then settings that are not given."""
    if value is None:
        return (2, 0, "")
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))


def _settings(run: FinishedRun) -> dict[str, Any]:
    """The settings that can change the run's result."""
    flat = {
        key: value
        for key, value in flat_settings(run.config).items()
        if key not in _NO_SETTINGS and not key.startswith("tracking.")
    }
    # Runs of several folders are compared in columns side by side.
    if run.origin:
        flat[_ORIGIN] = run.origin
    read = _PARTITION_KEYS.get(flat.get("data.partition", ""), _ANY_PARTITION)
    unread = {key for key in _ANY_PARTITION if key not in read}
    if flat.get("attack.name", "none") == "none":
        unread |= {key for key in flat if key.startswith("attack.") and key != "attack.name"}
    return {key: value for key, value in flat.items() if key not in unread}


def _variants(settings: list[dict[str, Any]], table: str, name: str) -> list[str]:
    """Each run's attack or rule, followed by the settings in which runs of the same name differ."""
    names = [str(flat.get(table + name, "none")) for flat in settings]
    differing = {
        one: [
            key
            for key in differing_keys([flat for flat, other in zip(settings, names, strict=True) if other == one])
            if key.startswith(table) and key != _SHARE
        ]
        for one in set(names)
    }
    labels = []
    for flat, one in zip(settings, names, strict=True):
        variant = ", ".join(f"{key.removeprefix(table)}={_shown(flat.get(key))}" for key in differing[one])
        labels.append(f"{one} ({variant})" if variant else one)
    return labels


def _labels(values: dict[str, Any]) -> dict[str, str]:
    """The parts of a block's title, by dotted key."""
    partition = [_shown(values[key]) for key in ("data.partition", *_ANY_PARTITION) if values[key] is not None]
    labels = {key: _shown(values[key]) for key in ("data.dataset", "model.name")}
    labels["data.partition"] = " ".join(partition) or "partition not given"
    labels["data.clients"] = f"{_shown(values['data.clients'])} clients"
    share = values[_SHARE]
    labels[_SHARE] = "no attackers" if share is None else f"{100 * share:g}% attackers"
    labels.update({key: f"{key} = {_shown(value)}" for key, value in values.items() if key not in (*_HEAD, _SHARE)})
    return labels


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _pick(flat: dict[str, Any], keys: Iterable[str]) -> tuple[Any, ...]:
    return tuple(flat.get(key) for key in keys)
