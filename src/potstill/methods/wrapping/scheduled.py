"""Weights and options of a method that change while training goes on."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from potstill.errors import UsageError, nearest
from potstill.methods.base import Method
from potstill.methods.wrapping.around import Around
from potstill.methods.wrapping.schedule import Schedule
from potstill.types import Batch, Outputs


class Scheduled(Around):
    """``inner`` with factors on its terms, and values of its options, that follow schedules.

    Args:
        inner: any method.
        schedule: by name of a term (a factor on its weight) or of a numeric option such as ``temperature`` (its
            value): a mapping with the fields of ``Schedule``.

    Raises:
        UsageError: a schedule with unknown fields; at the first step, a name that is neither.
    """

    def __init__(self, inner: Method, schedule: dict[str, dict[str, Any]]) -> None:
        super().__init__(inner)
        self.needs = replace(inner.needs, epoch=True)
        self.schedules = {name: Schedule(**fields) for name, fields in schedule.items()}
        self.factors: dict[str, float] = {}

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        for name, schedule in self.schedules.items():
            value = schedule.at(epoch, epochs)
            if isinstance(getattr(self.inner, name, None), (int, float)):
                setattr(self.inner, name, value)
            else:
                self.factors[name] = value

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        if self.training:
            _ = self.progress  # schedules without epochs would stay at their start for ever
        terms = super().forward(student, teacher, batch)
        for name, factor in self.factors.items():
            if name not in terms:
                known = f"Its terms are {', '.join(terms)}"
                raise UsageError(
                    f"the schedule names {name!r}, which this method has not{nearest(name, terms)}. {known}"
                )
            terms[name] = factor * terms[name]
        return terms
