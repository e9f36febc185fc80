"""The TOML file of a privacy audit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import ModelConfig, read_toml
from skymask_gpu.federation.datasets import DATASETS
from skymask_gpu.federation.leak.obfuscation import METHODS, UNTOUCHED, Obfuscation
from skymask_gpu.federation.tables import as_table, read_table

__all__ = ["ATTACKERS", "OBSERVED", "SEARCH", "Audit", "LeakConfig", "LeakData", "Strengths", "read_audit"]

ATTACKERS = ("naive", "aware", "rank1", "prior")
OBSERVED = ("gradient", "update")
# What stands in the place of a list of strengths if the weakest one without a leak is wanted.
SEARCH = "search"


@dataclass(frozen=True, kw_only=True)
class LeakData:
    """``[data]``: where the private images come from.

    Attributes:
        dataset: the data set's name; its samples must be images.
        data_dir: the folder with its standard files.
    """

    dataset: str = "digits"
    data_dir: str = ""

    def __post_init__(self) -> None:
        one_of("data.dataset", self.dataset, DATASETS)


@dataclass(frozen=True, kw_only=True)
class LeakConfig:
    """``[leak]``: who is attacked, and how.

    Attributes:
        victims: the number of private images, drawn from the training data.
        attackers: ``"naive"`` takes what was sent for the gradient, as iDLG does; ``"aware"`` knows
            the obfuscation, and that images are smooth; ``"rank1"`` solves a linear first layer in
            closed form; ``"prior"`` is a control that sees no gradient, and knows only that images
            are smooth.
        restarts: the number of starts per image; the one with the smallest matching loss counts.
        evaluations: the largest number of evaluations of the loss per start.
        tv: the weight of total variation beside the relative matching loss, for the attackers
            ``"aware"`` and ``"prior"``.
        side: images are resized to this height and width; 0 leaves them as they are.
        observe: what the attacker sees of a victim: ``"gradient"``, that of one image, or
            ``"update"``, what a client of a run sends after training by the recipe in ``[local]``.
    """

    victims: int = 32
    attackers: tuple[str, ...] = ("naive", "aware", "prior")
    restarts: int = 1
    evaluations: int = 900
    tv: float = 2e-7
    side: int = 0
    observe: str = "gradient"

    def __post_init__(self) -> None:
        for name in ("victims", "restarts", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"leak.{name} must be at least 1, got {getattr(self, name)}")
        if not self.attackers or len(set(self.attackers)) < len(self.attackers):
            raise ValueError(f"leak.attackers must be a list of different names, got {list(self.attackers)}")
        for attacker in self.attackers:
            one_of("leak.attackers", attacker, ATTACKERS)
        one_of("leak.observe", self.observe, OBSERVED)
        if not (math.isfinite(self.tv) and self.tv >= 0):
            raise ValueError(f"leak.tv must be finite and at least 0, got {self.tv}")
        if self.side < 0:
            raise ValueError(f"leak.side must be a number of pixels, or 0 for images as they are, got {self.side}")


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """``[privacy]``: the strengths of each obfuscation. No obfuscation at all is always audited.

    ``"search"`` in the place of a list tries eight strengths, and then looks for the weakest one
    without a leak, for each attacker.

    Attributes:
        mask: the probability that an entry is set to 0.
        clip: the quantile of the client's magnitudes that its entries are clipped at; smaller is
            stronger.
        prune: the share of entries, the smallest of each layer, that are set to 0.
        noise: the standard deviation of normal noise, per root mean square of the gradient.
    """

    mask: tuple[float, ...] | str = ()
    clip: tuple[float, ...] | str = ()
    prune: tuple[float, ...] | str = ()
    noise: tuple[float, ...] | str = ()

    def __post_init__(self) -> None:
        for name in METHODS:
            strengths = getattr(self, name)
            if isinstance(strengths, str):
                if strengths != SEARCH:
                    raise ValueError(f"privacy.{name} must be a list of strengths, or {SEARCH!r}, got {strengths!r}")
            elif len(set(strengths)) < len(strengths):
                raise ValueError(f"privacy.{name} must be a list of different strengths, got {list(strengths)}")
        self.obfuscations()

    def searched(self) -> list[str]:
        """The methods whose weakest strength without a leak is searched for."""
        return [name for name in METHODS if getattr(self, name) == SEARCH]

    def obfuscations(self) -> list[Obfuscation]:
        """The strengths of the file, or a search's first ones, each method's from weak to strong.

        No obfuscation at all comes first.
        """
        return [UNTOUCHED, *sorted(Obfuscation(name, one) for name in METHODS for one in self._first(name))]

    def _first(self, name: str) -> tuple[float, ...]:
        strengths: tuple[float, ...] | str = getattr(self, name)
        return METHODS[name].grid if isinstance(strengths, str) else strengths


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A privacy audit.

    Attributes:
        seed: the seed of the victims, of the model, of all draws and starts.
        plugins: absolute paths of Python files that register models or data sets.
    """

    seed: int = 0
    plugins: tuple[str, ...] = ()
    data: LeakData = field(default_factory=LeakData)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="lenet"))
    local: LocalTraining = field(default_factory=LocalTraining)
    leak: LeakConfig = field(default_factory=LeakConfig)
    privacy: Strengths = field(default_factory=Strengths)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be between 0 and 2**31 - 1, got {self.seed}")
        if self.local.epochs:
            raise ValueError(
                f"local.epochs must be 0 in an audit, got {self.local.epochs}; a victim sees local.steps batches of its own"
            )

    @property
    def images_per_victim(self) -> int:
        """The number of images that each victim trains on."""
        return self.local.steps * self.local.batch_size if self.leak.observe == "update" else 1

    def with_data(self, data_dir: Path | None) -> "Audit":
        """The same audit with the data set's files in another folder."""
        return self if data_dir is None else replace(self, data=replace(self.data, data_dir=str(data_dir)))

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as tables that JSON can hold."""
        table: dict[str, Any] = as_table(self)
        del table["data"]["data_dir"], table["plugins"]
        if self.leak.observe == "gradient":
            del table["local"]
        return table


def read_audit(path: Path, changes: Sequence[str] = ()) -> Audit:
    """Read the audit of a TOML file, after importing its plugins.

    ``changes`` of the command line, each as ``"key=value"``, replace settings of the file.

    Raises:
        ValueError: no such file, no TOML, an unknown key, or a value out of range.
    """
    audit: Audit = read_table(Audit, read_toml(path, changes), str(path))
    return audit
