"""Loggers: send a run's metrics to TensorBoard, W&B, MLflow or trackio.

Settings, the protocol of a logger, and the loggers themselves, in the table ``LOGGERS``.  The packages, and torch, are
imported by ``load_logger_class`` alone.
"""

import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from potstill.errors import UsageError

LoggerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class LoggerSettings(BaseModel):
    """One tracker; in a recipe, ``tracker: mlflow`` sets its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: LoggerName = Field(description="needs the extra of the same name")
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(
        "potstill", description="W&B's and trackio's project, MLflow's experiment"
    )
    uri: str | None = Field(
        None, description="MLflow's server or database; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )


def as_logger_list(value: Any) -> Any:
    """Return a recipe's ``tracker`` as a list of mappings; it may be a name, a mapping, a list of either, or null.

    Example:
        >>> as_logger_list(["wandb", {"name": "mlflow", "uri": "http://127.0.0.1:5000"}])
        [{'name': 'wandb'}, {'name': 'mlflow', 'uri': 'http://127.0.0.1:5000'}]
        >>> as_logger_list("trackio"), as_logger_list(None)
        ([{'name': 'trackio'}], [])
    """
    if value is None:
        return []
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    return [{"name": each} if isinstance(each, str) else each for each in several]


def check_loggers_installed(trackers: Sequence[LoggerSettings]) -> None:
    """Check that the trackers' packages are installed, without importing them."""
    missing = [each.name for each in trackers if not _is_installed(each.name)]
    if missing:
        extras = ",".join(missing)
        raise UsageError(
            f"tracker {' and '.join(missing)}: the package is not installed; "
            f"install it with: pip install 'potstill[{extras}]', or leave the tracker out"
        )


def _is_installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # a plain folder named wandb is not the package


Scalars = dict[str, float]


class Logger(Protocol):
    """One run at one tracker.  An exception stops this logger, never the run."""

    def epoch(self, stage: str, epoch: int, metrics: Scalars) -> None:
        """Log the metrics of a stage's epoch (from 1), by names such as ``val/top1``."""

    def final(self, metrics: Scalars, verdict: str) -> None:
        """Log the metrics on test, by names such as ``distilled/test/top1``, and the verdict as text."""

    def close(self, finished: bool) -> None:
        """End the run; ``finished`` is False if it was interrupted or failed."""


def flatten(value: Any, prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by dotted path.

    Example:
        >>> flatten({"method": {"name": "kd", "alpha": 0.5}, "marks": [3, 5]})
        {'method.name': 'kd', 'method.alpha': 0.5, 'marks.0': 3, 'marks.1': 5}
    """
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= flatten(inner, f"{prefix}{separator}{key}" if prefix else str(key), separator)
    return found


def collect_scalars(record: dict[str, Any]) -> Scalars:
    """Return the numbers of a nested record by their path; texts, booleans and None are left out.

    Example:
        >>> collect_scalars({"epoch": 1, "best": True, "val": {"top1": 0.5, "auc_macro": None, "terms": {"kd": 2}}})
        {'epoch': 1.0, 'val/top1': 0.5, 'val/terms/kd': 2.0}
    """
    return {
        name: float(value)
        for name, value in flatten(record, separator="/").items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class TensorBoard:
    """TensorBoard: event files in the run folder, which ``tensorboard --logdir runs`` shows; files are not uploaded."""

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))
        # SummaryWriter.add_hparams would write them into a run of their own; None is no hyperparameter there.
        hparams = {name: value for name, value in parameters.items() if value is not None}
        file_writer: Any = self.writer.file_writer
        file_writer.add_summary(hparams_pb(hparams))

    def epoch(self, stage: str, epoch: int, metrics: Scalars) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"{stage}/{name}", value, epoch)
        self.writer.flush()

    def final(self, metrics: Scalars, verdict: str) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"final/{name}", value, 0)
        self.writer.add_text("verdict", verdict)

    def close(self, finished: bool) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases: offline in the run folder, unless WANDB_MODE is set otherwise.

    ``wandb sync RUN/wandb/offline-run-*`` uploads it to a server.
    """

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
        import wandb

        self.stages: set[str] = set()
        self.run = wandb.init(
            project=settings.project,
            name=run.name,
            id=identity,
            resume="allow",
            dir=str(run),
            config=parameters,
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True),
        )

    def epoch(self, stage: str, epoch: int, metrics: Scalars) -> None:
        if stage not in self.stages:  # each stage counts its own epochs
            self.run.define_metric(f"{stage}/epoch", hidden=True)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/epoch")
            self.stages.add(stage)
        self.run.log({f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/epoch": epoch})

    def final(self, metrics: Scalars, verdict: str) -> None:
        self.run.summary.update({f"final/{name}": value for name, value in metrics.items()} | {"verdict": verdict})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


_MAX_PARAMS_PER_REQUEST = 100  # that a server accepts
_MAX_PARAM_LENGTH = 500  # characters that every server accepts
_MLFLOW_TAG = "potstill.identity"


class MLflow:
    """MLflow: a server, or a database beside the runs.

    One MLflow run for a run folder; an existing one with the same tag is continued.
    """

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(settings.project)
        found = self.client.search_runs([experiment], f"tags.`{_MLFLOW_TAG}` = '{identity}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return  # parameters cannot be changed there
        created = self.client.create_run(experiment, run_name=run.name, tags={_MLFLOW_TAG: identity})
        self.id = created.info.run_id
        # Few characters are allowed in names there; the recipe's keys have no others.
        params = [Param(name, str(value)[:_MAX_PARAM_LENGTH]) for name, value in parameters.items()]
        for start in range(0, len(params), _MAX_PARAMS_PER_REQUEST):
            self.client.log_batch(self.id, params=params[start : start + _MAX_PARAMS_PER_REQUEST])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

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

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _log_metrics(self, metrics: Scalars, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])


class Trackio:
    """trackio: a database of its own on this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set.

    ``trackio show`` shows it.
    """

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
        import trackio.run
        import trackio.utils

        # These print on stdout, which is the run's, and have no switch for it.
        for module in (trackio, trackio.utils, trackio.run):
            module.print = lambda *_, **__: None
        self.run = trackio.init(
            project=settings.project,
            name=f"{run.name}-{identity}",  # a resumed run is found by it
            config=parameters,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def epoch(self, stage: str, epoch: int, metrics: Scalars) -> None:
        self.run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=epoch)

    def final(self, metrics: Scalars, verdict: str) -> None:
        self.run.log({f"final/{name}": value for name, value in metrics.items()} | {"verdict": verdict})

    def close(self, finished: bool) -> None:
        self.run.finish()


LOGGERS: dict[LoggerName, Callable[..., Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
# The packages read these when they are imported or at the first request.  An MLflow server that does not answer is an
# error within half a minute.
_ENVIRONMENT: dict[LoggerName, dict[str, str]] = {
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
    "mlflow": {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    },
    "trackio": {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
}


def load_logger_class(name: LoggerName) -> Callable[..., Logger]:
    """Return the logger's class; imports its package."""
    for variable, value in _ENVIRONMENT.get(name, {}).items():
        os.environ.setdefault(variable, value)
    importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    if name == "mlflow":
        for noisy in ("mlflow", "alembic"):  # a new database logs ten lines to the terminal
            logging.getLogger(noisy).setLevel(logging.WARNING)
    return LOGGERS[name]


def create_logger(settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> Logger:
    """Start a run at the tracker, or continue the one with this identity."""
    return load_logger_class(settings.name)(settings, run, identity, parameters)
