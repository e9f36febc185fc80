"""The tables and the picture of ``docs/privacy.md`` on runs with obfuscated updates.

``python -m skymask_gpu.bench.studies.privacy tradeoff OUT`` prints the accuracy of each rule behind
each obfuscation, from the sweep of ``examples/privacy_tradeoff.toml`` in OUT. ``... skymask OUT
--leak LEAK --picture FILE.png`` prints whom SkyMask rejects in the sweep of
``examples/privacy_skymask.toml``, and draws that beside what leaks in the audit of
``examples/leak_strengths.toml`` in LEAK.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.federation.runs import load_runs
from skymask_gpu.io.text_tables import markdown_table
from skymask_gpu.report.summary import FinishedRun

_METHODS = ("mask", "clip", "prune", "noise")


def obfuscation_of(run: FinishedRun) -> str:
    """The run's obfuscation in words, such as ``mask 0.5, shared``."""
    privacy = run.config["privacy"]
    if privacy["obfuscation"] == "none":
        return "none"
    words = f"{privacy['obfuscation']} {privacy['strength']:g}"
    if privacy.get("shared"):
        words += ", shared"
    if not privacy["root_too"]:
        words += ", not the root"
    if not privacy["attackers_too"] and run.config["attack"]["name"] != "none":
        words += ", not the attackers"
    return words


def _rule_of(run: FinishedRun) -> str:
    defence = run.config["defence"]
    return f"{defence['rule']}, zeros left out" if defence.get("skip_zeros") else str(defence["rule"])


def _in_order(values: Iterable[str]) -> list[str]:
    """Each value once, in the order in which it came first."""
    return list(dict.fromkeys(values))


def _by_strength(run: FinishedRun) -> tuple[bool, int, float, str]:
    """No obfuscation first, then each method from its smallest strength to its largest."""
    privacy = run.config["privacy"]
    method = privacy["obfuscation"]
    if method == "none":
        return (False, 0, 0.0, "")
    return (True, _METHODS.index(method), privacy["strength"], obfuscation_of(run))


def tradeoff_table(runs: list[FinishedRun]) -> str:
    """A line per partition and obfuscation, a column per rule: the mean accuracy over the seeds."""
    rules = _in_order(map(_rule_of, runs))
    rows = []
    for partition in _in_order(run.config["data"]["partition"] for run in runs):
        for obfuscation in _in_order(map(obfuscation_of, runs)):
            own = [run for run in runs if (run.config["data"]["partition"], obfuscation_of(run)) == (partition, obfuscation)]
            by_rule = [[run for run in own if _rule_of(run) == rule] for rule in rules]
            rows.append([partition, obfuscation, *map(_accuracies, by_rule)])
    return markdown_table(["data", "obfuscation", *rules], rows)


def _accuracies(runs: list[FinishedRun]) -> str:
    """The mean of the last accuracies, and by how much the seeds lie apart."""
    values = [100 * accuracy for run in runs if (accuracy := run.last("accuracy")) is not None]
    return f"{statistics.fmean(values):.1f} ({max(values) - min(values):.1f})" if values else "-"


def _mean(run: FinishedRun, key: str) -> float:
    """The mean of a rate over all rounds."""
    return statistics.fmean(record[key] for record in run.records)


def skymask_table(runs: list[FinishedRun]) -> str:
    """A line per obfuscation, a column per attack: honest rejected, attackers kept, accuracy."""
    attacks = sorted({run.config["attack"]["name"] for run in runs}, key=lambda name: (name != "none", name))
    by_cell = {(_setting(run), run.config["attack"]["name"]): run for run in runs}
    rows = []
    for setting in _in_order(map(_setting, runs)):
        cells = [by_cell.get((setting, attack)) for attack in attacks]
        rows.append([setting, *("-" if run is None else _judged(run) for run in cells)])
    return markdown_table(["obfuscation", *attacks], rows)


def _setting(run: FinishedRun) -> str:
    """The line of a run: without an attack, it makes no difference what attackers would do."""
    privacy = run.config["privacy"]
    words = obfuscation_of(run)
    unlike = not privacy["attackers_too"] and privacy["obfuscation"] != "none"
    return f"{words}, not the attackers" if unlike and run.config["attack"]["name"] == "none" else words


