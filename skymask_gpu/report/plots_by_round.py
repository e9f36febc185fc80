"""Pictures of what happens by round: verdicts, who was rejected when, where the masks lie."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.report.history import State, Verdicts, positions_by_round, verdicts
from skymask_gpu.report.panels import RATES, few_runs
from skymask_gpu.report.plots import wrapped
from skymask_gpu.report.summary import FinishedRun

__all__ = ["STATES", "plot_masks_by_round", "plot_rejections", "plot_verdicts"]

# Right verdicts are blue, wrong ones orange or red.
STATES = {
    State.ABSENT: ("took no part", "#FFFFFF"),
    State.HONEST_KEPT: ("honest, kept", "#CFE3F1"),
    State.HONEST_REJECTED: ("honest, rejected", "#E69F00"),
    State.ATTACKER_KEPT: ("attacker, kept", "#D55E00"),
    State.ATTACKER_REJECTED: ("attacker, rejected", "#0072B2"),
    State.UNKNOWN: ("kept or took no part", "#DDDDDD"),
}
_WHAT = {"FPR": "honest rejected", "FNR": "attackers kept"}
# The most rounds in which each cell of the verdicts has its number written in it.
_ROUNDS_WITH_NUMBERS = 15
# The most panels of the picture of masks by round, and how many are side by side.
_MASK_PANELS = 24
_MASK_PANELS_PER_ROW = 6
_PANELS_PER_ROW = 3


def plot_verdicts(runs: list[FinishedRun], path: Path) -> bool:
    """Plot both error rates by round as strips of colour, two per run.

    Lines would hide one another, since many rates are exactly 0 or 1.

    Returns:
        False, with nothing written, if the runs are too many or no rule judges clients.
    """
    strips = _strips(runs) if len(few_runs(runs)) == len(runs) else []
    if not strips:
        return False
    rounds = sorted({number for _, rates in strips for number in rates})
    values = np.array([[100 * rates.get(number, math.nan) for number in rounds] for _, rates in strips])
    with styled(grid=False):
        figure = Figure(figsize=(max(6.5, min(12, 3.2 + 0.42 * len(rounds))), 1.6 + 0.36 * len(strips)), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("#EEEEEE")
        image = axes.imshow(values, aspect="auto", cmap="YlOrBr", vmin=0, vmax=100, interpolation="none")
        axes.set_yticks(range(len(strips)), [wrapped(name, 44) for name, _ in strips], fontsize=8)
        axes.set_xticks(range(len(rounds)), [str(number + 1) for number in rounds])
        if len(rounds) > _ROUNDS_WITH_NUMBERS:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
            axes.xaxis.set_major_formatter(lambda at, _: str(rounds[int(at)] + 1) if 0 <= at < len(rounds) else "")
        else:
            for (row, column), value in np.ndenumerate(values):
                if not math.isnan(value):
                    colour = "white" if value > 60 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axes.hlines(np.arange(2, len(strips), 2) - 0.5, -0.5, len(rounds) - 0.5, color="white", lw=3)
        axes.set(title="Verdicts: share of clients judged wrongly (%); grey: nobody to judge", xlabel="round")
        figure.colorbar(image, ax=axes)
        save(figure, path)
    return True


def _strips(runs: list[FinishedRun]) -> list[tuple[str, dict[int, float]]]:
    """The name of each strip, and its rates by round; two strips per run that judges clients."""
    strips = []
    for run in runs:
        rates = {
            kind: {record["round"]: record[key] for record in run.records if record.get(key) is not None}
            for kind, key in RATES.items()
        }
        if any(rates.values()):
            strips += [(f"{run.name}: {_WHAT[kind]}", rates[kind]) for kind in RATES]
    return strips


def plot_rejections(runs: list[FinishedRun], path: Path) -> bool:
    """Plot who was rejected when: clients by rounds, the attackers on top.

    Returns:
        False, with nothing written, if no rule judges clients.
    """
    judged = {id(run): found for run in runs if (found := verdicts(run)) is not None}
    shown = few_runs([run for run in runs if id(run) in judged])
    if not shown:
        return False
    num_columns = min(_PANELS_PER_ROW, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    with styled(grid=False):
        figure = Figure(figsize=(max(4.3 * num_columns, 6.5), 4.6 * num_rows + 0.8), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for run, axes in zip(shown, grid.flat, strict=False):
            _show_states(axes, judged[id(run)])
            axes.set_title(wrapped(run.name, 40), fontsize=10)
        there = {state for run in shown for state in np.unique(judged[id(run)].states)}
        handles = [
            Patch(facecolor=colour, edgecolor="grey", label=name) for state, (name, colour) in STATES.items() if state in there
        ]
        note = f"{len(shown)} of {len(judged)} runs: one per attack, with the lowest seed" if len(shown) < len(judged) else None
        figure.legend(
            handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False, title=note, title_fontsize=8
        )
        save(figure, path)
    return True


def _show_states(axes: Axes, found: Verdicts) -> None:
    colours = ListedColormap([colour for _, colour in STATES.values()])
    first, last = found.rounds[0] + 0.5, found.rounds[-1] + 1.5
    num_clients = len(found.states)
    # Columns are evenly spaced: a record of every round is there, or none.
    axes.imshow(
        found.states, aspect="auto", cmap=colours, vmin=-0.5, vmax=len(STATES) - 0.5, interpolation="none",
        extent=(first, last, num_clients - 0.5, -0.5),
    )  # fmt: skip
    if 0 < found.malicious < num_clients:
        axes.axhline(found.malicious - 0.5, color="black", lw=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    label = f"client, the {found.malicious} attackers above the line" if found.malicious else "client"
    axes.set(xlabel="round", ylabel=label)


def plot_masks_by_round(runs: list[FinishedRun], path: Path) -> bool:
    """Plot where the masks lie in each round, in their first two principal components.

    One run has up to 24 rounds, several have fewer each, evenly spaced from the first to the last.

    Returns:
        False, with nothing written, if no run recorded positions.
    """
    places: dict[int, tuple[Verdicts, dict[int, np.ndarray]]] = {}
    for run in runs:
        found = verdicts(run)
        if found is not None and (points := positions_by_round(run, len(found.states))):
            places[id(run)] = found, points
    shown = few_runs([run for run in runs if id(run) in places])
    if not shown:
        return False
    per_run = _MASK_PANELS if len(shown) == 1 else _MASK_PANELS_PER_ROW
    panels = [(run, number) for run in shown for number in evenly_spaced(list(places[id(run)][1]), per_run)]
    num_columns = min(_MASK_PANELS_PER_ROW, len(panels))
    rows_of = [_rows([one for one in panels if one[0] is run], num_columns) for run in shown]
    rows = [row for own in rows_of for row in own]
    with styled(grid=False):
        figure = Figure(figsize=(max(2.1 * num_columns, 6.5), 2.25 * len(rows) + 0.7), layout="constrained")
        grid = figure.subplots(len(rows), num_columns, squeeze=False)
        for line, row in zip(grid, rows, strict=True):
            for axes in line[len(row) :]:
                axes.remove()
            for axes, (run, number) in zip(line, row, strict=False):
                found, points = places[id(run)]
                _scatter(axes, points[number], found.states[:, found.rounds.index(number)])
                name = f"{wrapped(run.name, 26)}\n" if axes is line[0] else ""
                axes.set_title(f"{name}round {number + 1}", fontsize=8)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        save(figure, path)
    return True


def evenly_spaced(numbers: list[int], count: int) -> list[int]:
    """At most ``count`` of the numbers, evenly spaced, with the first and the last.

    Example:
        >>> evenly_spaced([0, 1, 2, 3, 4, 5, 6], 3)
        [0, 3, 6]
    """
    if len(numbers) <= count:
        return numbers
    return [numbers[round(step * (len(numbers) - 1) / (count - 1))] for step in range(count)]


def _rows(panels: list[Any], per_row: int) -> list[list[Any]]:
    return [panels[first : first + per_row] for first in range(0, len(panels), per_row)]


def _scatter(axes: Axes, points: np.ndarray, states: np.ndarray) -> None:
    """One point per client, coloured by its kind; a ring says that it is rejected."""
    clients = points[:-1]
    attackers = np.isin(states, (State.ATTACKER_KEPT, State.ATTACKER_REJECTED))
    rejected = np.isin(states, (State.HONEST_REJECTED, State.ATTACKER_REJECTED))
    kinds: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
        ("honest client", ~attackers, {"c": COLOURS[0], "marker": "o", "s": 12}),
        ("attacker", attackers, {"c": COLOURS[1], "marker": "^", "s": 14}),
        ("rejected", rejected, {"facecolors": "none", "edgecolors": "black", "lw": 0.7, "s": 40}),
    )
    for name, chosen, style in kinds:
        axes.scatter(clients[chosen, 0], clients[chosen, 1], label=name, **{"lw": 0, **style})
    axes.scatter(points[-1:, 0], points[-1:, 1], c=COLOURS[2], marker="*", s=60, lw=0, label="root model")
    axes.set(xticks=[], yticks=[])
