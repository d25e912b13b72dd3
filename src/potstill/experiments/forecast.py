"""What a store is going to hold and to save, said before training begins."""

import statistics
import time
from dataclasses import dataclass

from potstill.amounts import count, percent, scaled
from potstill.data.loader import Loader
from potstill.models.classifier import Classifier
from potstill.store.recorded import Recorded
from potstill.training.calibration import images_timed, training_step
from potstill.training.devices import Compute

_ROUNDS = 3  # in which a step is timed, after one that is thrown away
_NO_MATTER = 1.05  # times as fast: less is not worth a word


@dataclass(frozen=True)
class Forecast:
    """Of one student's training.

    Attributes:
        views: drawn in turn.
        images: N.
        size: bytes that all views take on disk.
        recorded: share of them that is there already.
        teacher: seconds for an image.
        student: seconds for an image, forward and backward.
        epochs: to come.
    """

    views: int
    images: int
    size: int
    recorded: float
    teacher: float
    student: float
    epochs: int

    @property
    def speed_up(self) -> float:
        """Times as fast as with a teacher that is asked in every step."""
        asked = self.views * (1 - self.recorded)
        return self.epochs * (self.teacher + self.student) / (asked * self.teacher + self.epochs * self.student)

    @property
    def later(self) -> float:
        """The same for a run that finds everything recorded: another temperature, alpha, method or student."""
        return (self.teacher + self.student) / self.student

    def __str__(self) -> str:
        """For people.

        Example:
            >>> print(Forecast(8, 10_000, 640_000, 0.0, 3e-3, 1e-3, 24))
            store: 8 views of 10,000 images, 640 kB, none recorded yet. Expected: 2.0 times as fast as asking the \
teacher in every step, and 4.0 times in later runs
            >>> print(Forecast(8, 10_000, 640_000, 1.0, 3e-3, 1e-3, 24))
            store: 8 views of 10,000 images, 640 kB, all recorded. Expected: 4.0 times as fast as asking the teacher \
in every step
        """
        views = f"{self.views} view{'' if self.views == 1 else 's'} of {count(self.images)} images"
        there = "all recorded" if self.recorded == 1 else f"{percent(self.recorded, 0)} recorded"
        if self.recorded == 0:
            there = "none recorded yet"
        first = f"{self.speed_up:.1f} times as fast as asking the teacher in every step"
        if self.speed_up < _NO_MATTER:
            first = "as fast as asking the teacher in every step"
        later = "" if self.recorded == 1 else f", and {self.later:.1f} times in later runs"
        return f"store: {views}, {scaled(self.size, 'B')}, {there}. Expected: {first}{later}"


def forecast(
    recorded: Recorded,
    loader: Loader,
    student: Classifier,
    *,
    teacher: float,
    batch: int,
    epochs: int,
    compute: Compute,
) -> Forecast:
    """Times a training step of a copy of the student; nothing else is touched.

    Args:
        recorded: of the training images.
        loader: of the training images.
        student: as it will be trained.
        teacher: seconds for an image.
        batch: images of a step.
        epochs: at most.
        compute: where.
    """
    shelves = [*recorded.shelves, *recorded.second]
    views = 1 if not loader.distinct_views else min(loader.views_in_turn or epochs, epochs)
    there = sum(sum(shelf.coverage(views)) for shelf in shelves) / (views * loader.samples * len(shelves))
    return Forecast(
        views=views,
        images=loader.samples,
        size=views * loader.samples * sum(shelf.record.nbytes for shelf in shelves),
        recorded=there,
        teacher=teacher,
        student=seconds_per_image(student, batch, compute),
        epochs=epochs,
    )


def seconds_per_image(student: Classifier, batch: int, compute: Compute) -> float:
    """In a training step of a copy of the student, forward and backward."""
    size = student.input.size
    step, images = training_step(student.module, size, batch, compute), images_timed(batch, size)
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        step()
        compute.wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / images
