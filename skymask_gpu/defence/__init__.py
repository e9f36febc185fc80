"""The defence: from clients' updates to the benign ones' mean and a verdict on each client.

| file | what |
| --- | --- |
| ``skymask.py`` | ``SkyMask``, which users call, with its settings and their ranges |
| ``settings.py`` | the settings of a ``SkyMask``, and the arguments of one call |
| ``judge.py`` | one round from top to bottom |
| ``forms.py`` | the forms in which updates may come: tensors, arrays, state dicts, lists |
| ``parse.py`` | from any of these forms to rows; malformed clients are rejected |
| ``root.py`` | the root direction, which the server itself trains |
| ``ahead.py`` | what a round needs of the server alone, done while the clients train |
| ``warm_up.py`` | compiles a round's kernels before there is a round |
| ``measured.py``, ``output_cosines.py`` | what one pass over the rows measures: norms, inner products, output cosines |
| ``screen.py`` | finds rows that are not finite, local models, and rows that break the loss |
| ``means.py`` | means over the clients that are kept, and how much each of them counts |
| ``aggregation.py`` | ``Aggregation``, the result of a round |
| ``suspicion.py`` | a score per client |
| ``tied.py`` | the several names of one tensor, such as those of tied weights |
| ``arguments.py`` | checks of the arguments |
| ``history.py`` | ``ClientHistory``, how each client agrees with the root direction, from round to round |
| ``clock.py`` | wall time by phase |
"""

from skymask_gpu.defence.aggregation import Aggregation, VerdictWarning
from skymask_gpu.defence.history import ClientHistory
from skymask_gpu.defence.means import mean_buffer, mean_buffers, mean_of_rows
from skymask_gpu.defence.root import RootTraining, root_direction
from skymask_gpu.defence.skymask import SkyMask

__all__ = [
    "Aggregation",
    "ClientHistory",
    "RootTraining",
    "SkyMask",
    "VerdictWarning",
    "mean_buffer",
    "mean_buffers",
    "mean_of_rows",
    "root_direction",
]
