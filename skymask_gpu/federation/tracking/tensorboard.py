"""TensorBoard: event files in the run's folder; ``tensorboard --logdir OUT`` shows all of OUT."""

import json
from typing import Any

from skymask_gpu.federation.tracking.interface import TRACKERS, TrackerContext, needed, numbers

__all__ = ["TensorBoard"]


@TRACKERS.register("tensorboard")
class TensorBoard:
    """One scalar per number of a round, in the folder ``tensorboard``, and the settings as text."""

    def __init__(self, context: TrackerContext) -> None:
        self._context = context

    def start(self, settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise needed("tensorboard", "pip install 'skymask-gpu[tracking]'") from error
        folder, first = self._context.folder / "tensorboard", self._context.first_round
        if first == 0:
            # A run that starts anew replaces the curves of the one before.
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=first or None)
        if first == 0:
            text = json.dumps(settings, indent=2).replace("\n", "\n    ")
            self._writer.add_text("settings", f"    {text}")

    def log(self, round: int, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()
