"""Loggers: send a run's metrics to TensorBoard, W&B, MLflow or trackio.

Settings, the protocol of a logger, and the table ``LOGGERS``; each logger is a module of this folder.  This module
imports neither torch nor the loggers' packages.
"""

import importlib
import importlib.util
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
    """Check that the trackers' packages are installed, without importing them.

    Raises:
        UsageError: some are not; names the command that installs them.
    """
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

    def files(self, paths: list[Path]) -> None:
        """Upload files, if the tracker can."""

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


LOGGERS = {
    "tensorboard": "potstill.loggers.tensorboard:TensorBoard",
    "wandb": "potstill.loggers.wandb:Wandb",
    "mlflow": "potstill.loggers.mlflow:MLflow",
    "trackio": "potstill.loggers.trackio:Trackio",
}


def load_logger_class(name: LoggerName) -> Callable[..., Logger]:
    """Return the logger's class; imports its package."""
    module, _, attribute = LOGGERS[name].partition(":")
    found: Callable[..., Logger] = getattr(importlib.import_module(module), attribute)
    return found


def create_logger(settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> Logger:
    """Start a run at the tracker, or continue the one with this identity."""
    return load_logger_class(settings.name)(settings, run, identity, parameters)
