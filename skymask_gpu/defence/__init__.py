"""The defence: clients' updates in, the mean of the benign ones and a verdict on each client out.

| file | what |
| --- | --- |
| ``skymask.py`` | ``SkyMask``, what users call: its settings and what they may be |
| ``judge.py`` | one round from top to bottom |
| ``parse.py`` | from a tensor, blocks or state dicts to rows; malformed clients are rejected |
| ``root.py`` | the root direction, which the server trains itself |
| ``screen.py`` | norms and inner products; rows that are not finite, local models, rows that break the loss |
| ``means.py`` | means over the clients that are kept |
| ``aggregation.py`` | ``Aggregation``, what a round hands back |
| ``arguments.py`` | checks of the arguments |
| ``clock.py`` | wall time by phase |
"""

from skymask_gpu.defence.aggregation import Aggregation, VerdictWarning
from skymask_gpu.defence.means import mean_buffer, mean_buffers, mean_of_rows
from skymask_gpu.defence.root import RootTraining, root_direction
from skymask_gpu.defence.skymask import SkyMask

__all__ = [
    "Aggregation",
    "RootTraining",
    "SkyMask",
    "VerdictWarning",
    "mean_buffer",
    "mean_buffers",
    "mean_of_rows",
    "root_direction",
]
