"""Methods that wrap others: their base, a copy for each of several teachers, and schedules of weights."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import UsageError, did_you_mean
from potstill.methods.base import Method, NetworkInfo, TeacherPasses, TrainingInfo
from potstill.methods.schedules import Schedule
from potstill.options import MethodSettings
from potstill.types import Batch, Outputs


class MethodWrapper(Method):
    """Does what ``inner`` does; the base of those that change one thing about it."""

    def wrap(self, inner: Method) -> None:
        """Take ``inner`` in, with its needs."""
        self.inner = inner
        self.needs = inner.needs
        self.student_taps, self.teacher_taps = inner.student_taps, inner.teacher_taps

    @property
    def label(self) -> str:
        return self.name or self.inner.label

    @property
    def label_weight(self) -> float:
        return self.inner.label_weight

    @property
    def label_term_names(self) -> frozenset[str]:
        return self.inner.label_term_names

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.inner.parts

    @property
    def staged(self) -> bool:
        return self.inner.staged

    def warmup_length(self, epochs: int) -> float:
        return self.inner.warmup_length(epochs)

    def for_teachers(self, shares: Sequence[float]) -> Method:
        self.inner = self.inner.for_teachers(shares)
        return self

    def build(self, student: NetworkInfo, teacher: Any, training: TrainingInfo) -> None:
        self.inner.build(student, teacher, training)

    def modify_student(self, student: nn.Module, student_side: NetworkInfo, teacher_side: Any) -> nn.Module:
        student = self.inner.modify_student(student, student_side, teacher_side)
        self.student_taps = self.inner.student_taps  # inside the new network
        self.needs = replace(self.needs, student_head=self.inner.needs.student_head)
        return student

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        self.inner.start_epoch(epoch, epochs)

    def prepare(self, passes: TeacherPasses) -> None:
        self.inner.prepare(passes)

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.inner.label_terms(student, batch)

    def plain_label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.inner.plain_label_terms(student, batch)

    def distill(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        return self.inner.distill(student, teacher, batch)


def refuse_idle_label_weight(settings: MethodSettings, method: Method, outer: str) -> None:
    """Refuse a label weight, constant or scheduled, of a method whose label term is replaced by that of ``outer``; some
    have a label term of a second view, too, which counts in any place.
    """
    given = "ce_weight" in settings or "ce_weight" in (settings.get("schedule") or {})
    if given and method.label_term_names == {"ce"}:
        raise UsageError(
            f"ce_weight of {settings['name']} has no effect inside {outer}, which has one label term of its own: "
            f"set the ce_weight of {outer}"
        )


class PerTeacher(MethodWrapper):
    """``inner`` once for each teacher; of each term the mean, weighted by the teachers' shares."""

    def __init__(self, inner: Method, shares: Sequence[float]) -> None:
        super().__init__()
        self.wrap(inner)
        self.shares = tuple(shares)
        # The first is `inner` itself, so that its options and label terms have one home.
        self.others = nn.ModuleList(copy.deepcopy(inner) for _ in self.shares[1:])

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self,)

    def copies(self) -> list[Method]:
        """One method for each teacher."""
        return [self.inner, *(method for method in self.others if isinstance(method, Method))]

    def build(self, student: NetworkInfo, teacher: Any, training: TrainingInfo) -> None:
        for method, own, theirs in zip(self.copies(), student.members, teacher.members, strict=True):
            method.build(own, theirs, training)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        for method in self.copies()[1:]:
            method.start_epoch(epoch, epochs)

    def prepare(self, passes: TeacherPasses) -> None:
        for position, method in enumerate(self.copies()):
            method.prepare(lambda at=position: ((outputs.members[at], batch) for outputs, batch in passes()))  # type: ignore[misc]

    def refuse_idle_schedules(self) -> None:
        self.inner.refuse_idle_schedules()  # the label terms are the first one's alone

    def distill(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        each = [
            method.distill(_member_outputs(student, position), _member_outputs(teacher, position), batch)
            for position, method in enumerate(self.copies())
        ]
        shares = self.shares
        if len(set(shares)) == 1:
            return {name: torch.stack([terms[name] for terms in each]).mean() for name in each[0]}
        return {
            name: torch.stack([share * terms[name] for share, terms in zip(shares, each, strict=True)]).sum()
            for name in each[0]
        }


def wrap_per_teacher(method: Method, shares: Sequence[float]) -> Method:
    """Return ``method`` for so many teachers: one that reads hidden layers works on each by itself."""
    method = method.for_teachers(shares)
    if unwrap(method).needs.members and len(method.parts) == 1 and len(set(shares)) > 1:
        raise UsageError(
            f"{unwrap(method).label} weighs the teachers by itself, image by image: "
            "leave teachers.weights out, or use a method that takes them, such as kd"
        )
    alone = len(shares) < 2 or method.needs.members or not method.needs.features
    return method if alone or len(method.parts) > 1 else PerTeacher(method, shares)


def unwrap(method: Method) -> Method:
    """The method that is not around another."""
    while isinstance(method, MethodWrapper):
        method = method.inner
    return method


def _member_outputs(outputs: Outputs, position: int) -> Outputs:
    member = outputs.members[position]
    second = outputs.second.members[position] if outputs.second is not None else None
    return Outputs(
        member.logits, member.features, member.maps, member.embedding, member.head, second=second, members=(member,)
    )


class ScheduledMethod(MethodWrapper):
    """``inner`` with factors on its terms, and values of its options, that follow schedules at any depth.

    ``schedule`` is by name of a term (a factor on its weight) or of a numeric option (its value): the fields of
    ``Schedule``. ``options``: those of the names that are options.
    """

    def __init__(self, inner: Method, schedule: dict[str, dict[str, Any]], options: Collection[str]) -> None:
        super().__init__()
        self.wrap(inner)
        self.needs = replace(inner.needs, epoch=True)
        self.schedules = {name: Schedule(**fields) for name, fields in schedule.items()}
        self.scheduled_options = frozenset(options)
        self.factors: dict[str, float] = {}
        self._found: set[str] = set()  # names of the terms so far

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        for name, schedule in self.schedules.items():
            value = schedule.at(epoch, epochs)
            if name in self.scheduled_options:
                setattr(self.inner, name, value)
            else:
                self.factors[name] = value

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self._scaled(super().label_terms(student, batch))

    def distill(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        return self._scaled(super().distill(student, teacher, batch))

    def idle_schedule(self) -> str:
        for name in self.factors:
            if name not in self._found:
                known = ", ".join(sorted(self._found)) or "none"
                inside = (
                    "; where methods are combined, and inside ls, the label term is that of the outer method"
                    if name in self.inner.label_term_names
                    else did_you_mean(name, self._found)
                )
                return (
                    f"the schedule of {self.inner.label} names {name!r}, which is neither an option of it nor "
                    f"a term that counts{inside}. Its terms here are {known}"
                )
        return ""

    def _scaled(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training:
            _ = self.progress  # schedules without epochs would stay at their start for ever
        self._found.update(terms)
        return {name: self.factors[name] * term if name in self.factors else term for name, term in terms.items()}
