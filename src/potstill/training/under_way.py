"""An epoch that is not over: what a checkpoint in its midst holds besides weights."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from potstill.evaluation.metrics import StreamingMetrics
from potstill.training.averages import TermAverages


@dataclass
class UnderWay:
    """How far an epoch has come, and its figures so far.

    Attributes:
        metrics, averages: of the steps that are done.
        lr: learning rate at its beginning.
        step: batches that are done.
    """

    metrics: StreamingMetrics
    averages: TermAverages
    lr: float
    step: int = 0
    _before: float = 0.0  # seconds, in an earlier process
    _began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """That the epoch has taken so far."""
        return self._before + time.perf_counter() - self._began

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and JSON facts."""
        tensors, terms = self.averages.pack()
        metrics = {f"metrics.{name}": value for name, value in self.metrics.pack().items()}
        return tensors | metrics, {"lr": self.lr, "step": self.step, "seconds": self.seconds, "terms": terms}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put packed figures in place of one's own."""
        self.averages.unpack(tensors, facts["terms"])
        self.metrics.unpack(
            {name.removeprefix("metrics."): value for name, value in tensors.items() if name.startswith("metrics.")}
        )
        self.lr, self.step = facts["lr"], facts["step"]
        self._before, self._began = facts["seconds"], time.perf_counter()
