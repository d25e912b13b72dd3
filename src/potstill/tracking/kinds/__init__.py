"""One tracker a file; ``SINKS`` names them."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.tracking.settings import TrackerSettings

if TYPE_CHECKING:
    from potstill.tracking.sink import Sink

SINKS = {
    "tensorboard": "potstill.tracking.kinds.tensorboard:TensorBoard",
    "wandb": "potstill.tracking.kinds.wandb:Wandb",
    "mlflow": "potstill.tracking.kinds.mlflow:MLflow",
    "trackio": "potstill.tracking.kinds.trackio:Trackio",
}


def open_sink(settings: TrackerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> "Sink":
    """Begin a run at the tracker, or go on with the one of this identity; its package is imported here."""
    module, _, name = SINKS[settings.name].partition(":")
    found: Sink = getattr(importlib.import_module(module), name)(settings, run, identity, parameters)
    return found
