"""Plots of runs, written as PNG files."""

import json
import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from skymask_gpu.federation.run_folder import MASKS
from skymask_gpu.io.files import read_tensors, write_whole
from skymask_gpu.report.summary import FinishedRun
from skymask_gpu.report.sweep import Block, Sweep, rule_order

__all__ = ["plot_evidence", "plot_masks", "plot_rates", "plot_rounds"]

# Okabe & Ito's palette, distinguishable without red-green vision; yellow is left out, it is too pale for lines
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 10}
# what can still be read
_RUNS_BY_COLOUR = 6
_PANELS = 16
_PANELS_A_ROW = 4
_RATE_ATTACKS = 6
_RATE_SETTINGS = 3
_MASK_PANELS = 6
_MASK_PANELS_A_ROW = 3
_RATES = {"FPR": "false_positive_rate", "FNR": "false_negative_rate"}
_AXES = {"share": ("attack.share", "share of attackers (%)"), "clients": ("data.clients", "clients")}


def plot_rounds(runs: list[FinishedRun], sweep: Sweep, path: Path) -> None:
    """Accuracy by round: of a few runs a colour a run, and the verdicts; else a panel an attack, a line a rule over seeds."""
    repeated = any(len(seeds) > 1 for block in sweep.blocks for seeds in block.cells.values())
    with plt.rc_context(_STYLE):
        by_attack = sweep.blocks and (repeated or len(runs) > _RUNS_BY_COLOUR)
        figure = _panels_by_attack(sweep) if by_attack else _lines_by_run(runs)
        _save(figure, path)


def plot_rates(sweep: Sweep, axis: str, path: Path) -> bool:
    """FPR and FNR against the "share" of attackers or the number of "clients", means over rounds and seeds; a panel an attack.

    Returns False, and writes nothing, if no setting has two values of it or no rule judges clients.
    """
    key, label = _AXES[axis]
    settings: dict[str, list[Block]] = {}
    for block in sweep.blocks:
        if block.values["attack.share"] is not None and block.values[key] is not None:
            title = ", ".join(text for name, text in block.labels.items() if name != key)
            settings.setdefault(title, []).append(block)
    settings = {title: blocks for title, blocks in settings.items() if len(blocks) > 1}
    judging = {rule for blocks in settings.values() for block in blocks for rule in block.rules if _judges(block, rule)}
    if not judging:
        return False
    attacks = sorted({attack for blocks in settings.values() for block in blocks for attack in block.attacks} - {"none"})
    shown, columns = list(settings.items())[:_RATE_SETTINGS], attacks[:_RATE_ATTACKS]
    styles = {rule: style for rule, style in _styles(sweep).items() if rule in judging}
    with plt.rc_context(_STYLE):
        size = (max(3.0 * len(columns) + 0.8, 6.5), 4.8 * len(shown) + 1.2)
        figure = plt.figure(figsize=size, layout="constrained")
        rows = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
        for row, (title, blocks) in zip(rows, shown, strict=True):
            row.suptitle(_text(title, round(size[0] * 9)), fontsize=10, fontweight="bold")
            panels = row.subplots(2, len(columns), squeeze=False, sharex=True, sharey=True)
            for kind, line in zip(_RATES, panels, strict=True):
                line[0].set_ylabel(f"{kind} (%)")
                for axes, attack in zip(line, columns, strict=True):
                    _rate_lines(axes, blocks, key, attack, kind, styles)
            for axes, attack in zip(panels[0], columns, strict=True):
                axes.set_title(_text(attack, 26), fontsize=10)
            for axes in panels[1]:
                axes.set_xlabel(label)
                _ticks(axes, [block.values[key] for block in blocks], axis)
        left_out = _left_out(len(settings) - len(shown), "setting") + _left_out(len(attacks) - len(columns), "attack")
        _legend(figure, styles, "means over the rounds from the second on and over the seeds. " + left_out)
        _save(figure, path)
    return True


def plot_masks(runs: list[FinishedRun], path: Path) -> bool:
    """The last round's masks in their first two principal components, coloured by client kind; False if no run has masks."""
    return _plot_masked(runs, _scatter_masks, 4.5, "masks", path)


def plot_evidence(runs: list[FinishedRun], path: Path) -> bool:
    """Clients by layers: where the last round's masks differ from the benign majority's; False if no run has masks."""
    return _plot_masked(runs, _show_evidence, 5.5, "evidence", path)


