"""MLflow: a server, or a database beside the runs."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from potstill.loggers import LoggerSettings, Scalars

# Read at the first request.  A server that does not answer is an error within half a minute.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
for _name in ("mlflow", "alembic"):  # a new database logs ten lines to the terminal
    logging.getLogger(_name).setLevel(logging.WARNING)

_MAX_PARAMS_PER_REQUEST = 100  # that a server accepts
_MAX_PARAM_LENGTH = 500  # characters that every server accepts
_TAG = "potstill.identity"


class MLflow:
    """One MLflow run for a run folder; an existing one with the same tag is continued."""

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(settings.project)
        found = self.client.search_runs([experiment], f"tags.`{_TAG}` = '{identity}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return  # parameters cannot be changed there
        created = self.client.create_run(experiment, run_name=run.name, tags={_TAG: identity})
        self.id = created.info.run_id
        # Few characters are allowed in names there; the recipe's keys have no others.
        params = [Param(name, str(value)[:_MAX_PARAM_LENGTH]) for name, value in parameters.items()]
        for start in range(0, len(params), _MAX_PARAMS_PER_REQUEST):
            self.client.log_batch(self.id, params=params[start : start + _MAX_PARAMS_PER_REQUEST])

    def _experiment(self, name: str) -> str:
        if (experiment := self.client.get_experiment_by_name(name)) is not None:
            return str(experiment.experiment_id)
        try:
            return str(self.client.create_experiment(name))
        except MlflowException:  # another run has just created it
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return str(experiment.experiment_id)

    def epoch(self, stage: str, epoch: int, metrics: Scalars) -> None:
        self._log_metrics({f"{stage}/{name}": value for name, value in metrics.items()}, epoch)

    def final(self, metrics: Scalars, verdict: str) -> None:
        self._log_metrics({f"final/{name}": value for name, value in metrics.items()}, 0)
        self.client.set_tag(self.id, "potstill.verdict", verdict)

    def files(self, paths: list[Path]) -> None:
        for path in paths:
            self.client.log_artifact(self.id, str(path))

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _log_metrics(self, metrics: Scalars, step: int) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
