"""An arena's results as ``arena.json``, ``costs.json``, ``arena.md`` and ``arena.html``.

``arena.json`` follows from the file and the seeds, and is the same to the byte whether the arena
was interrupted or not. What a clock and a memory meter say is kept apart from it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skymask_gpu.federation.arena.config import Arena
from skymask_gpu.federation.arena.scoring import AttackLine, Cost, RuleLine, attack_lines, costs, ended, rule_lines
from skymask_gpu.io.files import write_text
from skymask_gpu.io.text_tables import markdown_table
from skymask_gpu.report.html import page

__all__ = ["LEGEND", "RULE_COLUMNS", "Results", "rule_row", "write_arena"]

RULE_COLUMNS = (
    "recipe", "start", "attackers", "rule", "score", "±", "worst attack", "no attack", "± no attack", "FPR, no attack",
    "FPR", "FNR", "runs",
)  # fmt: skip
_ATTACK_COLUMNS = (
    "recipe", "start", "attackers", "attack", "rule", "score", "±", "accuracy", "attack success", "FPR", "FNR", "runs",
)  # fmt: skip
_COST_COLUMNS = ("recipe", "rule", "s/round, rule", "s/round, training", "GB")
# The columns by whose values the page's rows can be filtered.
_CHOICES = ("recipe", "start", "attackers", "attack", "rule", "worst attack")
LEGEND = (
    "Score: the test accuracy of the final model minus, for a backdoor, the attack's success rate. A rule's score is that of "
    "its worst attack: the lowest mean over the seeds. A dash: a run is missing or failed, so that the worst attack is not "
    "known, or there is no such number.",
    "±: half of the 95% interval of a mean over seeds (Student's t). No attack: the accuracy of the same rule without "
    "attackers. FPR: honest clients rejected; FNR: attackers kept; means over the seeds, the attacks and the rounds from the "
    "second on, while the rule itself made every model.",
)
_COST_LEGEND = (
    "Seconds are the mean over all runs of a run's median round. GB is the most memory that the process of a run held, "
    "PyTorch, data and local training included, or on a GPU the most that its tensors held."
)


class Results:
    """What an arena's folder says so far.

    Attributes:
        attacks, rules, costs: the lines of the three tables.
        runs, planned: the number of runs that have ended, and how many there will be.
    """

    def __init__(self, arena: Arena, folder: Path) -> None:
        keys, runs = list(arena.cells()), ended(arena, folder)
        self.attacks: list[AttackLine] = attack_lines(keys, runs)
        self.rules: list[RuleLine] = rule_lines(self.attacks)
        self.costs: list[Cost] = costs(runs)
        self.runs, self.planned = len(runs), len(keys)

    def document(self) -> dict[str, Any]:
        """What ``arena.json`` holds; the same in every repeat."""
        return {
            "runs": self.runs,
            "planned": self.planned,
            "rules": [asdict(line) for line in self.rules],
            "attacks": [asdict(line) for line in self.attacks],
        }


def write_arena(title: str, results: Results, failed: Sequence[tuple[str, str]], folder: Path) -> list[Path]:
    """Write what the arena found so far into ``folder``, each file as a whole.

    Args:
        title: the heading.
        results: what the folder's runs say.
        failed: the name and the error of each run that failed.
        folder: where the files go.
    """
    state = f"{results.runs} of {results.planned} runs have ended."
    rules, attacks, table = map(list, (map(rule_row, results.rules), map(_attack_row, results.attacks), _cost_rows(results)))
    parts = [f"# {title}", state, *LEGEND, markdown_table(RULE_COLUMNS, rules), "## Every attack"]
    parts += [markdown_table(_ATTACK_COLUMNS, attacks), "## Costs", _COST_LEGEND, markdown_table(_COST_COLUMNS, table)]
    if failed:
        parts += ["## Failed runs", "".join(f"* {name}: {why}\n" for name, why in failed)]
    html = page(
        "arena.html.j2", title, {}, state=state, legend=LEGEND, cost_legend=_COST_LEGEND, choices=_CHOICES, failed=failed,
        rule_columns=RULE_COLUMNS, rules=rules, attack_columns=_ATTACK_COLUMNS, attacks=attacks,
        cost_columns=_COST_COLUMNS, costs=table,
    )  # fmt: skip
    contents = {
        "arena.json": json.dumps(results.document(), indent=1) + "\n",
        "costs.json": json.dumps([asdict(line) for line in results.costs], indent=1) + "\n",
        "arena.md": "\n\n".join(part.rstrip("\n") for part in parts) + "\n",
        "arena.html": html,
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def rule_row(line: RuleLine) -> list[str]:
    """A rule's line as texts, in the order of ``RULE_COLUMNS``."""
    shares = (line.unattacked, line.unattacked_interval, line.unattacked_fpr, line.fpr, line.fnr)
    return [
        line.recipe,
        line.start,
        _percent(line.share),
        line.rule,
        _points(line.score),
        _points(line.interval),
        line.worst_attack or "-",
        *map(_points, shares),
        f"{line.runs} of {line.planned}",
    ]


def _attack_row(line: AttackLine) -> list[str]:
    shares = (line.score, line.interval, line.accuracy, line.attack_success, line.fpr, line.fnr)
    runs = f"{line.runs} of {line.planned}"
    return [line.recipe, line.start, _percent(line.share), line.attack, line.rule, *map(_points, shares), runs]


def _cost_rows(results: Results) -> list[list[str]]:
    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        [one.recipe, one.rule, shown(one.seconds, 4), shown(one.training_seconds, 4), shown(one.gigabytes, 2)]
        for one in results.costs
    ]


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
