"""The report's pictures; a path's suffix chooses the format, ``panels.py`` what they show."""

import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.federation.run_folder import MASKS
from skymask_gpu.io.files import read_tensors
from skymask_gpu.report.panels import (
    RATES,
    Axis,
    RatePanels,
    RoundPanels,
    accuracy_by_round,
    axis_values,
    mask_panels,
    needs_panels,
    rate_panels,
    rate_points,
    round_panels,
)
from skymask_gpu.report.summary import FinishedRun
from skymask_gpu.report.sweep import Block, Sweep, rule_order

__all__ = ["plot_evidence", "plot_masks", "plot_rates", "plot_rounds", "plot_witnesses", "wrapped"]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")
# The number of panels side by side: by round, and of masks.
_PANELS_PER_ROW = 4
_MASK_PANELS_PER_ROW = 3
_AXIS_LABELS: dict[Axis, str] = {"share": "share of attackers (%)", "clients": "clients"}


def plot_rounds(runs: list[FinishedRun], sweep: Sweep, path: Path) -> None:
    """Plot the accuracy by round.

    A few runs get one colour per run. Otherwise there is one panel per attack, with one line per
    rule, averaged over the seeds.
    """
    with styled(grid=True):
        figure = _panels_by_attack(round_panels(sweep), sweep) if needs_panels(runs, sweep) else _lines_by_run(runs)
        save(figure, path)


def plot_rates(sweep: Sweep, axis: Axis, path: Path) -> bool:
    """Plot FPR and FNR against the share of attackers or the number of clients.

    There is one column per attack. The rates are means over the rounds and the seeds.

    Returns:
        False, with nothing written, if no setting has two values of it or no rule judges clients.
    """
    panels = rate_panels(sweep, axis)
    if panels is None:
        return False
    with styled(grid=True):
        save(_rates(panels, _styles(sweep, panels.rules)), path)
    return True


def plot_masks(runs: list[FinishedRun], path: Path) -> bool:
    """Plot the last round's masks in their first two principal components, coloured by client kind.

    Returns:
        False, with nothing written, if no run has masks.
    """
    return _plot_masked(runs, _scatter_masks, {"scores"}, 4.5, "masks", path)


def plot_evidence(runs: list[FinishedRun], path: Path) -> bool:
    """Plot, client by layer, how far the last round's masks differ from the benign majority's.

    Returns:
        False, with nothing written, if no run has masks.
    """
    return _plot_masked(runs, _show_evidence, {"evidence"}, 5.5, "evidence", path)


def plot_witnesses(runs: list[FinishedRun], path: Path) -> bool:
    """Plot each client's keep share and agreement in the last round, coloured by client kind.

    Returns:
        False, with nothing written, if no run has masks.
    """
    return _plot_masked(runs, _scatter_witnesses, {"keep_share", "agreement"}, 4.5, "witnesses", path)


