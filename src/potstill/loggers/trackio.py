"""trackio: a database of its own on this machine, shown by ``trackio show``."""

import os
from pathlib import Path
from typing import Any

import trackio
import trackio.run
import trackio.utils

from potstill.loggers import LoggerSettings, Scalars

for _module in (
    trackio,
    trackio.utils,
    trackio.run,
):  # it prints on stdout, which is the run's, and has no switch for it
    _module.print = lambda *_, **__: None

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported


class Trackio:
    """Stays on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise."""

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
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

    def files(self, paths: list[Path]) -> None:
        artifact = trackio.Artifact(f"potstill-{self.run.id}", type="potstill-run")
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self.run.finish()
