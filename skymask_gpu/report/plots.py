"""Plots of runs, written as PNG files."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from skymask_gpu.federation.rounds import MASKS
from skymask_gpu.files import read_tensors, write_whole
from skymask_gpu.report.summary import FinishedRun

__all__ = ["plot_evidence", "plot_masks", "plot_rounds"]

# Okabe & Ito's palette, distinguishable without red-green vision
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 10}


def plot_rounds(runs: list[FinishedRun], path: Path) -> None:
    """Accuracy, and the rates of honest clients rejected and of attackers kept, by round; one colour a run."""
    with plt.rc_context(_STYLE):
        figure, (accuracy, rates) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for run, colour in zip(runs, _cycle(len(runs)), strict=True):
            rounds = [record["round"] + 1 for record in run.records]
            marker = "o" if len(rounds) < 30 else None
            accuracy.plot(
                rounds, [100 * r["accuracy"] for r in run.records], color=colour, marker=marker, ms=4, label=run.config.name
            )
            rates.plot(
                rounds,
                [100 * r["false_positive_rate"] for r in run.records],
                color=colour,
                marker=marker,
                ms=4,
                label=f"{run.config.name}: honest rejected",
            )
            if run.records[0]["false_negative_rate"] is not None:
                rates.plot(
                    rounds,
                    [100 * r["false_negative_rate"] for r in run.records],
                    color=colour,
                    ls="--",
                    marker=None if marker is None else "x",
                    ms=5,
                    label=f"{run.config.name}: attackers kept",
                )
        accuracy.set(title="Accuracy of the global model", xlabel="round", ylabel="test samples right (%)", ylim=(0, 102))
        rates.set(title="Verdicts", xlabel="round", ylabel="share of clients (%)", ylim=(-3, 103))
        for axes in (accuracy, rates):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(fontsize=8, frameon=False)
        _save(figure, path)


def plot_masks(runs: list[FinishedRun], path: Path) -> bool:
    """The last round's masks in their first two principal components, coloured by client kind; False if no run has masks."""
    with_masks = [run for run in runs if (run.folder / MASKS).exists()]
    if not with_masks:
        return False
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(with_masks), figsize=(5.5 * len(with_masks), 4.5), layout="constrained", squeeze=False
        )
        for run, axes in zip(with_masks, panels[0], strict=True):
            _scatter_masks(axes, run)
        _save(figure, path)
    return True


def plot_evidence(runs: list[FinishedRun], path: Path) -> bool:
    """Clients by layers: where the last round's masks differ from the benign majority's; False if no run has masks."""
    with_masks = [run for run in runs if (run.folder / MASKS).exists()]
    if not with_masks:
        return False
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure, panels = plt.subplots(
            1, len(with_masks), figsize=(5.5 * len(with_masks), 5.5), layout="constrained", squeeze=False
        )
        for run, axes in zip(with_masks, panels[0], strict=True):
            tensors, metadata = read_tensors(run.folder / MASKS)
            # attackers first, rejected first among each
            order = sorted(
                range(len(tensors["clients"])), key=lambda i: (not tensors["malicious"][i], bool(tensors["benign"][i]), i)
            )
            image = axes.imshow(tensors["evidence"][order], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
            layers = json.loads(metadata["layers"])
            axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
            num_malicious = int(tensors["malicious"].sum())
            if num_malicious:
                axes.axhline(num_malicious - 0.5, color="white", lw=1.5)
            axes.set(
                title=f"{run.config.name}: evidence of round {int(metadata['round']) + 1}",
                ylabel=f"clients, the {num_malicious} attackers on top" if num_malicious else "clients",
            )
            figure.colorbar(image, ax=axes, label="share of bits unlike the benign majority")
        _save(figure, path)
    return True


def _scatter_masks(axes: Axes, run: FinishedRun) -> None:
    tensors, metadata = read_tensors(run.folder / MASKS)
    scores, malicious, benign = tensors["scores"], tensors["malicious"], tensors["benign"]
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
    axes.set(
        title=f"{run.config.name}: masks of round {int(metadata['round']) + 1}",
        xlabel="first principal component",
        ylabel="second principal component",
    )
    axes.legend(fontsize=8, frameon=False)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _save(figure: Any, path: Path) -> None:
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)
