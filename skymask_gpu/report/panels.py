"""What the report's pictures show: which runs and attacks get a panel, and the numbers in it.

Nothing is drawn here; ``plots.py`` draws. The limits keep a picture readable. Whatever is beyond
them is in the tables, and a note below the picture says how much that is.
"""

import statistics
from dataclasses import dataclass
from typing import Literal

from skymask_gpu.federation.run_folder import MASKS
from skymask_gpu.io.files import read_tensors
from skymask_gpu.report.summary import FinishedRun
from skymask_gpu.report.sweep import Block, Sweep

__all__ = [
    "RATES",
    "Axis",
    "RatePanels",
    "RoundPanels",
    "accuracy_by_round",
    "axis_values",
    "few_runs",
    "mask_panels",
    "needs_panels",
    "rate_panels",
    "rate_points",
    "round_panels",
]

Axis = Literal["share", "clients"]

# The rates of a verdict, by the name that a picture gives them.
RATES = {"FPR": "false_positive_rate", "FNR": "false_negative_rate"}

# The setting on each horizontal axis, and what one of the setting is on it.
_SETTINGS: dict[Axis, tuple[str, float]] = {"share": ("attack.share", 100), "clients": ("data.clients", 1)}

# The most runs that one panel shows, each in a colour of its own.
_RUNS_BY_COLOUR = 6
# The most panels of the picture by round.
_PANELS = 16
# The most columns (attacks) and pairs of rows (settings) of a picture of rates.
_RATE_ATTACKS = 6
_RATE_SETTINGS = 3
# The most panels of a picture of masks.
_MASK_PANELS = 6


@dataclass(frozen=True)
class RoundPanels:
    """The panels of the picture "accuracy by round".

    Attributes:
        shown: a title, a block and an attack for each panel. Attack "none" has one panel for all
            shares.
        common: what all blocks have in common, as labels.
        repeated: whether a panel shows more than one seed.
        left_out: a note on the panels that are not shown; empty if all are.
    """

    shown: list[tuple[str, Block, str]]
    common: list[str]
    repeated: bool
    left_out: str

    @property
    def rules(self) -> set[str]:
        return {rule for _, block, _ in self.shown for rule in block.rules}


@dataclass(frozen=True)
class RatePanels:
    """The panels of a picture of FPR and FNR: a pair of rows per setting, a column per attack.

    Attributes:
        axis: what is on the horizontal axis.
        settings: for each pair of rows its title, and its blocks, which differ on the axis only.
        attacks: the columns.
        rules: the rules that judge clients.
        left_out: a note on the settings and attacks that are not shown; empty if all are.
    """

    axis: Axis
    settings: list[tuple[str, list[Block]]]
    attacks: list[str]
    rules: set[str]
    left_out: str


def needs_panels(runs: list[FinishedRun], sweep: Sweep) -> bool:
    """Whether the runs need one panel per attack.

    They do if they are too many for one panel, or if some of them differ in the seed only.
    """
    repeated = any(len(seeds) > 1 for block in sweep.blocks for seeds in block.cells.values())
    return bool(sweep.blocks) and (repeated or len(runs) > _RUNS_BY_COLOUR)


def round_panels(sweep: Sweep) -> RoundPanels:
    """One panel per block and attack, titled by the attack and by what differs between blocks."""
    names = {key for block in sweep.blocks for key in block.labels}
    differing = [key for key in names if len({block.labels.get(key) for block in sweep.blocks}) > 1]
    panels: dict[str, tuple[Block, str]] = {}
    for block in sweep.blocks:
        for attack in block.attacks:
            parts = [
                text for key, text in block.labels.items() if key in differing and (key, attack) != ("attack.share", "none")
            ]
            panels.setdefault("\n".join(filter(None, [attack, ", ".join(parts)])), (block, attack))
    shown = [(title, block, attack) for title, (block, attack) in list(panels.items())[:_PANELS]]
    common = [text for key, text in sweep.blocks[0].labels.items() if key not in differing]
    repeated = any(len(seeds) > 1 for _, block, _ in shown for seeds in block.cells.values())
    return RoundPanels(shown, common, repeated, _left_out(len(panels) - len(shown), "panel"))


