"""What can be wrong with a recipe's method: one mapping, methods inside it, or a list of methods."""

from collections.abc import Iterator
from typing import Any

from potstill.experiments.method_settings import inner_methods
from potstill.experiments.recipe_yaml import KeyPath
from potstill.experiments.settings_errors import Finding, dotted, shown
from potstill.methods.catalog import check_method
from potstill.options import OPTION_TYPES, fits


def method_problems(method: Any) -> Iterator[Finding]:
    """Every problem with the key that it stands at; a value that is neither mapping nor list is the parser's matter."""
    if isinstance(method, dict):
        yield from _one(method, ("method",))
    elif isinstance(method, list):
        if len(method) < 2:
            yield ("method",), f"method must be one method or a list of two or more, got a list of {len(method)}"
        for position, each in enumerate(method):
            yield from _scaled(each, ("method", position))


def _scaled(settings: Any, path: KeyPath) -> Iterator[Finding]:
    """A method in a list: besides its own options it has a factor."""
    if isinstance(settings, dict) and "factor" in settings:
        if problem := fits(OPTION_TYPES["NonNegative"], settings["factor"]):
            yield (*path, "factor"), f"{dotted((*path, 'factor'))} {problem}"
        settings = {key: value for key, value in settings.items() if key != "factor"}
    yield from _one(settings, path)


def _one(settings: Any, path: KeyPath) -> Iterator[Finding]:
    if not isinstance(settings, dict):
        yield path, f"{dotted(path)} must be a method, a mapping such as {{name: kd}}, got {shown(settings)}"
        return
    if not isinstance(settings.get("name"), str):
        yield path, f"{dotted(path)}.name is missing, for example: name: kd"
        return
    inner = inner_methods(settings)
    given = {key: option for key, option in settings.items() if key != "name"}
    apart = {inside[0] for inside, _ in inner}  # each of these methods is checked below, where its own keys stand
    for problem in check_method(settings["name"], given):
        if problem.option is None:
            yield (*path, "name"), f"{dotted(path)}.name: {problem.message}"
        elif problem.option not in apart:
            # An option that is missing is a matter of the method that asks for it.
            place = (*path, problem.option) if problem.option in given else (*path, "name", problem.option)
            named = problem.message.startswith((f"{problem.option} ", f"{problem.option}.", f"{problem.option}["))
            lead = "" if named else f"{problem.option}: "
            yield place, f"{dotted(path)}.{lead}{problem.message}"
    for inside, each in inner:
        yield from (_scaled if len(inside) > 1 else _one)(each, (*path, *inside))
