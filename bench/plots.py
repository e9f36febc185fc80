"""Plots of a benchmark, written as PNG files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from skymask_gpu.bench.providers import MEAN, PASSES
from skymask_gpu.bench.table import Row
from skymask_gpu.io.files import write_whole

__all__ = ["plot_memory", "plot_time"]

# Okabe & Ito's palette, which can be told apart without red-green vision. Yellow is too pale for
# lines and left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "-.", ":")
_FLOORS = {MEAN: "#777777", PASSES: "#bbbbbb"}
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 10}


def plot_time(rows: list[Row], path: Path) -> None:
    """Time over the number of clients.

    There is one panel per case and dtype and one line per provider; baselines are dashed.
    """
    _plot_against_clients(rows, lambda row: row.median_s, "seconds", path)


def plot_memory(rows: list[Row], path: Path) -> None:
    """Peak memory over the number of clients, likewise."""
    _plot_against_clients(rows, lambda row: row.peak_bytes / 2**20 if row.peak_bytes else None, "peak MiB", path)


def _plot_against_clients(rows: list[Row], value: Callable[[Row], float | None], label: str, path: Path) -> None:
    panels = list(dict.fromkeys((row.case, row.dtype) for row in rows if value(row) is not None))
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(lines, columns, figsize=(4.6 * columns, 4.9 * lines), layout="constrained", squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, (case, dtype) in zip(grid.flat, panels, strict=False):
            members = [row for row in rows if (row.case, row.dtype) == (case, dtype)]
            _lines(axes, members, value)
            axes.set(title=f"{case}, {dtype}, P = {members[0].params:,}", xlabel="clients N", ylabel=label)
        figure.suptitle(f"{rows[0].device}, {rows[0].threads} threads; bands: 20th to 80th percentile" * (label == "seconds"))
        _save(figure, path)


def _lines(axes: Axes, rows: list[Row], value: Callable[[Row], float | None]) -> None:
    """One line per provider; a cross on top where memory ran out or the result was wrong."""
    names = list(dict.fromkeys(row.provider for row in rows if value(row) is not None))
    styles = _styles(names)
    for name in names:
        points = [(row.clients, y, row) for row in rows if row.provider == name and (y := value(row)) is not None]
        clients, values, members = zip(*points, strict=True)
        axes.loglog(clients, values, label=name, lw=1.5, ms=4, mfc="none", **styles[name])
        if value(members[0]) == members[0].median_s:
            low, high = [row.p20_s for row in members], [row.p80_s for row in members]
            axes.fill_between(clients, low, high, color=styles[name]["color"], alpha=0.15, lw=0)
    for status, marker in (("out of memory", "x"), ("wrong", "*")):
        where = sorted({row.clients for row in rows if row.status == status})
        if where:
            top: Any = axes.get_xaxis_transform()
            axes.plot(where, [0.98] * len(where), marker, color="red", transform=top, label=f"{status} (see summary)")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.clients for row in rows if value(row) is not None})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    others = [name for name in names if name not in _FLOORS]
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "ls": _DASHES[i // len(_COLOURS) % len(_DASHES)],
        }
        for i, name in enumerate(others)
    }
    return styles | {name: {"color": colour, "ls": "--", "marker": "."} for name, colour in _FLOORS.items() if name in names}


def _save(figure: Figure, path: Path) -> None:
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)
