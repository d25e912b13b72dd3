"""Numbers that change while training goes on."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from potstill.errors import did_you_mean

ScheduleShape = Literal["constant", "linear", "cosine", "step"]


@dataclass(frozen=True)
class Schedule:
    """A number that goes from ``start`` to ``end`` while training goes from its share ``begin`` to ``finish``.

    Example:
        >>> Schedule("linear", 4.0, 1.0).at(epoch=1, epochs=3)  # half-way between the first epoch and the last
        2.5
    """

    shape: ScheduleShape = "constant"
    start: float = 1.0
    end: float = 1.0
    begin: float = 0.0  # share of the training at which it starts to change
    finish: float = 1.0  # share at which it has arrived; "step" jumps here

    def at(self, epoch: int, epochs: int) -> float:
        """The value in an epoch, counted from 0."""
        share = epoch / max(epochs - 1, 1)
        if self.shape == "step":
            return self.end if share >= self.finish else self.start
        done = min(max((share - self.begin) / max(self.finish - self.begin, 1e-12), 0.0), 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start if self.shape == "constant" else self.start + (self.end - self.start) * done


def check_schedule(schedule: Any) -> list[str]:
    """What is wrong with the ``schedule`` of a recipe's method; an empty list where all is well."""
    if not isinstance(schedule, dict):
        return [f"schedule must be a mapping of terms or options, got {schedule!r}"]
    problems = []
    for name, fields in schedule.items():
        if not isinstance(fields, dict):
            problems.append(f"schedule.{name} must be a mapping such as {{shape: linear, start: 1, end: 0}}")
            continue
        before = len(problems)
        for key, value in fields.items():
            if key not in Schedule.__dataclass_fields__:
                known = ", ".join(Schedule.__dataclass_fields__)
                problems.append(
                    f"schedule.{name} has no {key!r}{did_you_mean(key, Schedule.__dataclass_fields__)}; it "
                    f"takes {known}"
                )
            elif key == "shape" and value not in get_args(ScheduleShape):
                problems.append(
                    f"schedule.{name}.shape must be one of {', '.join(get_args(ScheduleShape))}, got {value!r}"
                )
            elif key != "shape" and (isinstance(value, bool) or not isinstance(value, (int, float))):
                problems.append(f"schedule.{name}.{key} must be a number, got {value!r}")
        if len(problems) == before:
            problems += _find_idle_fields(name, fields)
    return problems


def _find_idle_fields(name: str, fields: dict[str, Any]) -> list[str]:
    """Fields of the right kind that would do nothing, or not what they name."""
    shape, begin, finish = fields.get("shape", "constant"), fields.get("begin", 0.0), fields.get("finish", 1.0)
    used = {"constant": ("start",), "step": ("start", "end", "finish")}.get(shape, ("start", "end", "begin", "finish"))
    idle = [key for key in fields if key != "shape" and key not in used]
    if idle:
        how = "give a shape that moves: linear, cosine or step" if shape == "constant" else "leave it out"
        return [f"schedule.{name}.{idle[0]} has no effect with shape {shape}; {how}"]
    if not 0 <= begin < finish <= 1:
        return [
            f"schedule.{name}: begin and finish are shares of the training, 0 <= begin < finish <= 1, got "
            f"{begin:g} and {finish:g}"
        ]
    return []
