"""``load_runs``: the finished rounds of a folder, as a table for a notebook."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from skymask_gpu.report.summary import FinishedRun, flat_settings
from skymask_gpu.report.summary import load_runs as _load_runs
from skymask_gpu.report.sweep import differing_keys

if TYPE_CHECKING:
    import pandas

__all__ = ["Runs", "load_runs"]


class Runs(Sequence[FinishedRun]):
    """The runs of a folder, in the order of their paths."""

    def __init__(self, runs: Sequence[FinishedRun]) -> None:
        self._runs = list(runs)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, index: int) -> FinishedRun: ...
    @overload
    def __getitem__(self, index: slice) -> "Runs": ...
    def __getitem__(self, index: int | slice) -> "FinishedRun | Runs":
        return Runs(self._runs[index]) if isinstance(index, slice) else self._runs[index]

    def __repr__(self) -> str:
        return f"<{len(self)} runs: {', '.join(run.name for run in self[:5])}{', ...' if len(self) > 5 else ''}>"

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict per run and round: the run, the settings that differ, the record, the times.

        Settings have dotted keys. The record is the round's line of ``metrics.jsonl``, in which
        rounds are numbered from 0. A phase of ``times.jsonl`` is called ``seconds.PHASE``.
        """
        settings = [flat_settings(run.config) for run in self._runs]
        keys = [key for key in differing_keys(settings) if key != "name" and not key.startswith("tracking.")]
        for run, flat in zip(self._runs, settings, strict=True):
            seconds = {line["round"]: line for line in run.times}
            for record in run.records:
                times = seconds.get(record["round"], {})
                yield {
                    "run": run.name,
                    **{key: flat.get(key) for key in keys},
                    **{key: value for key, value in record.items() if key != "run"},
                    **{f"seconds.{name}": value for name, value in times.items() if isinstance(value, float)},
                }

    def frame(self) -> "pandas.DataFrame":
        """The :meth:`rows` as a pandas data frame.

        Raises:
            ValueError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ValueError("frame() needs pandas: pip install pandas; rows() does without") from error
        return pandas.DataFrame(list(self.rows()))


def load_runs(folder: Path | str) -> Runs:
    """All runs at or below ``folder`` that finished at least one round.

    Args:
        folder: what ``skymask-gpu run`` or ``sweep``, or :func:`~skymask_gpu.federation.play`,
            wrote.

    Raises:
        ValueError: there is no run, or a file cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from skymask_gpu.federation import DataConfig, DefenceConfig, Federation
        >>> from skymask_gpu.federation import RunConfig, load_runs, play
        >>> data = DataConfig(clients=10)
        >>> with TemporaryDirectory() as folder:
        ...     for rule in ("fedavg", "median"):
        ...         defence = DefenceConfig(rule=rule)
        ...         run = RunConfig(name=rule, rounds=2, data=data, defence=defence)
        ...         records = list(play(Federation.build(run), Path(folder) / rule))
        ...     runs = load_runs(folder)
        >>> runs
        <2 runs: fedavg, median>
        >>> for row in runs.rows():
        ...     print(row["defence.rule"], row["round"], row["accuracy"] > 0.1)
        fedavg 0 True
        fedavg 1 True
        median 0 True
        median 1 True

        Beside pandas, ``runs.frame()`` is the same as a data frame, for instance for
        ``runs.frame().pivot(index="round", columns="run", values="accuracy").plot()``.
    """
    return Runs(_load_runs(Path(folder)))
