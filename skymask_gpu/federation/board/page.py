"""A board's results for people: ``board.csv``, ``board.md``, and ``board.html`` with heat maps."""

import html
from collections import Counter
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from skymask_gpu.federation.board.judging import Judged, Line, lines, mean_of_known
from skymask_gpu.federation.board.trajectories import Ended
from skymask_gpu.io.files import write_text
from skymask_gpu.io.text_tables import csv_table, markdown_table

__all__ = ["COLUMNS", "LEGEND", "SUMMARY", "TRAJECTORIES", "summary", "trajectory_summary", "write_board"]

COLUMNS = (
    "recipe", "attack", "rule", "sets", "FPR", "FNR", "wrong side", "worse than FedAvg", "accuracy", "FedAvg's",
    "honest mean's", "AUC keep share", "AUC agreement", "AUC distance to root",
)  # fmt: skip
SUMMARY = ("rule", "attacked sets", "FPR and FNR within 5%", "wrong side", "worse than FedAvg", "FPR")
TRAJECTORIES = (
    "rule", "whole runs", "within 1 point of no attack", "worse than FedAvg", "largest attack success", "FPR", "FNR",
)  # fmt: skip
_WHOLE_RUNS = (
    "recipe", "seed", "attack", "rule", "FPR", "FNR", "accuracy", "FedAvg's", "without attack", "attack success",
)  # fmt: skip
_WITHIN = 0.05
_TRAJECTORY_LEGEND = (
    "Whole runs: every round is played with one rule. Accuracies are those of the final model; FedAvg's is that under the "
    "same attack, the last one that of FedAvg without attack. Worse than FedAvg: more than 1 point below it. Rates are means "
    "over all rounds."
)
LEGEND = (
    "FPR: honest clients rejected; FNR: attackers kept. Wrong side: sets in which more than half of both are. Worse than "
    "FedAvg: sets in which the step of the rule gives a test accuracy more than 1 point below that of the plain mean. "
    "Accuracies are those after one step. AUC: how well a witness alone orders attackers and honest clients; 1 is perfect, "
    "0.5 is chance. Rates, accuracies and AUCs are means over rounds and seeds. A dash: it does not exist, or is not known."
)
_STYLE = (
    "body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; } "
    "table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1rem; } "
    "th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }"
)


def write_board(title: str, judged: list[Judged], played: list[Ended], folder: Path) -> list[Path]:
    """Write the tables of what was judged and played into ``folder``, each file as a whole.

    Raises:
        ValueError: nothing was judged.
    """
    if not judged:
        raise ValueError(f"{folder} holds no mask set of this board; make them first, without --judge-only")
    table = lines(judged)
    rows = [_row(line) for line in table]
    text = f"# {title}\n\n{markdown_table(SUMMARY, summary(judged))}\n{LEGEND}\n\n{markdown_table(COLUMNS, rows)}"
    failed = _failed(judged)
    text += "".join(f"\n{sentence}" for sentence in failed)
    whole_runs = [_run_row(one) for one in played]
    if played:
        text += f"\n## Whole runs\n\n{markdown_table(TRAJECTORIES, trajectory_summary(played))}\n{_TRAJECTORY_LEGEND}\n\n"
        text += markdown_table(_WHOLE_RUNS, whole_runs)
    maps = "".join(f"<h2>{html.escape(rule)}</h2>\n{_heat_map(rule, table)}\n" for rule in dict.fromkeys(x.rule for x in table))
    page = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{_html(SUMMARY, summary(judged))}"
        f"<p>{html.escape(LEGEND)}</p>\n{maps}<h2>All lines</h2>\n{_html(COLUMNS, rows)}"
        f"{''.join(f'<p>{html.escape(sentence)}</p>' for sentence in failed)}"
    )
    if played:
        page += f"<h2>Whole runs</h2>\n{_html(TRAJECTORIES, trajectory_summary(played))}"
        page += f"<p>{html.escape(_TRAJECTORY_LEGEND)}</p>\n{_html(_WHOLE_RUNS, whole_runs)}"
    contents = {"board.csv": csv_table(Line, table), "board.md": text, "board.html": page + "</body>\n</html>\n"}
    if played:
        contents["trajectories.csv"] = csv_table(Ended, played)
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def summary(judged: list[Judged]) -> list[list[str]]:
    """One row per rule, which sums up all recipes, attacks, rounds and seeds."""
    rows = []
    for rule in dict.fromkeys(one.rule for one in judged):
        own = [one for one in judged if one.rule == rule]
        attacked = [one for one in own if one.fpr is not None and one.fnr is not None]
        good = sum(max(one.fpr or 0, one.fnr or 0) <= _WITHIN for one in attacked)
        known = [one.worse_than_fedavg for one in own if one.worse_than_fedavg is not None]
        rows.append(
            [
                rule,
                str(len(attacked)),
                str(good),
                str(sum(bool(one.wrong_side) for one in own)),
                f"{sum(known)} of {len(known)}",
                _percent(mean_of_known(one.fpr for one in own)),
            ]
        )
    return rows