def accuracy_by_round(block: Block, attack: str, rule: str) -> tuple[list[int], list[float], list[float]]:
    """Rounds, means and sample standard deviations of the accuracy in percent, over the seeds.

    Only rounds that all seeds evaluated are there. With one seed there are no deviations.
    """
    runs = block.cells.get((attack, rule), [])
    by_round: dict[int, list[float]] = {}
    for run in runs:
        for record in run.records:
            if record.get("accuracy") is not None:
                by_round.setdefault(record["round"] + 1, []).append(100 * record["accuracy"])
    rounds = [number for number in sorted(by_round) if len(by_round[number]) == len(runs)]
    means = [statistics.fmean(by_round[number]) for number in rounds]
    spreads = [statistics.stdev(by_round[number]) for number in rounds] if len(runs) > 1 else []
    return rounds, means, spreads


def rate_panels(sweep: Sweep, axis: Axis) -> RatePanels | None:
    """The panels of a picture of rates.

    None if no setting has two values on the axis, or if no rule judges clients.
    """
    key, _ = _SETTINGS[axis]
    settings: dict[str, list[Block]] = {}
    for block in sweep.blocks:
        if block.values["attack.share"] is not None and block.values[key] is not None:
            title = ", ".join(text for name, text in block.labels.items() if name != key)
            settings.setdefault(title, []).append(block)
    settings = {title: blocks for title, blocks in settings.items() if len(blocks) > 1}
    judging = {rule for blocks in settings.values() for block in blocks for rule in block.rules if _judges(block, rule)}
    if not judging:
        return None
    attacks = sorted({attack for blocks in settings.values() for block in blocks for attack in block.attacks} - {"none"})
    shown, columns = list(settings.items())[:_RATE_SETTINGS], attacks[:_RATE_ATTACKS]
    left_out = _left_out(len(settings) - len(shown), "setting") + _left_out(len(attacks) - len(columns), "attack")
    return RatePanels(axis, shown, columns, judging, left_out)


def rate_points(blocks: list[Block], axis: Axis, attack: str, kind: str) -> dict[str, list[tuple[float, float]]]:
    """For each rule, the points (place on the axis, rate in percent) of one panel.

    ``kind`` is a key of ``RATES``.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for block, place in zip(blocks, axis_values(blocks, axis), strict=True):
        for rule in block.rules:
            rates = [mean for run in block.cells.get((attack, rule), []) if (mean := run.mean_rate(RATES[kind])) is not None]
            if rates:
                points.setdefault(rule, []).append((place, 100 * statistics.fmean(rates)))
    return points


def axis_values(blocks: list[Block], axis: Axis) -> list[float]:
    """Each block's place on the axis: its share of attackers in percent, or number of clients."""
    key, unit = _SETTINGS[axis]
    return [unit * block.values[key] for block in blocks]


def mask_panels(runs: list[FinishedRun], needed: set[str]) -> tuple[list[FinishedRun], int]:
    """The runs that a picture of masks shows, and the number of runs that have what it needs.

    If they are too many, there is one run per attack, that of the lowest seed. ``needed`` are the
    names of the tensors. Rules other than SkyMask may store others, and so did older versions.
    """
    masked = [run for run in runs if _stored(run) >= needed]
    return few_runs(masked), len(masked)


def few_runs(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The runs; if they are too many for a picture, one per attack, that of the lowest seed."""
    if len(runs) <= _MASK_PANELS:
        return runs
    first: dict[str, FinishedRun] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        first.setdefault(str(run.config.get("attack", {}).get("name")), run)
    return [first[attack] for attack in sorted(first)][:_MASK_PANELS]


def _stored(run: FinishedRun) -> set[str]:
    """The names of the tensors that the run's rule stored."""
    path = run.folder / MASKS
    return set(read_tensors(path)[0]) if path.exists() else set()


def _judges(block: Block, rule: str) -> bool:
    """Whether the rule says which clients it keeps."""
    runs = [run for (_, other), seeds in block.cells.items() if other == rule for run in seeds]
    return any(run.mean_rate(rate) is not None for run in runs for rate in RATES.values())


def _left_out(count: int, what: str) -> str:
    return f"{count} more {what}{'s' if count > 1 else ''} in the tables. " if count > 0 else ""
