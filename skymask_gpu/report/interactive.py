"""The data of the page's interactive part: curves, and each client's history over the rounds.

``interactive.html.j2`` shows them with plain JavaScript. The page stays one file that opens from
disk, without a network.
"""

from typing import Any

import numpy as np

from skymask_gpu.drawing import COLOURS
from skymask_gpu.report.history import positions_by_round, verdicts, witness_by_round
from skymask_gpu.report.plots_by_round import STATES
from skymask_gpu.report.summary import FinishedRun

__all__ = ["page_data"]

CURVES = {
    "accuracy": "Accuracy of the global model (%)",
    "false_positive_rate": "Honest clients rejected (%)",
    "false_negative_rate": "Attackers kept (%)",
    "attack_success_rate": "Success of the backdoor (%)",
}
# With more values per client than this in all runs together (some 10 MB), the page has no history
# of clients. The static pictures are there in any case.
_MOST_VALUES = 2_000_000


def page_data(runs: list[FinishedRun]) -> dict[str, Any]:
    """What the page's script needs, as JSON can hold it.

    Curves are shares between 0 and 1, with None where there is no value. A client's states are one
    digit per round, see :class:`~skymask_gpu.report.history.State`.
    """
    num_values = sum(len(run.records) * int(run.config.get("data", {}).get("clients", 0)) * 4 for run in runs)
    has_room = num_values <= _MOST_VALUES
    return {
        "colours": COLOURS,
        "states": [list(state) for state in STATES.values()],
        "curves": [[key, title] for key, title in CURVES.items()],
        "runs": [_run_data(run, with_clients=has_room) for run in runs],
    }


def _run_data(run: FinishedRun, *, with_clients: bool) -> dict[str, Any]:
    curves = {key: [record.get(key) for record in run.records] for key in CURVES}
    data: dict[str, Any] = {
        "name": run.name,
        "rounds": [record["round"] + 1 for record in run.records],
        **{key: values for key, values in curves.items() if any(value is not None for value in values)},
    }
    found = verdicts(run) if with_clients else None
    if found is None:
        return data
    num_clients = len(found.states)
    positions = positions_by_round(run, num_clients)
    data["clients"] = {
        "malicious": found.malicious,
        "rounds": [number + 1 for number in found.rounds],
        "states": ["".join(map(str, row)) for row in found.states.tolist()],
        "keep_share": witness_by_round(run, "keep_share", found.rounds, num_clients),
        "agreement": witness_by_round(run, "agreement", found.rounds, num_clients),
        "positions": [_points(positions.get(number)) for number in found.rounds] if positions else None,
    }
    return data


def _points(points: np.ndarray | None) -> list[list[float] | None] | None:
    if points is None:
        return None
    return [None if np.isnan(x) else [float(f"{x:.4g}"), float(f"{y:.4g}")] for x, y in points]
