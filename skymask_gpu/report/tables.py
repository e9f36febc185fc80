"""The tables of a report.

Each block has tables of accuracy, verdicts and backdoors, as Markdown and LaTeX. The CSV file has
one line per run.
"""

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skymask_gpu.io.text_tables import latex_escaped, latex_row
from skymask_gpu.report.summary import FinishedRun, flat_settings
from skymask_gpu.report.sweep import Block, Sweep, differing_keys

__all__ = ["LEGEND", "Cell", "ResultTable", "block_tables", "csv_text", "latex_text", "markdown_text"]

LEGEND = (
    "Accuracy of the global model on the test set, and success rate of the backdoor, in the last evaluated round. "
    "FPR: the share of honest clients rejected, FNR: the share of attackers kept; means over the rounds from the second on, "
    "then over the seeds, and in square brackets the worst of these rounds of any seed. n/a: nothing to judge or to measure, "
    "as with rules that judge no client. -: no finished run. Bold: the best accuracy but for plain averaging (fedavg)."
)
# Settings that have a column in the CSV file even if all runs agree in them.
_COLUMNS = (
    "data.dataset",
    "model.name",
    "data.partition",
    "data.bias",
    "data.alpha",
    "data.clients",
    "attack.name",
    "attack.share",
    "defence.rule",
)
_RESULT_COLUMNS = (
    "seed",
    "rounds",
    "rounds_done",
    "accuracy",
    "mean_fpr",
    "worst_fpr",
    "mean_fnr",
    "worst_fnr",
    "attack_success_rate",
    "backdoor_lifespan",
    "worst_class_accuracy",
    "median_aggregation_seconds",
    "median_local_training_seconds",
)
# The number of characters that fit on a line of LaTeX's article class, counting two characters
# between columns. Wider tables are scaled to the line.
_LATEX_CHARACTERS = 65
# LaTeX can hold back only a limited number of floats. After this number of blocks, a page break
# makes it print them.
_BLOCKS_PER_FLUSH = 6
_NONE, _ABSENT = "n/a", "-"


@dataclass(frozen=True)
class Cell:
    """The text of a table for one attack and one rule, and whether it is the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class ResultTable:
    """A table of attacks by rules; each of ``rows`` is an attack and its cells, one per rule."""

    caption: str
    rules: list[str]
    rows: list[tuple[str, list[Cell]]]


def block_tables(block: Block) -> list[ResultTable]:
    """Tables of accuracy, of FPR and FNR and, if a run has it, of the backdoors' success rate."""
    tables = [_mean_table(block, block.attacks, "Accuracy (%)", "accuracy", mark_best=True), _rates_table(block)]
    backdoors = [
        attack
        for attack in block.attacks
        if any(
            run.last("attack_success_rate") is not None for rule in block.rules for run in block.cells.get((attack, rule), [])
        )
    ]
    if any(run.worst_class is not None for runs in block.cells.values() for run in runs):
        tables.append(_worst_class_table(block))
    if backdoors:
        tables.append(_mean_table(block, backdoors, "Attack success rate (%)", "attack_success_rate", mark_best=False))
        tables += _lifespan_table(block, backdoors)
    return tables


def markdown_text(title: str, sweep: Sweep, failed: list[tuple[str, str]], missing: Sequence[tuple[str, str]] = ()) -> str:
    """All blocks' tables as Markdown, runs in no block, and cells that failed or are missing."""
    lines = [f"# {_markdown(title)}", "", LEGEND, ""]
    for block in sweep.blocks:
        lines += [f"## {_markdown(block.title)}", ""]
        for table in block_tables(block):
            lines += [f"{_markdown(table.caption)}:", "", _markdown_row(["attack", *map(_markdown, table.rules)])]
            lines += [_markdown_row(["---"] + ["---:"] * len(table.rules))]
            for attack, cells in table.rows:
                shown = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
                lines.append(_markdown_row([_markdown(attack), *shown]))
            lines.append("")
    for heading, entries in (("Left out", sweep.left_out), ("Failed", failed), ("Missing", missing)):
        if entries:
            lines += [f"## {heading}", "", *(f"- {_markdown(name)}: {_markdown(why)}" for name, why in entries), ""]
    return "\n".join(lines)


