"""TensorBoard: event files in the run folder."""

from pathlib import Path
from typing import Any

from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard import SummaryWriter

from potstill.loggers import LoggerSettings, Scalars


class TensorBoard:
    """``tensorboard --logdir runs`` shows it; files are not uploaded."""

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
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

    def files(self, paths: list[Path]) -> None: ...

    def close(self, finished: bool) -> None:
        self.writer.close()
