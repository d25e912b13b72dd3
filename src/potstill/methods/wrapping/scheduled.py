"""Weights and options of a method that change while training goes on."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

from potstill.errors import nearest
from potstill.methods.base import Method
from potstill.methods.wrapping.around import Around
from potstill.methods.wrapping.schedule import Schedule
from potstill.types import Batch, Outputs


class Scheduled(Around):
    """``inner`` with factors on its terms, and values of its options, that follow schedules.

    It changes ``label_terms`` and ``distill``, which are all that a method around it calls, so that a schedule works
    at any depth.

    Args:
        inner: any method.
        schedule: by name of a term (a factor on its weight) or of a numeric option such as ``temperature`` (its
            value): a mapping with the fields of ``Schedule``.
        options: which of the names are options.
    """

    def __init__(self, inner: Method, schedule: dict[str, dict[str, Any]], options: Collection[str]) -> None:
        super().__init__(inner)
        self.needs = replace(inner.needs, epoch=True)
        self.schedules = {name: Schedule(**fields) for name, fields in schedule.items()}
        self.options = frozenset(options)
        self.factors: dict[str, float] = {}
        self._found: set[str] = set()  # names of the terms so far

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        for name, schedule in self.schedules.items():
            value = schedule.at(epoch, epochs)
            if name in self.options:
                setattr(self.inner, name, value)
            else:
                self.factors[name] = value

    def label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self._scaled(super().label_terms(student, batch))

    def distill(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return self._scaled(super().distill(student, teacher, batch))

    def idle_schedule(self) -> str:
        for name in self.factors:
            if name not in self._found:
                known = ", ".join(sorted(self._found)) or "none"
                inside = (
                    "; where methods are combined, and inside ls, the label term is that of the outer method"
                    if name in self.inner.label_term_names
                    else nearest(name, self._found)
                )
                return (
                    f"the schedule of {type(self.inner).__name__} names {name!r}, which is neither an option of it nor "
                    f"a term that counts{inside}. Its terms here are {known}"
                )
        return ""

    def _scaled(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training:
            _ = self.progress  # schedules without epochs would stay at their start for ever
        self._found.update(terms)
        return {name: self.factors[name] * term if name in self.factors else term for name, term in terms.items()}
