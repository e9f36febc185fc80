"""MLflow, by default with a database in the run's folder: ``mlflow ui --backend-store-uri URI``."""

import time
from dataclasses import dataclass
from typing import Any

from skymask_gpu.federation.tables import dotted
from skymask_gpu.federation.tracking.interface import TRACKERS, TrackerContext, needed, numbers

__all__ = ["MLflow", "MLflowSettings"]

# MLflow refuses longer values of parameters.
_LONGEST_VALUE = 500
# Finds the run again after a resume.
_TAG = "skymask_gpu.id"


@dataclass(frozen=True, kw_only=True)
class MLflowSettings:
    """Settings of ``mlflow``.

    Attributes:
        uri: the store, such as ``"sqlite:////data/mlflow.db"``, in which several runs can be
            compared; empty: ``mlflow.db`` in the run's folder.
        experiment: the experiment that the run belongs to.
    """

    uri: str = ""
    experiment: str = "skymask-gpu"


@TRACKERS.register("mlflow", settings=MLflowSettings)
class MLflow:
    """A run of MLflow; settings are parameters with dotted names, rounds are steps."""

    def __init__(self, context: TrackerContext, settings: MLflowSettings) -> None:
        self._context, self._settings = context, settings

    def start(self, settings: dict[str, Any]) -> None:
        try:
            from mlflow.entities import Param
            from mlflow.tracking import MlflowClient
        except ModuleNotFoundError as error:
            raise needed("mlflow", "pip install mlflow") from error
        uri = self._settings.uri or f"sqlite:///{(self._context.folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment()
        tag = self._context.run_id
        if self._context.first_round > 0:
            found = self._client.search_runs([experiment], filter_string=f"tags.`{_TAG}` = '{tag}'")
            if found:
                self._run_id = found[0].info.run_id
                self._client.update_run(self._run_id, status="RUNNING")
                return
        run = self._client.create_run(experiment, tags={"mlflow.runName": self._context.name, _TAG: tag})
        self._run_id = run.info.run_id
        params = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in dotted(settings).items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[first : first + 100])

    def _experiment(self) -> str:
        """The experiment's id; it is made if it is missing."""
        found = self._client.get_experiment_by_name(self._settings.experiment)
        if found is None:
            artifacts = (self._context.folder / "mlartifacts").resolve().as_uri()
            return str(self._client.create_experiment(self._settings.experiment, artifact_location=artifacts))
        return str(found.experiment_id)

    def log(self, round: int, metrics: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        entries = [Metric(key, value, now, round) for key, value in numbers(metrics).items()]
        self._client.log_batch(self._run_id, metrics=entries)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)
