"""Weights & Biases: offline in the run folder, unless WANDB_MODE says otherwise."""

import os
from pathlib import Path
from typing import Any

import wandb

from potstill.loggers import LoggerSettings, Scalars

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported


class Wandb:
    """``wandb sync RUN/wandb/offline-run-*`` uploads it to a server."""

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
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

    def files(self, paths: list[Path]) -> None:
        artifact = wandb.Artifact(f"potstill-{self.run.id}", type="potstill-run")
        for path in paths:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
