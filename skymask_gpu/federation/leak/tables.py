"""An audit's results as text: the lines of ``leak.md`` and of the thresholds, and their legends."""

import json
from collections import Counter
from typing import Any

from skymask_gpu.federation.leak.config import Audit
from skymask_gpu.federation.leak.judging import Line, lookalikes
from skymask_gpu.federation.leak.thresholds import Threshold
from skymask_gpu.federation.leak.victims import Victims
from skymask_gpu.io.text_tables import latex_table, markdown_table

__all__ = [
    "COLUMNS", "THRESHOLD_COLUMNS", "html_values", "leak_text", "row", "scope", "threshold_row", "thresholds_latex",
    "thresholds_text",
]  # fmt: skip

COLUMNS = (
    "obfuscation", "attacker", "leaked", "95% interval", "recognised", "wrong image", "median SSIM", "median MSE",
    "identified", "label found", "evaluations", "diverged",
)  # fmt: skip
THRESHOLD_COLUMNS = (
    "obfuscation", "attacker", "leaked without it", "strongest leak", "weakest without a leak", "leaks there at most",
    "recognised there", "label found there", "counting bound",
)  # fmt: skip
_SCOPES = {
    "gradient": "Scope: one gradient of one image at a freshly initialised model, which is the attacker's best case. What a "
    'client sends after several steps on batches leaks less; leak.observe = "update" audits that.',
    "update": "Scope: what a client sends after {steps} steps on batches of {batch_size}, at a freshly initialised model, "
    "taken for one gradient of one image. A reconstruction is compared with that one of the client's {images} images which "
    "correlates most with it; label found: that of this image.",
}
_LEGEND = (
    "Leaked: images whose reconstruction has a structural similarity of at least 0.9 (Gaussian window of 11 pixels, sigma "
    "1.5, data range 1, no padding), at its best contrast and brightness; with the Clopper-Pearson interval. Recognised: "
    "at least 0.5. Wrong image: reconstructions that reach 0.9 beside another victim's image, of the same class if "
    "there is one. Identified: reconstructions that correlate more "
    "with their own image than with any other of {pool:,} (chance: {images} in {pool:,}). Label found: by iDLG's rule. "
    "Evaluations: of the matching loss, per victim."
)
_THRESHOLD_LEGEND = (
    "Strongest leak: the strongest strength tried behind which an image leaked, and the share that leaked there. Weakest "
    "without a leak: the next stronger one tried; nothing leaked there and beyond. Leaks there at most: the largest share "
    "that is plausible then (Clopper-Pearson, one-sided, 95%). Leaked: structural similarity of at least 0.9; recognised: at "
    "least 0.5. Counting bound: a stronger mask leaves fewer independent numbers than an image has values, and an attacker "
    "without a prior should fail."
)


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


def threshold_row(one: Threshold) -> list[str]:
    """A line of the thresholds as texts."""
    none = one.strength is None
    return [
        one.obfuscation,
        one.attacker,
        f"{one.undefended:.1%}",
        "none" if one.leaks_at is None else f"{one.leaks_at:g} ({one.leaked_there:.1%})",
        "none" if none else f"{one.strength:g}",
        "-" if none else f"{one.at_most:.1%}",
        "-" if none else f"{one.recognised:.1%}",
        "-" if none else f"{one.labels:.1%}",
        "-" if one.counting is None else f"{one.counting:.2f}",
    ]


def scope(audit: Audit) -> str:
    """What was attacked, and how much that says about clients."""
    recipe = audit.local
    return _SCOPES[audit.leak.observe].format(steps=recipe.steps, batch_size=recipe.batch_size, images=audit.images_per_victim)


def _legend(victims: Victims) -> str:
    return _LEGEND.format(pool=len(victims.pool), images=victims.images.shape[1])


def leak_text(title: str, audit: Audit, victims: Victims, table: list[Line]) -> str:
    """All lines as a Markdown page."""
    return (
        f"# {title}\n\n{scope(audit)}\n\n{_setting(audit, victims)} {_control(table)} {_lookalikes(victims)}\n\n"
        f"{markdown_table(COLUMNS, [row(line) for line in table])}\n{_legend(victims)}\n"
    )


def thresholds_text(title: str, audit: Audit, victims: Victims, table: list[Line], found: list[Threshold]) -> str:
    """The weakest strengths without a leak as a Markdown page."""
    return (
        f"# The weakest strengths without a leak: {title}\n\n{scope(audit)}\n\n{_setting(audit, victims)} {_control(table)}\n\n"
        f"{markdown_table(THRESHOLD_COLUMNS, [threshold_row(one) for one in found])}\n{_THRESHOLD_LEGEND}\n"
    )


def thresholds_latex(title: str, audit: Audit, victims: Victims, found: list[Threshold]) -> str:
    """The same as a LaTeX table."""
    caption = f"The weakest strengths without a leak: {title}. {_setting(audit, victims)} {_THRESHOLD_LEGEND} {scope(audit)}"
    return latex_table(caption, THRESHOLD_COLUMNS, [threshold_row(one) for one in found])


def html_values(audit: Audit, victims: Victims, table: list[Line], found: list[Threshold]) -> dict[str, Any]:
    """What the template of the audit's page shows, besides pictures."""
    return {
        "notes": [scope(audit), f"{_setting(audit, victims)} {_control(table)} {_lookalikes(victims)}"],
        "threshold_columns": THRESHOLD_COLUMNS,
        "thresholds": [threshold_row(one) for one in found],
        "threshold_legend": _THRESHOLD_LEGEND,
        "columns": COLUMNS,
        "rows": [row(line) for line in table],
        "legend": _legend(victims),
        "settings": json.dumps(audit.settings(), indent=2),
    }


def _setting(audit: Audit, victims: Victims) -> str:
    leak, shape = audit.leak, "x".join(map(str, victims.shape))
    return (
        f"{leak.victims} victims of {audit.data.dataset} with {shape} values, model {audit.model.name} with "
        f"{victims.gradients.shape[1]:,} parameters, seed {audit.seed}. Starts per victim: {leak.restarts}, each of at "
        f"most {leak.evaluations} evaluations. Total variation of those who know a prior: {leak.tv:g}."
    )


def _control(table: list[Line]) -> str:
    """What an attacker without a gradient finds; the similarity of a leak must be out of reach."""
    control = next((line for line in table if line.attacker == "prior"), None)
    if control is None:
        return "The control, an attacker who sees no gradient, was not asked for (attackers: prior)."
    return (
        "The control, an attacker who sees no gradient, reaches a similarity of 0.9 for "
        f"{control.leaked:.1%} of the images and 0.5 for {control.recognised:.1%}."
    )


def _lookalikes(victims: Victims) -> str:
    """How often the wrong image is like the right one without any attack."""
    if victims.images.shape[1] > 1:
        return "A wrong image is that one of another client's images which correlates most with the reconstruction."
    if victims.others is None:
        return "With one victim, there is no wrong image to compare with."
    alike = lookalikes(victims)
    classes = ", ".join(
        f"{count} of class {label}" for label, count in sorted(Counter(victims.labels[alike, 0].tolist()).items())
    )
    return (
        f"The wrong image itself, without any attack, has a similarity of 0.9 with the right one for {len(alike)} of "
        f"{len(victims.images)} victims{f' ({classes})' if classes else ''}: a perfect reconstruction reaches 0.9 beside both."
    )
