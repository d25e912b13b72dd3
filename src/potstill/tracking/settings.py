"""Which trackers a run reports to; free of torch and of the trackers' packages."""

import importlib.util
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from potstill.errors import UsageError

Name = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackerSettings(BaseModel):
    """One tracker; ``tracker: mlflow`` is short for its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="needs the extra of the same name")
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(
        "potstill", description="W&B's and trackio's project, MLflow's experiment"
    )
    uri: str | None = Field(
        None, description="MLflow's server or database; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )


def as_list(value: Any) -> Any:
    """What a recipe may say, as a list of mappings: a name, a mapping, a list of either, or nothing.

    Example:
        >>> as_list(["wandb", {"name": "mlflow", "uri": "http://127.0.0.1:5000"}])
        [{'name': 'wandb'}, {'name': 'mlflow', 'uri': 'http://127.0.0.1:5000'}]
        >>> as_list("trackio"), as_list(None)
        ([{'name': 'trackio'}], [])
    """
    if value is None:
        return []
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    return [{"name": each} if isinstance(each, str) else each for each in several]


def refuse_missing(trackers: Sequence[TrackerSettings]) -> None:
    """Check that the trackers' packages are there, without importing them.

    Raises:
        UsageError: they are not; names the command that installs all of them.
    """
    missing = [each.name for each in trackers if not _installed(each.name)]
    if missing:
        extras = ",".join(missing)
        raise UsageError(
            f"tracker {' and '.join(missing)}: the package is not installed; "
            f"install it with: pip install 'potstill[{extras}]', or leave the tracker out"
        )


def _installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # a folder wandb/ of figures is no package
