"""Methods around other methods."""

from collections.abc import Sequence

from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods.base import Method, Passes, Side, TrainingFacts
from potstill.options import MethodSettings
from potstill.types import Batch, Outputs


class Around(Method):
    """Does what ``inner`` does; the base of those that change one thing about it."""

    inner: Method

    def __init__(self, inner: Method) -> None:
        super().__init__(ce_weight=inner.ce_weight)
        self.inner = inner
        self.needs = inner.needs
        self.student_taps, self.teacher_taps = inner.student_taps, inner.teacher_taps

    @property
    def label_term_names(self) -> frozenset[str]:
        return self.inner.label_term_names

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.inner.parts

    @property
    def staged(self) -> bool:
        return self.inner.staged

    @property
    def warmup_length(self) -> float:
        return self.inner.warmup_length

    def for_teachers(self, shares: Sequence[float]) -> Method:
        self.inner = self.inner.for_teachers(shares)
        return self

    def build(self, student: Side, teacher: Side | None, training: TrainingFacts) -> None:
        self.inner.build(student, teacher, training)

    def remodel(self, student: nn.Module, student_side: Side, teacher_side: Side | None) -> nn.Module:
        student = self.inner.remodel(student, student_side, teacher_side)
        self.student_taps = self.inner.student_taps  # inside the new network
        return student

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        self.inner.start_epoch(epoch, epochs)

    def prepare(self, passes: Passes) -> None:
        self.inner.prepare(passes)

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.inner.label_terms(student, batch)

    def plain_label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.inner.plain_label_terms(student, batch)

    def distill(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return self.inner.distill(student, teacher, batch)


def refuse_idle_label_weight(settings: MethodSettings, method: Method, outer: str) -> None:
    """Refuse a label weight, constant or scheduled, of a method whose label term is replaced by that of ``outer``.

    Args:
        settings: of the method.
        method: made of them; some have a label term of a second view, too, which counts in any place.
        outer: name of the method around it.

    Raises:
        UsageError: ``ce_weight`` would have no effect.
    """
    given = "ce_weight" in settings or "ce_weight" in (settings.get("schedule") or {})
    if given and method.label_term_names == {"ce"}:
        raise UsageError(
            f"ce_weight of {settings['name']} has no effect inside {outer}, which has one label term of its own: "
            f"set the ce_weight of {outer}"
        )
