"""How much leaked: shares of images with their intervals."""

from dataclasses import dataclass
from typing import Any

from skymask_gpu.engine.similarity import ssim
from skymask_gpu.federation.leak.obfuscation import Obfuscation
from skymask_gpu.federation.leak.victims import Victims

__all__ = ["THRESHOLDS", "Line", "interval", "lines", "lookalikes"]

# An image has leaked if its adjusted similarity is at least this: nearly the same, or recognisable.
THRESHOLDS = (0.9, 0.5)


@dataclass(frozen=True)
class Line:
    """One obfuscation and one attacker, over all victims.

    Attributes:
        victims: how many.
        leaked: the share of images whose adjusted similarity is at least 0.9.
        least, most: its Clopper-Pearson interval of 95%.
        recognised: the share of images whose adjusted similarity is at least 0.5.
        wrong: the share of reconstructions that reach 0.9 beside a wrong image; None for one
            victim.
        ssim, mse: the medians.
        identified: the share of reconstructions that correlate more with their own image than with
            any other of the pool.
        labels: the share of labels that were read off the gradient correctly.
        evaluations: the mean number per victim, over all restarts.
        diverged: the number of victims whose loss was never finite.
    """

    obfuscation: str
    strength: float
    attacker: str
    victims: int
    leaked: float
    least: float
    most: float
    recognised: float
    wrong: float | None
    ssim: float
    mse: float
    identified: float
    labels: float
    evaluations: float
    diverged: int

    @property
    def setting(self) -> Obfuscation:
        return Obfuscation(self.obfuscation, self.strength)


def lines(records: list[dict[str, Any]]) -> list[Line]:
    """A line per obfuscation and attacker, each method's from weak to strong."""
    groups: dict[tuple[Obfuscation, str], list[dict[str, Any]]] = {}
    for record in records:
        key = Obfuscation(record["obfuscation"], record["strength"]), record["attacker"]
        groups.setdefault(key, []).extend(record["victims"])
    order = sorted(groups, key=lambda key: (key[0].order[0], key[1], key[0]))
    return [_line(obfuscation, attacker, groups[obfuscation, attacker]) for obfuscation, attacker in order]


def _line(obfuscation: Obfuscation, attacker: str, rows: list[dict[str, Any]]) -> Line:
    near, recognisable = THRESHOLDS
    leaked = sum(row["ssim"] >= near for row in rows)
    least, most = interval(leaked, len(rows))
    beside_wrong = [row["ssim_wrong"] for row in rows if row["ssim_wrong"] is not None]
    return Line(
        obfuscation.method,
        obfuscation.strength,
        attacker,
        len(rows),
        leaked / len(rows),
        least,
        most,
        _share(row["ssim"] >= recognisable for row in rows),
        _share(value >= near for value in beside_wrong) if beside_wrong else None,
        _median(row["ssim"] for row in rows),
        _median(row["mse"] for row in rows),
        _share(row["identified"] for row in rows),
        _share(row["label"] == row["label_found"] for row in rows),
        sum(row["evaluations"] for row in rows) / len(rows),
        sum(row["end"] == "diverged" for row in rows),
    )


def _share(values: Any) -> float:
    known = list(values)
    return sum(known) / len(known)


def _median(values: Any) -> float:
    ordered = sorted(values)
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def interval(hits: int, trials: int) -> tuple[float, float]:
    """The Clopper-Pearson interval of 95% for a share (Biometrika 1934).

    Example:
        >>> [round(end, 3) for end in interval(0, 128)]
        [0.0, 0.028]
    """
    from scipy.stats import beta

    least = float(beta.ppf(0.025, hits, trials - hits + 1)) if hits else 0.0
    most = float(beta.ppf(0.975, hits + 1, trials - hits)) if hits < trials else 1.0
    return least, most


def lookalikes(victims: Victims) -> list[int]:
    """The victims of one image whose wrong image is a leak of theirs before anybody attacks.

    Where they are, reconstructions that reach 0.9 beside a wrong image are no fault of the attack.
    """
    if victims.others is None or victims.images.shape[1] > 1:
        return []
    similar = ssim(victims.images[victims.others, 0], victims.images[:, 0])
    return [victim for victim, value in enumerate(similar.tolist()) if value >= THRESHOLDS[0]]