def _lines_by_run(runs: list[FinishedRun]) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = _cycle(COLOURS, len(runs))
    for order, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        points = [
            (record["round"] + 1, 100 * record["accuracy"]) for record in run.records if record.get("accuracy") is not None
        ]
        if points:
            # Earlier lines are wider, so that one that lies on another does not hide it.
            width = 1.4 + 0.9 * (len(runs) - 1 - order)
            marker = _MARKERS[order % len(_MARKERS)] if len(run.records) < 30 else None
            axes.plot(
                *zip(*points, strict=True), color=colour, lw=width, marker=marker, ms=4 + width, label=wrapped(run.name, 60)
            )
    axes.set(title="Accuracy of the global model", xlabel="round", ylabel="test samples right (%)", ylim=(0, 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        # The legend stands below the axes, because lines may be anywhere inside them. The labels
        # are given, because the legend leaves out a name that begins with an underscore.
        labels = [str(line.get_label()) for line in axes.lines]
        axes.legend(axes.lines, labels, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def _panels_by_attack(panels: RoundPanels, sweep: Sweep) -> Figure:
    styles = _styles(sweep, panels.rules)
    num_columns = min(_PANELS_PER_ROW, len(panels.shown))
    num_rows = math.ceil(len(panels.shown) / num_columns)
    size = (max(3.3 * num_columns, 6.5), 2.9 * num_rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    title = "Accuracy of the global model (%): " + ", ".join(panels.common)
    figure.suptitle(wrapped(title, round(size[0] * 9)), fontsize=11)
    for axes in grid.flat[len(panels.shown) :]:
        axes.remove()
    for index, (axes, (title, block, attack)) in enumerate(zip(grid.flat, panels.shown, strict=False)):
        _accuracy_lines(axes, block, attack, styles)
        axes.set_title("\n".join(wrapped(line, 38) for line in title.split("\n")), fontsize=9)
        axes.set_ylim(0, 102)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if index + num_columns >= len(panels.shown):
            axes.set_xlabel("round")
    band = "lines: mean over the seeds, bands: one sample standard deviation. " if panels.repeated else ""
    _legend(figure, styles, band + panels.left_out)
    return figure


def _accuracy_lines(axes: Axes, block: Block, attack: str, styles: dict[str, Any]) -> None:
    """For each rule a line, the mean over the seeds; with several seeds also a band."""
    for rule in block.rules:
        rounds, means, spreads = accuracy_by_round(block, attack, rule)
        if not rounds:
            continue
        style = {**styles[rule], "ms": 3.5, "marker": styles[rule]["marker"] if len(rounds) < 15 else None}
        axes.plot(rounds, means, lw=1.5, **style)
        if spreads:
            low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(rounds, low, high, color=styles[rule]["color"], alpha=0.15, lw=0)


def _rates(panels: RatePanels, styles: dict[str, Any]) -> Figure:
    size = (max(3.0 * len(panels.attacks) + 0.8, 6.5), 4.8 * len(panels.settings) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    rows = figure.subfigures(len(panels.settings), 1, squeeze=False)[:, 0]
    for row, (title, blocks) in zip(rows, panels.settings, strict=True):
        row.suptitle(wrapped(title, round(size[0] * 9)), fontsize=10, fontweight="bold")
        grid = row.subplots(2, len(panels.attacks), squeeze=False, sharex=True, sharey=True)
        for kind, line in zip(RATES, grid, strict=True):
            line[0].set_ylabel(f"{kind} (%)")
            for axes, attack in zip(line, panels.attacks, strict=True):
                _rate_lines(axes, rate_points(blocks, panels.axis, attack, kind), styles)
        for axes, attack in zip(grid[0], panels.attacks, strict=True):
            axes.set_title(wrapped(attack, 26), fontsize=10)
        for axes in grid[1]:
            axes.set_xlabel(_AXIS_LABELS[panels.axis])
            _ticks(axes, axis_values(blocks, panels.axis), panels.axis)
    _legend(figure, styles, "means over the rounds from the second on and over the seeds. " + panels.left_out)
    return figure


def _rate_lines(axes: Axes, points: dict[str, list[tuple[float, float]]], styles: dict[str, Any]) -> None:
    for rule in sorted(points, key=rule_order):
        # Markers are hollow and differ in size, so that equal rates of several rules can all be
        # seen.
        axes.plot(*zip(*sorted(points[rule]), strict=True), lw=1.4, mfc="none", **styles[rule])
    axes.set_ylim(-4, 104)


def _ticks(axes: Axes, values: list[float], axis: Axis) -> None:
    """Put a tick at each value that was run; numbers of clients are on a log scale."""
    if axis == "clients":
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _styles(sweep: Sweep, drawn: set[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each drawn rule; a rule has the same ones in all pictures."""
    rules = sorted({rule for block in sweep.blocks for rule in block.rules}, key=rule_order)
    return {
        rule: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "ls": _DASHES[i // len(COLOURS) % len(_DASHES)],
            "ms": 4 + i % len(COLOURS),
        }
        for i, rule in enumerate(rules)
        if rule in drawn
    }


def _legend(figure: Figure, styles: dict[str, dict[str, Any]], note: str) -> None:
    """One legend for all panels, below them."""
    handles = [Line2D([], [], mfc="none", **style) for style in styles.values()]
    labels = [wrapped(rule, 40) for rule in styles]
    columns = max(1, int(figure.get_figwidth() / (1.1 + 0.075 * max(map(len, styles)))))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, title=note.strip() or None,
        title_fontsize=8,
    )  # fmt: skip


def _plot_masked(
    runs: list[FinishedRun],
    draw: Callable[[Axes, dict[str, Tensor], dict[str, str]], None],
    needed: set[str],
    height: float,
    what: str,
    path: Path,
) -> bool:
    """One panel per run that has these tensors, filled by ``draw(axes, tensors, metadata)``."""
    shown, num_masked = mask_panels(runs, needed | {"clients", "benign", "malicious"})
    if not shown:
        return False
    num_columns = min(_MASK_PANELS_PER_ROW, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    with styled(grid=draw is not _show_evidence):
        figure = Figure(figsize=(5.5 * num_columns, height * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for run, axes in zip(shown, grid.flat, strict=False):
            tensors, metadata = read_tensors(run.folder / MASKS)
            draw(axes, tensors, metadata)
            axes.set_title(wrapped(f"{run.name}: {what} of round {int(metadata['round']) + 1}", 52), fontsize=10)
        if len(shown) < num_masked:
            figure.suptitle(f"{len(shown)} of the {num_masked} runs that have masks: one per attack, with the lowest seed")
        save(figure, path)
    return True


def _scatter_masks(axes: Axes, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    scores = tensors["scores"].numpy()
    _scatter_clients(axes, scores[:-1], tensors)
    axes.scatter(scores[-1, 0], scores[-1, 1], s=130, c=COLOURS[2], marker="*", label="root model")
    axes.set(xlabel="first principal component", ylabel="second principal component")
    _legend_below(axes)


def _scatter_witnesses(axes: Axes, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    _scatter_clients(axes, torch.stack([tensors["keep_share"], tensors["agreement"]], 1).numpy(), tensors)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xlabel="keep share: ones among the bits that vary", ylabel="agreement with the root direction")
    _legend_below(axes)


def _scatter_clients(axes: Axes, points: np.ndarray, tensors: dict[str, Tensor]) -> None:
    """One of the ``(K, 2)`` points per client, coloured by its kind; a ring says it is rejected."""
    malicious, rejected = tensors["malicious"].numpy(), ~tensors["benign"].numpy()
    for kind, chosen, colour, marker in (
        ("honest client", ~malicious, COLOURS[0], "o"),
        ("attacker", malicious, COLOURS[1], "^"),
    ):
        if chosen.any():
            label = f"{kind} ({int(chosen.sum())})"
            axes.scatter(points[chosen, 0], points[chosen, 1], s=26, c=colour, marker=marker, alpha=0.7, lw=0, label=label)
    if rejected.any():
        label = f"rejected ({int(rejected.sum())})"
        axes.scatter(points[rejected, 0], points[rejected, 1], s=70, facecolors="none", edgecolors="black", lw=0.8, label=label)


def _legend_below(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=0.8)


def _show_evidence(axes: Axes, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # Attackers come first; within attackers and within honest clients, rejected ones come first.
    order = sorted(range(len(tensors["clients"])), key=lambda i: (not tensors["malicious"][i], bool(tensors["benign"][i]), i))
    image = axes.imshow(tensors["evidence"][order].numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
    layers = json.loads(metadata["layers"])
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    num_malicious = int(tensors["malicious"].sum())
    if num_malicious:
        axes.axhline(num_malicious - 0.5, color="white", lw=1.5)
    rejected = [row for row, client in enumerate(order) if not tensors["benign"][client]]
    # Crosses stand between the picture and its scale, where they hide nothing.
    axes.autoscale(False)
    axes.scatter([len(layers) - 0.35] * len(rejected), rejected, s=8, c="black", marker="x", lw=0.8, clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    label = f"clients, the {num_malicious} attackers on top" if num_malicious else "clients"
    axes.set_ylabel(label + ("; crosses: rejected" if rejected else ""))
    axes.figure.colorbar(image, ax=axes, label="share of bits unlike the benign majority")


def wrapped(text: str, width: int) -> str:
    """The text in lines of this width; its dollar signs do not begin a formula."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def _cycle(values: tuple[str, ...], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]
