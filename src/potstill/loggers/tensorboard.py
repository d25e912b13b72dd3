"""TensorBoard: event files in the run folder.  Without torch's writer, which would load torch a second time."""

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from potstill.loggers import LoggerSettings, Scalars


class TensorBoard:
    """``tensorboard --logdir runs`` shows it; files other than its own it does not keep."""

    def __init__(self, settings: LoggerSettings, run: Path, identity: str, parameters: dict[str, Any]) -> None:
        self.writer = EventFileWriter(str(run / "tensorboard"))
        # None is no hyperparameter there.
        self._summary(hparams_pb({name: value for name, value in parameters.items() if value is not None}), 0)

    def epoch(self, stage: str, epoch: int, figures: Scalars) -> None:
        self._numbers({f"{stage}/{name}": value for name, value in figures.items()}, epoch)

    def final(self, figures: Scalars, verdict: str) -> None:
        self._numbers({f"final/{name}": value for name, value in figures.items()}, 0)
        text = TensorProto(
            dtype=DT_STRING,
            string_val=[verdict.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._summary(Summary(value=[Summary.Value(tag="verdict", metadata=kind, tensor=text)]), 0)

    def files(self, paths: list[Path]) -> None: ...

    def close(self, finished: bool) -> None:
        self.writer.close()

    def _numbers(self, figures: Scalars, step: int) -> None:
        self._summary(
            Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]), step
        )

    def _summary(self, summary: Any, step: int) -> None:
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.writer.flush()
