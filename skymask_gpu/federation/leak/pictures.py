"""An audit's pictures: ``curves.png``, how much leaked by strength, and ``faces.png``."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.engine.similarity import brightness_adjusted
from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.judging import Line
from skymask_gpu.federation.leak.obfuscation import METHODS, UNTOUCHED, Obfuscation
from skymask_gpu.federation.leak.thresholds import Threshold
from skymask_gpu.federation.leak.victims import Victims

__all__ = ["plot_curves", "plot_faces"]

# With more strengths than this, their labels need to stand upright.
_UPRIGHT = 8
# The number of white pixels between two images.
_GAP = 2
# How high a row of images is, and how wide a letter of its label.
_ROW_INCHES, _LETTER_INCHES = 0.6, 0.09


def plot_curves(audit: Audit, table: list[Line], path: Path) -> None:
    """A panel per method: the shares of leaked and of recognised images by strength."""
    methods = [name for name in METHODS if getattr(audit.privacy, name)] or ["none"]
    attackers = [name for name in audit.leak.attackers if name != "prior"]
    with styled(grid=True):
        figure = Figure(figsize=(4.2 * len(methods), 3.6), layout="constrained")
        for axes, method in zip(figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods, strict=True):
            shown = [line for line in table if line.attacker in attackers and line.obfuscation in (method, "none")]
            # A search tries other strengths for each attacker.
            places = {one: place for place, one in enumerate(sorted({line.setting for line in shown}))}
            for colour, attacker in zip(COLOURS, attackers, strict=False):
                own = [line for line in shown if line.attacker == attacker]
                at = [places[line.setting] for line in own]
                axes.plot(at, [100 * line.leaked for line in own], "o-", color=colour, label=f"{attacker}, SSIM at least 0.9")
                least, most = [100 * line.least for line in own], [100 * line.most for line in own]
                axes.fill_between(at, least, most, color=colour, alpha=0.15, linewidth=0)
                axes.plot(at, [100 * line.recognised for line in own], "s:", color=colour, label=f"{attacker}, at least 0.5")
            labels = ["none" if one == UNTOUCHED else f"{one.strength:g}" for one in places]
            axes.set_xticks(list(places.values()), labels, rotation=90 if len(places) > _UPRIGHT else 45)
            axes.set(xlabel=f"{method}, from weak to strong", ylim=(-3, 103))
        figure.axes[0].set_ylabel("images that leaked (%)")
        figure.axes[0].legend(fontsize="small")
        save(figure, path)


def plot_faces(audit: Audit, victims: Victims, records: list[dict[str, Any]], found: list[Threshold], path: Path) -> None:
    """The first victims' images, and below them their reconstructions: as found, and adjusted."""
    stored: dict[tuple[Obfuscation, str], list[Tensor]] = {}
    for record in records:
        images = [torch.tensor(one["image"]) for one in record["victims"] if "image" in one]
        key = Obfuscation(record["obfuscation"], record["strength"]), record["attacker"]
        if images and _is_shown(audit, *key, found):
            stored.setdefault(key, []).extend(images)
    count = min(map(len, stored.values()))
    originals = victims.images[:count, 0]
    rows = [("original" if victims.images.shape[1] == 1 else "one of the client's images", originals, originals)]
    for (obfuscation, attacker), images in sorted(stored.items(), key=lambda item: (item[0][1] == "prior", item[0])):
        shown = torch.stack(images).view_as(originals)
        rows.append((f"{obfuscation.label}, {attacker}", shown.clamp(0, 1), brightness_adjusted(originals, shown)))
    _draw_sheet(rows, path)


def _is_shown(audit: Audit, obfuscation: Obfuscation, attacker: str, found: list[Threshold]) -> bool:
    """Whether a strength is from the file, or one of the two that a search ended between."""
    if obfuscation.method not in audit.privacy.searched():
        return True
    ends = [(one.leaks_at, one.strength) for one in found if (one.obfuscation, one.attacker) == (obfuscation.method, attacker)]
    return obfuscation.strength in ends[0]


def _draw_sheet(rows: list[tuple[str, Tensor, Tensor]], path: Path) -> None:
    """One picture of all images side by side: an axis for each would take minutes to lay out."""
    count, width = len(rows[0][1]), rows[0][1].shape[3] + _GAP
    parts = []
    for _, *groups in rows:
        padded = [F.pad(image, (0, _GAP, 0, _GAP), value=1.0) for group in groups for image in group]
        # a wider gap between the two groups
        padded[count - 1] = F.pad(padded[count - 1], (0, width // 2, 0, 0), value=1.0)
        parts.append(torch.cat(padded, 2))
    sheet = torch.cat(parts, 1)
    height = sheet.shape[1] // len(rows)
    grey = sheet.shape[0] == 1
    with styled(grid=False):
        letters = max(len(label) for label, *_ in rows)
        size = _ROW_INCHES * sheet.shape[2] / height + _LETTER_INCHES * letters + 0.3, _ROW_INCHES * len(rows) + 0.4
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        # Smoothed pixels would hide noise, and their file is several times as large.
        shown = sheet[0] if grey else sheet.movedim(0, 2)
        axes.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest")
        middles = [count * width / 2, (1.5 * count + 0.5) * width]
        axes.set_xticks(middles, ["as found", "at its best contrast and brightness"])
        axes.set_yticks([height * (number + 0.5) for number in range(len(rows))], [label for label, *_ in rows])
        axes.tick_params(length=0)
        axes.set_anchor("E")
        axes.spines[:].set_visible(False)
        save(figure, path)
