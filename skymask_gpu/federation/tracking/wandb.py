"""Weights & Biases, offline unless asked otherwise: ``wandb sync`` uploads what it wrote."""

from dataclasses import dataclass
from typing import Any

from skymask_gpu.engine.registry import one_of
from skymask_gpu.federation.tracking.interface import TRACKERS, TrackerContext, needed, numbers

__all__ = ["WandB", "WandBSettings"]


@dataclass(frozen=True, kw_only=True)
class WandBSettings:
    """Settings of ``wandb``.

    Attributes:
        project: the project that the run belongs to.
        mode: ``"offline"`` writes files only; ``"online"`` sends each round to a server.
    """

    project: str = "skymask-gpu"
    mode: str = "offline"

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("offline", "online"))


@TRACKERS.register("wandb", settings=WandBSettings)
class WandB:
    """A run of W&B in the folder ``wandb`` of the run's folder.

    A resumed run has the same id. Offline, that is a second folder, and syncing both gives one run.
    """

    def __init__(self, context: TrackerContext, settings: WandBSettings) -> None:
        self._context, self._settings = context, settings

    def start(self, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise needed("wandb", "pip install wandb") from error
        mode: Any = self._settings.mode
        self._run = wandb.init(
            project=self._settings.project,
            name=self._context.name,
            id=self._context.run_id,
            dir=str(self._context.folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=settings,
            # Numbers and settings are recorded: no output, no code, no repository, no package list.
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_save_requirements=False),
        )

    def log(self, round: int, metrics: dict[str, Any]) -> None:
        self._run.log(numbers(metrics), step=round)

    def finish(self) -> None:
        self._run.finish()
