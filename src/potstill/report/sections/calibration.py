"""How far each network's confidence can be believed."""

from typing import Any

from potstill.amounts import decimal, number, percent
from potstill.report.contents import Run, Stage
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.reliability import draw_reliability
from potstill.report.theme import ROLE_COLOURS

_SIZE = (4.0, 3.6)  # inches
_COLDEST, _HOTTEST = 0.05, 20.0  # between which a temperature is looked for


def context(run: Run) -> dict[str, Any] | None:
    """A reliability diagram and a row for each stage; None for runs that did not measure it."""
    found = [(stage, facts) for stage in run.stages.values() if (facts := _facts(stage))]
    if not found:
        return None
    return {
        "pictures": [_picture(stage, facts) for stage, facts in found],
        "rows": [(stage.name, _cells(facts)) for stage, facts in found],
        "notes": [note for stage, facts in found if (note := _note(stage.name, facts["temperature"]))],
    }


def _note(name: str, temperature: float) -> str | None:
    """Where the search for a temperature has met an end of its range, the scaled figures mean little."""
    if temperature <= 1.01 * _COLDEST:
        return (
            f"{name} makes no mistake on val, so the colder the better there, and the temperature stopped at "
            f"its least, {_COLDEST}. Leave {name} as it is: on test, which has mistakes, it would be far too sure."
        )
    if temperature >= 0.99 * _HOTTEST:
        return f"{name} knows nothing on val: the temperature stopped at its most, {_HOTTEST:g}."
    return None


def _facts(stage: Stage) -> dict[str, Any] | None:
    """``calibration`` of results.json where it is whole."""
    facts = stage.facts.get("calibration")
    if not isinstance(facts, dict) or number(facts.get("temperature")) is None:
        return None
    both = [facts.get(key) for key in ("before", "after")]
    return facts if all(isinstance(each, dict) and _whole(each.get("bins")) for each in both) else None


def _whole(bins: Any) -> bool:
    return isinstance(bins, list) and all(
        isinstance(each, list) and len(each) == 3 and all(number(value) is not None for value in each) for each in bins
    )


def _cells(facts: dict[str, Any]) -> list[str]:
    before, after = facts["before"], facts["after"]
    figures = [form(each.get(key)) for key, form in (("ece", percent), ("nll", decimal)) for each in (before, after)]
    return [decimal(facts["temperature"], 2), *figures]


def _picture(stage: Stage, facts: dict[str, Any]) -> str:
    before, after = facts["before"], facts["after"]
    label = (
        f"Reliability diagram of {stage.name} on test: ECE {percent(before.get('ece'))} as it is, "
        f"{percent(after.get('ece'))} after temperature scaling."
    )
    return as_svg(
        lambda figure: draw_reliability(
            figure, before["bins"], after["bins"], f"Reliability: {stage.name}", ROLE_COLOURS[stage.role]
        ),
        _SIZE,
        name=f"reliability-{stage.name}",
        label=label,
    )