def _judged(run: FinishedRun) -> str:
    accuracy = f"{100 * (run.last('accuracy') or 0):.1f}"
    rejected = f"{100 * _mean(run, 'false_positive_rate'):.0f}"
    if run.config["attack"]["name"] == "none":
        return f"{rejected} / - / {accuracy}"
    return f"{rejected} / {100 * _mean(run, 'false_negative_rate'):.0f} / {accuracy}"


def draw(runs: list[FinishedRun], leaks: list[dict[str, Any]], path: Path) -> None:
    """A panel per method over its strengths, from weak to strong.

    Each shows the shares of images that leak to the naive and to the aware attacker, and SkyMask's
    shares of rejected honest clients and of kept attackers, as means over all attacks, and the test
    accuracy without an attack.
    """
    plain = [run for run in runs if _is_plain(run)]
    with styled(grid=True):
        figure = Figure(figsize=(15, 3.8), layout="constrained")
        for axes, method in zip(figure.subplots(1, len(_METHODS), sharey=True), _METHODS, strict=True):
            _draw_panel(axes, method, plain, leaks)
        figure.axes[0].set_ylabel("share (%)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")
        save(figure, path)


def _is_plain(run: FinishedRun) -> bool:
    """Whether everybody obfuscates, each client with draws of its own."""
    privacy = run.config["privacy"]
    return privacy["root_too"] and privacy["attackers_too"] and not privacy.get("shared")


def _draw_panel(axes: Axes, method: str, runs: list[FinishedRun], leaks: list[dict[str, Any]]) -> None:
    names = ("none", method)
    strengths = {run.config["privacy"].get("strength") for run in runs if run.config["privacy"]["obfuscation"] == method}
    # The smaller the bound of a clip, the stronger it is.
    ordered = [None, *sorted(strengths, reverse=method == "clip")]
    at = list(range(len(ordered)))
    for colour, attacker in zip(COLOURS, ("naive", "aware"), strict=False):
        found = {
            float(line["strength"]) if line["obfuscation"] != "none" else None: 100 * float(line["leaked"])
            for line in leaks
            if line["obfuscation"] in names and line["attacker"] == attacker
        }
        axes.plot(at, [found[one] for one in ordered], "o-", color=colour, label=f"images leaked, {attacker} attacker")
    for colour, key, label in zip(
        COLOURS[2:], ("false_positive_rate", "false_negative_rate"), ("honest clients rejected", "attackers kept"), strict=False
    ):
        shares = [[run for run in runs if run.config["privacy"].get("strength") == one and _has(run, names)] for one in ordered]
        if key == "false_negative_rate":
            shares = [[run for run in group if run.config["attack"]["name"] != "none"] for group in shares]
        values = [100 * statistics.fmean(_mean(run, key) for run in group) for group in shares]
        axes.plot(at, values, "s:", color=colour, label=label)
    unattacked = [run for run in runs if run.config["attack"]["name"] == "none" and _has(run, names)]
    accuracy = {run.config["privacy"].get("strength"): 100 * (run.last("accuracy") or 0) for run in unattacked}
    axes.plot(at, [accuracy[one] for one in ordered], "^--", color=COLOURS[4], label="accuracy, nobody attacks")
    axes.set_xticks(at, ["none" if one is None else f"{one:g}" for one in ordered])
    axes.set(xlabel=f"{method}, from weak to strong", ylim=(-3, 103))


def _has(run: FinishedRun, names: tuple[str, ...]) -> bool:
    return run.config["privacy"]["obfuscation"] in names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("tradeoff", "skymask"))
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    parser.add_argument("--leak", type=Path, help="the audit's folder, for the picture")
    parser.add_argument("--picture", type=Path, help="where to draw")
    options = parser.parse_args(arguments)
    runs = sorted(load_runs(options.folder), key=_by_strength)
    print(tradeoff_table(runs) if options.table == "tradeoff" else skymask_table(runs), end="")
    if options.picture is not None:
        if options.leak is None:
            parser.error("--picture needs --leak LEAK, the folder of the audit at the same strengths")
        with (options.leak / "leak.csv").open(encoding="utf-8", newline="") as file:
            draw(runs, list(csv.DictReader(file)), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
