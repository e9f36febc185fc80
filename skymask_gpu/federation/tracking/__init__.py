"""Trackers: programs that show the rounds of many runs, such as TensorBoard.

| file | what |
| --- | --- |
| ``interface.py`` | what a tracker is, and how it is registered |
| ``following.py`` | a run's tracker while it plays or afterwards; its errors never end the run |
| ``tensorboard.py``, ``wandb.py``, ``mlflow.py`` | the trackers |
"""

# Importing a file registers its tracker; the packages themselves are imported when one starts.
from skymask_gpu.federation.tracking import mlflow, tensorboard, wandb  # noqa: F401
from skymask_gpu.federation.tracking.following import export, followed
from skymask_gpu.federation.tracking.interface import (
    TRACKERS,
    Tracker,
    TrackerContext,
    TrackingConfig,
    numbers,
    tracking_for,
)

__all__ = ["TRACKERS", "Tracker", "TrackerContext", "TrackingConfig", "export", "followed", "numbers", "tracking_for"]