def latex_text(title: str, sweep: Sweep, failed: list[tuple[str, str]]) -> str:
    r"""The same as LaTeX's ``table`` environments, to be included by ``\input``.

    They need the packages booktabs and graphicx.
    """
    lines = [
        _comment(title),
        r"% In the preamble: \usepackage{booktabs,graphicx}. Then: \input{tables.tex}",
        _comment(LEGEND),
        "",
    ]
    for number, block in enumerate(sweep.blocks):
        if number and number % _BLOCKS_PER_FLUSH == 0:
            lines += [r"\clearpage", ""]
        for table in block_tables(block):
            wide = _width(table) > _LATEX_CHARACTERS
            lines += [r"\begin{table}[htbp]", r"\centering", rf"\caption{{{latex_escaped(f'{table.caption}: {block.title}')}}}"]
            lines += [r"\resizebox{\linewidth}{!}{%"] * wide
            lines += [rf"\begin{{tabular}}{{l{'r' * len(table.rules)}}}", r"\toprule"]
            lines += [latex_row(["attack", *map(latex_escaped, table.rules)]), r"\midrule"]
            for attack, cells in table.rows:
                shown = [rf"\textbf{{{latex_escaped(cell.text)}}}" if cell.best else latex_escaped(cell.text) for cell in cells]
                lines.append(latex_row([latex_escaped(attack), *shown]))
            lines += [r"\bottomrule", r"\end{tabular}" + "}" * wide, r"\end{table}", ""]
    lines += [_comment(f"left out: {name}: {why}") for name, why in sweep.left_out]
    lines += [_comment(f"failed: {name}: {why}") for name, why in failed]
    return "\n".join(lines) + "\n"


def csv_text(runs: list[FinishedRun], folder: Path) -> str:
    """The runs as CSV, one line per run: its settings that differ between runs, and its results.

    Rates are shares between 0 and 1; an unknown one is empty.
    """
    settings = [flat_settings(run.config) for run in runs]
    fixed = ("name", "seed", "rounds", "checkpoint_every", "evaluate_every", "plugins", "data.data_dir", *_COLUMNS)
    keys = [*_COLUMNS, *(key for key in differing_keys(settings) if key not in fixed and not key.startswith("tracking."))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "folder", *keys, *_RESULT_COLUMNS])
    for run, flat in zip(runs, settings, strict=True):
        where = run.folder.relative_to(folder) if run.folder.is_relative_to(folder) else run.folder
        writer.writerow(
            [
                run.name,
                where.as_posix(),
                *(flat.get(key) for key in keys),
                run.seed,
                run.rounds,
                run.rounds_done,
                run.last("accuracy"),
                run.mean_rate("false_positive_rate"),
                run.worst_rate("false_positive_rate"),
                run.mean_rate("false_negative_rate"),
                run.worst_rate("false_negative_rate"),
                run.last("attack_success_rate"),
                run.lifespan,
                run.worst_class,
                run.median_seconds("aggregation"),
                run.median_seconds("local_training"),
            ]
        )
    return file.getvalue()


def _mean_table(block: Block, attacks: list[str], quantity: str, key: str, *, mark_best: bool) -> ResultTable:
    values = {cell: _values(block.cells.get(cell), partial(FinishedRun.last, key=key)) for cell in _grid(block, attacks)}
    counts = {len(shares) for shares in values.values() if shares}
    rows = []
    for attack in attacks:
        best = _best(block, attack, values) if mark_best else set()
        cells = []
        for rule in block.rules:
            shares = values[attack, rule]
            count = f" (n = {len(shares)})" if shares and len(counts) > 1 else ""
            cells.append(Cell(_mean_and_spread(shares) + count, rule in best))
        rows.append((attack, cells))
    return ResultTable(quantity + _spread_note(counts), block.rules, rows)