def _lines_by_run(runs: list[FinishedRun]) -> Figure:
    figure, (accuracy, rates) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    lines: dict[str, list[Any]] = {"accuracy": [], "rates": []}
    for run, colour in zip(runs, _cycle(_COLOURS, len(runs)), strict=True):
        marker = "o" if len(run.records) < 30 else None
        for axes, key, style, what in (
            (accuracy, "accuracy", {"ls": "-", "marker": marker}, ""),
            (rates, "false_positive_rate", {"ls": "-", "marker": marker}, ": honest rejected"),
            (rates, "false_negative_rate", {"ls": "--", "marker": marker and "x"}, ": attackers kept"),
        ):
            points = [(record["round"] + 1, 100 * record[key]) for record in run.records if record.get(key) is not None]
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), color=colour, ms=4.5, label=_text(run.name + what, 60), **style)
                lines["accuracy" if axes is accuracy else "rates"].append(line)
    accuracy.set(title="Accuracy of the global model", xlabel="round", ylabel="test samples right (%)", ylim=(0, 102))
    rates.set(title="Verdicts", xlabel="round", ylabel="share of clients (%)", ylim=(-3, 103))
    for axes, drawn in ((accuracy, lines["accuracy"]), (rates, lines["rates"])):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if drawn:
            # below the axes: lines may be anywhere in them
            labels = [str(line.get_label()) for line in drawn]
            axes.legend(drawn, labels, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


def _panels_by_attack(sweep: Sweep) -> Figure:
    """A panel for each block and attack; attack "none" once for all shares."""
    panels: dict[str, tuple[Block, str]] = {}
    names = {key for block in sweep.blocks for key in block.labels}
    differing = [key for key in names if len({block.labels.get(key) for block in sweep.blocks}) > 1]
    for block in sweep.blocks:
        for attack in block.attacks:
            parts = [
                text for key, text in block.labels.items() if key in differing and (key, attack) != ("attack.share", "none")
            ]
            panels.setdefault("\n".join(filter(None, [attack, ", ".join(parts)])), (block, attack))
    shown = list(panels.items())[:_PANELS]
    drawn = {rule for _, (block, _) in shown for rule in block.rules}
    styles = {rule: style for rule, style in _styles(sweep).items() if rule in drawn}
    num_columns = min(_PANELS_A_ROW, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    size = (max(3.3 * num_columns, 6.5), 2.9 * num_rows + 1.2)
    figure, grid = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    common = [text for key, text in sweep.blocks[0].labels.items() if key not in differing]
    figure.suptitle(_text("Accuracy of the global model (%): " + ", ".join(common), round(size[0] * 9)), fontsize=11)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for index, (axes, (title, (block, attack))) in enumerate(zip(grid.flat, shown, strict=False)):
        _accuracy_lines(axes, block, attack, styles)
        axes.set_title("\n".join(_text(line, 38) for line in title.split("\n")), fontsize=9)
        axes.set_ylim(0, 102)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if index + num_columns >= len(shown):
            axes.set_xlabel("round")
    repeated = any(len(seeds) > 1 for _, (block, _) in shown for seeds in block.cells.values())
    band = "lines: mean over the seeds, bands: one sample standard deviation. " if repeated else ""
    _legend(figure, styles, band + _left_out(len(panels) - len(shown), "panel"))
    return figure


def _accuracy_lines(axes: Axes, block: Block, attack: str, styles: dict[str, Any]) -> None:
    """Mean and band over the seeds of each rule, in the rounds that all seeds evaluated."""
    for rule in block.rules:
        runs = block.cells.get((attack, rule), [])
        by_round: dict[int, list[float]] = {}
        for run in runs:
            for record in run.records:
                if record.get("accuracy") is not None:
                    by_round.setdefault(record["round"] + 1, []).append(100 * record["accuracy"])
        rounds = [number for number in sorted(by_round) if len(by_round[number]) == len(runs)]
        if not rounds:
            continue
        means = [statistics.fmean(by_round[number]) for number in rounds]
        axes.plot(
            rounds, means, lw=1.5, **{**styles[rule], "ms": 3.5, "marker": styles[rule]["marker"] if len(rounds) < 15 else None}
        )
        if len(runs) > 1:
            spreads = [statistics.stdev(by_round[number]) for number in rounds]
            low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(rounds, low, high, color=styles[rule]["color"], alpha=0.15, lw=0)


def _rate_lines(axes: Axes, blocks: list[Block], key: str, attack: str, kind: str, styles: dict[str, Any]) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for block in blocks:
        for rule in block.rules:
            rates = [mean for run in block.cells.get((attack, rule), []) if (mean := run.mean_rate(_RATES[kind])) is not None]
            if rates:
                points.setdefault(rule, []).append((_axis_value(block.values[key], key), 100 * statistics.fmean(rates)))
    for rule in sorted(points, key=rule_order):
        # hollow markers of growing size, so that equal rates of several rules can all be seen
        axes.plot(*zip(*sorted(points[rule]), strict=True), lw=1.4, mfc="none", **styles[rule])
    axes.set_ylim(-4, 104)


def _axis_value(value: float, key: str) -> float:
    return 100 * value if key == "attack.share" else value


def _ticks(axes: Axes, values: list[Any], axis: str) -> None:
    """A tick at each value that was run; client counts on a log scale."""
    if axis == "clients":
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({_axis_value(value, _AXES[axis][0]) for value in values})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _judges(block: Block, rule: str) -> bool:
    """Whether the rule says whom it keeps."""
    runs = [run for (_, other), seeds in block.cells.items() if other == rule for run in seeds]
    return any(run.mean_rate(rate) is not None for run in runs for rate in _RATES.values())


def _styles(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each rule, the same in all pictures."""
    rules = sorted({rule for block in sweep.blocks for rule in block.rules}, key=rule_order)
    return {
        rule: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "ls": _DASHES[i // len(_COLOURS) % len(_DASHES)],
            "ms": 4 + i % len(_COLOURS),
        }
        for i, rule in enumerate(rules)
    }


def _legend(figure: Figure, styles: dict[str, dict[str, Any]], note: str) -> None:
    """One legend for all panels, below them."""
    handles = [plt.Line2D([], [], mfc="none", **style) for style in styles.values()]
    labels = [_text(rule, 40) for rule in styles]
    columns = max(1, int(figure.get_figwidth() / (1.1 + 0.075 * max(map(len, styles)))))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, title=note.strip() or None,
        title_fontsize=8,
    )  # fmt: skip


def _left_out(count: int, what: str) -> str:
    return f"{count} more {what}{'s' if count > 1 else ''} in the tables. " if count > 0 else ""


def _plot_masked(runs: list[FinishedRun], draw: Any, height: float, what: str, path: Path) -> bool:
    masked = [run for run in runs if _has_masks(run)]
    if not masked:
        return False
    shown = masked if len(masked) <= _MASK_PANELS else _one_an_attack(masked)
    num_columns = min(_MASK_PANELS_A_ROW, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    with plt.rc_context({**_STYLE, "axes.grid": draw is _scatter_masks}):
        size = (5.5 * num_columns, height * num_rows)
        figure, panels = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
        for axes in panels.flat[len(shown) :]:
            axes.remove()
        for run, axes in zip(shown, panels.flat, strict=False):
            tensors, metadata = read_tensors(run.folder / MASKS)
            draw(axes, tensors, metadata)
            axes.set_title(_text(f"{run.name}: {what} of round {int(metadata['round']) + 1}", 52), fontsize=10)
        if len(shown) < len(masked):
            figure.suptitle(f"{len(shown)} of the {len(masked)} runs that have masks: one an attack, of the lowest seed")
        _save(figure, path)
    return True


def _has_masks(run: FinishedRun) -> bool:
    """Whether the run's rule stored masks; another one than SkyMask may store something else."""
    path = run.folder / MASKS
    return path.exists() and {"scores", "evidence", "clients", "benign", "malicious"} <= read_tensors(path)[0].keys()


def _one_an_attack(runs: list[FinishedRun]) -> list[FinishedRun]:
    first: dict[str, FinishedRun] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        first.setdefault(str(run.config.get("attack", {}).get("name")), run)
    return [first[attack] for attack in sorted(first)][:_MASK_PANELS]


def _scatter_masks(axes: Axes, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    scores, malicious, benign = (tensors[name].numpy() for name in ("scores", "malicious", "benign"))
    for kind, chosen, colour, marker in (
        ("honest client", ~malicious, _COLOURS[0], "o"),
        ("attacker", malicious, _COLOURS[1], "^"),
    ):
        if chosen.any():
            x, y = scores[:-1][chosen].T
            axes.scatter(x, y, s=26, c=colour, marker=marker, alpha=0.7, lw=0, label=f"{kind} ({int(chosen.sum())})")
    rejected = ~benign
    if rejected.any():
        x, y = scores[:-1][rejected].T
        axes.scatter(x, y, s=70, facecolors="none", edgecolors="black", lw=0.8, label=f"rejected ({int(rejected.sum())})")
    axes.scatter(scores[-1, 0], scores[-1, 1], s=130, c=_COLOURS[2], marker="*", label="root model")
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=0.8)


def _show_evidence(axes: Axes, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # attackers first, rejected first among each
    order = sorted(range(len(tensors["clients"])), key=lambda i: (not tensors["malicious"][i], bool(tensors["benign"][i]), i))
    image = axes.imshow(tensors["evidence"][order].numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
    layers = json.loads(metadata["layers"])
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    num_malicious = int(tensors["malicious"].sum())
    if num_malicious:
        axes.axhline(num_malicious - 0.5, color="white", lw=1.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"clients, the {num_malicious} attackers on top" if num_malicious else "clients")
    axes.figure.colorbar(image, ax=axes, label="share of bits unlike the benign majority")


def _text(text: str, width: int) -> str:
    """Wrapped, and with dollar signs that are no formula."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def _cycle(values: tuple[str, ...], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


def _save(figure: Figure, path: Path) -> None:
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)
