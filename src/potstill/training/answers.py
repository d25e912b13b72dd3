"""Where the teacher's answers come from while a student learns: asked anew, remembered, or read from a store."""

from typing import Protocol

from potstill.distiller import Distiller
from potstill.types import Batch, Outputs


class Answers(Protocol):
    """What the teacher says of the batches of one split; the images are those that the student sees."""

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """The batches of epoch number ``epoch``, from 0, come next, the first ``step`` of them left out."""

    def __call__(self, batch: Batch) -> Outputs | None:
        """The teacher's outputs for a batch; None: the Distiller shall ask the teacher itself."""

    def flush(self) -> None:
        """Make what has been said so far last: before a checkpoint, and at the end of an epoch."""


class Asked:
    """The Distiller asks the teacher each time."""

    def start_epoch(self, epoch: int, step: int = 0) -> None: ...

    def __call__(self, batch: Batch) -> Outputs | None:
        """None."""
        return None

    def flush(self) -> None: ...


class Remembered:
    """The same batches in every epoch, without augmentation: the teacher is asked once and its logits are kept.

    Feature maps are too large to keep, and methods that live on the training images do not ask at all.
    """

    def __init__(self, distiller: Distiller) -> None:
        needs = distiller.method.needs
        self.distiller = distiller
        self.keeps = not (
            distiller.teacher is None or needs.features or distiller.method.teacher_taps or needs.training_only
        )
        self.known: list[Outputs] = []
        self.position = 0

    def start_epoch(self, epoch: int, step: int = 0) -> None:
        """Back to the first batch; of val and test none is ever left out."""
        self.position = 0

    def __call__(self, batch: Batch) -> Outputs | None:
        """The outputs for the next batch."""
        if not self.keeps:
            return None
        if self.position == len(self.known):
            answer = self.distiller.ask_teacher(batch.images)
            assert answer is not None  # there is a teacher
            self.known.append(answer)
        self.position += 1
        return self.known[self.position - 1]

    def flush(self) -> None: ...
