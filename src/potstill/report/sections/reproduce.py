"""How to make this run again, and where its files are."""

import json
import shlex
from typing import Any

from potstill.amounts import NONE, duration, number
from potstill.experiments.method_settings import describe
from potstill.report.contents import Run
from potstill.report.names import plain

_SHOWN = ("torch", "torchvision", "timm", "numpy", "pillow")  # whose version a result may depend on


def context(run: Run) -> dict[str, Any] | None:
    """Facts, commands, and the folded recipe and environment."""
    results = run.results
    method = results.get("method") or {}
    options = ", ".join(f"{key} = {_value(value)}" for key, value in method.items() if key != "name")
    seed = number(results.get("seed"))
    facts = [
        ("Recipe", results.get("recipe")),
        ("Method", f"{method.get('name')} ({options})" if options else method.get("name")),
        *_seeds(seed, (run.comparison or {}).get("seeds")),
        *_machine(run.environment),
        ("Potstill", results.get("potstill")),
        ("Made", results.get("created")),
        ("Took", duration(results.get("seconds"))),
    ]
    folder = run.folder.resolve()
    place = f"{folder.parent.name}/{folder.name}"  # as people type it: runs/NAME; a full path would tell too much
    again = ["potstill", "run", f"{place}/recipe.yaml", "--name", f"{folder.name[:58]}-again"]
    return {
        "facts": [(name, str(value)) for name, value in facts if value not in (None, "", NONE)],
        "commands": [
            *([("The same settings again", shlex.join(again))] if run.recipe else []),
            *(
                [("The same run, and whether it gives the same", shlex.join(["potstill", "run", "--replay", place]))]
                if run.recipe
                else []
            ),
            ("A prediction with its student", shlex.join(["potstill", "predict", place, "IMAGE.jpg"])),
            ("This page again", shlex.join(["potstill", "report", place])),
        ],
        "recipe": lines(run.recipe),
        "environment": lines(run.environment),
    }


def _seeds(first: float | None, several: Any) -> list[tuple[str, str]]:
    if first is None:
        return []
    seeds = several.get("seeds") if isinstance(several, dict) else None
    if not isinstance(seeds, list) or len(seeds) < 2:
        return [("Seed", f"{first:.0f}")]
    return [("Seeds", f"{', '.join(str(seed) for seed in seeds)} of baseline and distilled; {first:.0f} of all others")]


def _machine(environment: str | None) -> list[tuple[str, str]]:
    """What the result may depend on besides the recipe, in a line each."""
    try:
        found = json.loads(environment or "{}")
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, dict):
        return []
    packages = found.get("packages")
    versions = [f"Python {found['python']}"] if found.get("python") else []
    versions += (
        [f"{name} {packages[name]}" for name in _SHOWN if name in packages] if isinstance(packages, dict) else []
    )
    where = [str(found[key]) for key in ("device", "precision", "platform") if found.get(key)]
    if number(found.get("threads")):
        where.insert(1, f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}")
    return [("Versions", ", ".join(versions)), ("Machine", ", ".join(where))]


def _value(value: Any) -> str:
    """An option; methods inside a method by their names."""
    inside = isinstance(value, dict) and "name" in value
    several = isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value)
    return describe(value) if inside or (several and value) else str(value)


def lines(text: str | None) -> str | None:
    """Text whose line ends stay while everything else invisible is written out."""
    return None if text is None else "\n".join(plain(line) for line in text.expandtabs(4).splitlines())
