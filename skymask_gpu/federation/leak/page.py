"""An audit's results for people: ``leak.csv``, ``leak.md``, ``curves.png`` and ``faces.png``."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.engine.similarity import brightness_adjusted
from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.judging import Line, counting_bound, lines, weakest_without_leak
from skymask_gpu.federation.leak.obfuscation import METHODS, Obfuscation
from skymask_gpu.federation.leak.victims import Victims
from skymask_gpu.io.files import write_text
from skymask_gpu.io.text_tables import csv_table, markdown_table

__all__ = ["COLUMNS", "SCOPE", "row", "write_audit"]

COLUMNS = (
    "obfuscation", "attacker", "leaked", "95% interval", "recognised", "wrong image", "median SSIM", "median MSE",
    "identified", "label found", "evaluations", "diverged",
)  # fmt: skip
SCOPE = (
    "Scope: one gradient of one image at a freshly initialised model, which is the attacker's best case. What a client "
    "sends after several steps on batches should leak less, which is not measured."
)
_THRESHOLDS = ("obfuscation", "attacker", "weakest strength without a leak", "leak share there is at most")
_LEGEND = (
    "Leaked: images whose reconstruction has a structural similarity of at least 0.9 (Gaussian window of 11 pixels, sigma "
    "1.5, data range 1, no padding), at its best contrast and brightness; with the Clopper-Pearson interval. Recognised: "
    "at least 0.5. Wrong image: reconstructions that reach 0.9 beside another victim's image, of the same class if "
    "there is one; where this is not near 0, the threshold says little. Identified: reconstructions that correlate more "
    "with their own image than with any other of {pool:,} (chance: one in {pool:,}). Label found: by iDLG's rule. "
    "Evaluations: of the matching loss, per victim."
)


def write_audit(title: str, audit: Audit, victims: Victims, records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write what a finished audit found into ``folder``, each file as a whole."""
    table = lines(records)
    write_text(folder / "leak.csv", csv_table(Line, table))
    write_text(folder / "leak.md", _text(title, audit, victims, table))
    _plot_curves(audit, table, folder / "curves.png")
    _plot_faces(audit, victims, records, folder / "faces.png")
    return [folder / name for name in ("leak.csv", "leak.md", "curves.png", "faces.png")]


def row(line: Line) -> list[str]:
    """A line of the table as texts."""
    return [
        line.setting.label,
        line.attacker,
        f"{line.leaked:.1%}",
        f"{line.least:.1%} to {line.most:.1%}",
        f"{line.recognised:.1%}",
        "-" if line.wrong is None else f"{line.wrong:.1%}",
        f"{line.ssim:.3f}",
        f"{line.mse:.2g}",
        f"{line.identified:.1%}",
        f"{line.labels:.1%}",
        f"{line.evaluations:.0f}",
        str(line.diverged),
    ]


def _text(title: str, audit: Audit, victims: Victims, table: list[Line]) -> str:
    leak, shape = audit.leak, "x".join(map(str, victims.images.shape[1:]))
    text = (
        f"# {title}\n\n{SCOPE}\n\n{leak.victims} victims of {audit.data.dataset} with {shape} values, model {audit.model.name} "
        f"with {victims.gradients.shape[1]:,} parameters, seed {audit.seed}. Starts per victim: {leak.restarts}, each of at "
        f"most {leak.evaluations} evaluations. Total variation of the aware attacker: {leak.tv:g}.\n\n"
    )
    text += f"{markdown_table(COLUMNS, [row(line) for line in table])}\n{_LEGEND.format(pool=len(victims.pool))}\n"
    text += f"\n## The weakest strength without a leak\n\n{markdown_table(_THRESHOLDS, _thresholds(table))}"
    if audit.privacy.mask:
        text += (
            f"\nCounting: a mask of more than {counting_bound(victims):.2f} leaves fewer independent numbers than an image has "
            "values. An attacker who has no prior should then fail, whatever it does.\n"
        )
    return text


def _thresholds(table: list[Line]) -> list[list[str]]:
    rows = []
    for method in METHODS:
        for attacker in dict.fromkeys(line.attacker for line in table):
            own = [line for line in table if (line.obfuscation, line.attacker) == (method, attacker)]
            if own:
                found = weakest_without_leak(own)
                end = (
                    [f"none up to {own[-1].strength:g}", "-"] if found is None else [f"{found.strength:g}", f"{found.most:.1%}"]
                )
                rows.append([method, attacker, *end])
    return rows


def _plot_curves(audit: Audit, table: list[Line], path: Path) -> None:
    """A panel per method: the shares of leaked and of recognised images by strength."""
    methods = [name for name in METHODS if getattr(audit.privacy, name)] or ["none"]
    with styled(grid=True):
        figure = Figure(figsize=(4.2 * len(methods), 3.6), layout="constrained")
        for axes, method in zip(figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods, strict=True):
            for colour, attacker in zip(COLOURS, audit.leak.attackers, strict=False):
                own = [line for line in table if line.attacker == attacker and line.obfuscation in (method, "none")]
                at = range(len(own))
                axes.plot(at, [100 * line.leaked for line in own], "o-", color=colour, label=f"{attacker}, SSIM at least 0.9")
                least, most = [100 * line.least for line in own], [100 * line.most for line in own]
                axes.fill_between(at, least, most, color=colour, alpha=0.15, linewidth=0)
                axes.plot(at, [100 * line.recognised for line in own], "s:", color=colour, label=f"{attacker}, at least 0.5")
                labels = ["none" if line.obfuscation == "none" else f"{line.strength:g}" for line in own]
                axes.set_xticks(list(at), labels, rotation=45)
            axes.set(xlabel=f"{method}, from weak to strong", ylim=(-3, 103))
        figure.axes[0].set_ylabel("images that leaked (%)")
        figure.axes[0].legend(fontsize="small")
        save(figure, path)


def _plot_faces(audit: Audit, victims: Victims, records: list[dict[str, Any]], path: Path) -> None:
    """The first victims' images, and below each its reconstructions, as they are and adjusted."""
    stored: dict[tuple[Obfuscation, str], list[Tensor]] = {}
    for record in records:
        found = [torch.tensor(one["image"]) for one in record["victims"] if "image" in one]
        if found:
            key = Obfuscation(record["obfuscation"], record["strength"]), record["attacker"]
            stored.setdefault(key, []).extend(found)
    count = min(map(len, stored.values()))
    images = victims.images[:count]
    rows: list[tuple[str, Tensor]] = [("original", images)]
    for (obfuscation, attacker), found in sorted(stored.items(), key=lambda item: item[0]):
        shown = torch.stack(found).view_as(images)
        rows += [(f"{obfuscation.label}, {attacker}", shown.clamp(0, 1)), ("adjusted", brightness_adjusted(images, shown))]
    # One picture of all images side by side: an axis for each would take minutes to lay out.
    sheet = torch.cat([torch.cat([F.pad(image, (0, 2, 0, 2), value=1.0) for image in shown], 2) for _, shown in rows], 1)
    height = sheet.shape[1] // len(rows)
    grey = sheet.shape[0] == 1
    with styled(grid=False):
        figure = Figure(figsize=(2.2 + 0.8 * count, 0.85 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(sheet[0] if grey else sheet.movedim(0, 2), cmap="gray" if grey else None, vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([height * (number + 0.5) for number in range(len(rows))], [label for label, _ in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        save(figure, path)