def trajectory_summary(played: list[Ended]) -> list[list[str]]:
    """A row per rule, over all recipes, seeds and attacks."""
    rows = []
    for rule in dict.fromkeys(one.rule for one in played):
        own = [one for one in played if one.rule == rule]
        within = [one.within for one in own if one.within is not None]
        worse = [one.worse_than_fedavg for one in own if one.worse_than_fedavg is not None]
        rows.append(
            [
                rule,
                str(len(own)),
                f"{sum(within)} of {len(within)}",
                f"{sum(worse)} of {len(worse)}",
                _percent(max((one.attack_success for one in own if one.attack_success is not None), default=None)),
                _percent(mean_of_known(one.fpr for one in own)),
                _percent(mean_of_known(one.fnr for one in own)),
            ]
        )
    return rows


def _run_row(one: Ended) -> list[str]:
    rates = (one.fpr, one.fnr, one.accuracy, one.accuracy_fedavg, one.accuracy_unattacked, one.attack_success)
    return [one.recipe, str(one.seed), one.attack, one.rule, *map(_percent, rates)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _failed(judged: list[Judged]) -> list[str]:
    """One sentence for each reason why a rule could not judge."""
    counts = Counter((one.rule, one.failed) for one in judged if one.failed)
    return [f"{rule} could not judge {count} of its sets: {reason}.\n" for (rule, reason), count in counts.items()]


def _row(line: Line) -> list[str]:
    def shown(name: str, value: Any) -> str:
        if value is None:
            return "-"
        if name.startswith("auc"):
            return f"{value:.3f}"
        return _percent(value) if isinstance(value, float) else str(value)

    return [shown(field.name, value) for field, value in zip(fields(line), astuple(line), strict=True)]


def _html(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    def row(tag: str, cells: Any) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    return f"<table>\n{row('th', columns)}{''.join(row('td', cells) for cells in rows)}</table>\n"


def _heat_map(rule: str, table: list[Line]) -> str:
    """A rule's FPR / FNR, attacks by recipes; the larger of the two decides a cell's colour."""
    own = {(line.recipe, line.attack): line for line in table if line.rule == rule}
    recipes, attacks = (list(dict.fromkeys(names)) for names in zip(*own, strict=True))
    if all(line.fpr is None for line in own.values()):
        return "<p>This rule judged nobody.</p>"
    head = "".join(f"<th>{html.escape(recipe)}</th>" for recipe in ("FPR / FNR (%)", *recipes))
    rows = []
    for attack in attacks:
        cells = "".join(_cell(own.get((recipe, attack))) for recipe in recipes)
        rows.append(f"<tr><th>{html.escape(attack)}</th>{cells}</tr>\n")
    return f'<table class="map">\n<tr>{head}</tr>\n{"".join(rows)}</table>'


def _cell(line: Line | None) -> str:
    rates = [None, None] if line is None else [line.fpr, line.fnr]
    # The colour goes from white to red.
    colour = f"hsl(0 70% {100 - 50 * max(rate or 0 for rate in rates):.0f}%)"
    text = " / ".join("-" if rate is None else f"{100 * rate:.0f}" for rate in rates)
    return f'<td style="background: {colour}">{text}</td>'
