"""Several teachers for a method that reads hidden layers: one copy of it for each, their terms averaged."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from potstill.errors import UsageError
from potstill.methods.base import Method, Passes, Side, TrainingFacts
from potstill.methods.wrapping.around import Around
from potstill.types import Batch, Outputs


class PerTeacher(Around):
    """``inner`` once for each teacher; of each term the mean, weighted by the teachers' shares.

    Logits can be averaged, feature maps cannot: networks of different families have nothing in common place by place.
    """

    def __init__(self, inner: Method, shares: Sequence[float]) -> None:
        super().__init__(inner)
        self.shares = tuple(shares)
        # The first is `inner` itself, so that its options and label terms have one home.
        self.others = nn.ModuleList(copy.deepcopy(inner) for _ in self.shares[1:])

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self,)

    def copies(self) -> list[Method]:
        """One method for each teacher."""
        return [self.inner, *(method for method in self.others if isinstance(method, Method))]

    def build(self, student: Side, teacher: Side | None, training: TrainingFacts) -> None:
        assert teacher is not None
        for method, own, theirs in zip(self.copies(), student.members, teacher.members, strict=True):
            method.build(own, theirs, training)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        for method in self.copies()[1:]:
            method.start_epoch(epoch, epochs)

    def prepare(self, passes: Passes) -> None:
        for position, method in enumerate(self.copies()):
            method.prepare(lambda at=position: ((outputs.members[at], batch) for outputs, batch in passes()))  # type: ignore[misc]

    def refuse_idle_schedules(self) -> None:
        self.inner.refuse_idle_schedules()  # the label terms are the first one's alone

    def distill(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        each = [
            method.distill(_member(student, position), _member(teacher, position), batch)
            for position, method in enumerate(self.copies())
        ]
        shares = self.shares
        if len(set(shares)) == 1:
            return {name: torch.stack([terms[name] for terms in each]).mean() for name in each[0]}
        return {
            name: torch.stack([share * terms[name] for share, terms in zip(shares, each, strict=True)]).sum()
            for name in each[0]
        }


def per_teacher(method: Method, shares: Sequence[float]) -> Method:
    """``method`` for so many teachers, each with its share: one that reads hidden layers works on each by itself.

    Raises:
        UsageError: it can do with one only, or weighs the teachers itself.
    """
    method = method.for_teachers(shares)
    if method.needs.members and len(method.parts) == 1 and len(set(shares)) > 1:
        raise UsageError(
            f"{type(innermost(method)).__name__} weighs the teachers by itself, image by image: "
            "leave teachers.weights out, or use a method that takes them, such as kd"
        )
    alone = len(shares) < 2 or method.needs.members or not method.needs.features
    return method if alone or len(method.parts) > 1 else PerTeacher(method, shares)


def innermost(method: Method) -> Method:
    """The method that is not around another."""
    while isinstance(method, Around):
        method = method.inner
    return method


def _member(outputs: Outputs, position: int) -> Outputs:
    member = outputs.members[position]
    second = outputs.second.members[position] if outputs.second is not None else None
    return Outputs(
        member.logits, member.features, member.maps, member.embedding, member.head, second=second, members=(member,)
    )
