"""How to make this run again, and where its files are."""

import shlex
from typing import Any

from potstill.amounts import NONE, duration, number
from potstill.experiments.method_settings import describe
from potstill.report.contents import Run
from potstill.report.names import plain


def context(run: Run) -> dict[str, Any] | None:
    """Facts, commands, and the folded recipe and environment."""
    results = run.results
    method = results.get("method") or {}
    options = ", ".join(f"{key} = {_value(value)}" for key, value in method.items() if key != "name")
    seed = number(results.get("seed"))
    facts = [
        ("Recipe", results.get("recipe")),
        ("Method", f"{method.get('name')} ({options})" if options else method.get("name")),
        ("Seed", None if seed is None else f"{seed:.0f}"),
        ("Potstill", results.get("potstill")),
        ("Made", results.get("created")),
        ("Took", duration(results.get("seconds"))),
    ]
    folder = run.folder.resolve()
    place = f"{folder.parent.name}/{folder.name}"  # as people type it: runs/NAME; a full path would tell too much
    again = shlex.join(["potstill", "run", f"{place}/recipe.yaml", "--name", f"{folder.name[:58]}-again"])
    return {
        "facts": [(name, str(value)) for name, value in facts if value not in (None, "", NONE)],
        "command": again if run.recipe else None,
        "predict": shlex.join(["potstill", "predict", place, "IMAGE.jpg"]),
        "recipe": lines(run.recipe),
        "environment": lines(run.environment),
    }


def _value(value: Any) -> str:
    """An option; methods inside a method by their names."""
    inside = isinstance(value, dict) and "name" in value
    several = isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value)
    return describe(value) if inside or (several and value) else str(value)


def lines(text: str | None) -> str | None:
    """Text whose line ends stay while everything else invisible is written out."""
    return None if text is None else "\n".join(plain(line) for line in text.expandtabs(4).splitlines())