def _rates_table(block: Block) -> ResultTable:
    rows = []
    for attack in block.attacks:
        cells = []
        for rule in block.rules:
            runs = block.cells.get((attack, rule))
            means, worst = [], []
            for key in ("false_positive_rate", "false_negative_rate"):
                rates = _values(runs, partial(FinishedRun.mean_rate, key=key))
                peaks = _values(runs, partial(FinishedRun.worst_rate, key=key))
                means.append(f"{statistics.fmean(rates):.1f}" if rates else _NONE)
                worst.append(f"{max(peaks):.1f}" if peaks else _NONE)
            if runs is None:
                cells.append(Cell(_ABSENT))
            elif set(means) == {_NONE}:
                cells.append(Cell(_NONE))
            else:
                cells.append(Cell(f"{' / '.join(means)} [{' / '.join(worst)}]"))
        rows.append((attack, cells))
    return ResultTable("FPR / FNR (%), mean [worst round]", block.rules, rows)


def _worst_class_table(block: Block) -> ResultTable:
    """A defence may keep the accuracy and lose a class that only rejected clients have."""
    rows = []
    for attack in block.attacks:
        found = [_values(block.cells.get((attack, rule)), lambda run: run.worst_class) for rule in block.rules]
        rows.append((attack, [Cell(_mean_and_spread(shares)) for shares in found]))
    return ResultTable("Accuracy of the worst class (%), mean over the seeds", block.rules, rows)


def _lifespan_table(block: Block, attacks: list[str]) -> list[ResultTable]:
    """The table of lifespans, or none if no attackers left."""
    spans = {
        cell: [run.lifespan for run in block.cells.get(cell, []) if run.lifespan is not None] for cell in _grid(block, attacks)
    }
    if not any(spans.values()):
        return []
    shown = {cell: f"{statistics.fmean(values):.1f}" if values else _NONE for cell, values in spans.items()}
    rows = [(attack, [Cell(shown[attack, rule]) for rule in block.rules]) for attack in attacks]
    return [ResultTable("Rounds for which the backdoor outlives the attackers, mean over the seeds", block.rules, rows)]


def _grid(block: Block, attacks: list[str]) -> list[tuple[str, str]]:
    return [(attack, rule) for attack in attacks for rule in block.rules]


def _values(runs: list[FinishedRun] | None, measure: Callable[[FinishedRun], float | None]) -> list[float] | None:
    """The quantity in percent for each run that has it; None if there is no run at all."""
    if runs is None:
        return None
    return [100 * share for share in map(measure, runs) if share is not None]


def _mean_and_spread(values: list[float] | None) -> str:
    if values is None:
        return _ABSENT
    if not values:
        return _NONE
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _spread_note(counts: set[int]) -> str:
    if not counts or counts == {1}:
        return ", one seed"
    seeds = "seeds, whose number is n" if len(counts) > 1 else f"{max(counts)} seeds"
    return f", mean ± sample standard deviation over {seeds}"


def _best(block: Block, attack: str, values: dict[tuple[str, str], list[float] | None]) -> set[str]:
    """The rules with the highest mean as shown, without plain averaging.

    The set is empty if there is nothing to compare.
    """
    means = {
        rule: round(statistics.fmean(shares), 1)
        for rule in block.rules
        if rule.split(" ")[0] != "fedavg" and (shares := values[attack, rule])
    }
    return {rule for rule, mean in means.items() if mean == max(means.values())} if len(means) > 1 else set()


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _width(table: ResultTable) -> int:
    """The width of a table in characters."""
    rows = [["attack", *table.rules], *([attack, *(cell.text for cell in cells)] for attack, cells in table.rows)]
    return sum(2 + max(map(len, column)) for column in zip(*rows, strict=True))


def _comment(text: str) -> str:
    return "% " + " ".join(text.split())
