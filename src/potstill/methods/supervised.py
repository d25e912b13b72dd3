"""No distillation: train on labels alone.  The teacher's own training, and the baseline."""

from torch import Tensor

from potstill.methods.base import Method
from potstill.types import Batch, Outputs


class Supervised(Method):
    """Cross-entropy with the labels, mean over the batch."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": self.label_loss(student.logits, batch.labels)}
