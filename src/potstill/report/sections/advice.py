"""What to try next."""

import shlex
from typing import Any

from potstill.report.advice import advice
from potstill.report.advice.rule import Advice
from potstill.report.contents import Run
from potstill.report.names import plain


def context(run: Run) -> dict[str, Any] | None:
    """Each piece of advice with its facts and the command that follows it; None where the facts give no cause."""
    found = advice(run)
    if not found:
        return None
    return {"advice": [(each.title, each.because, each.todo, _command(run, each)) for each in found]}


def _command(run: Run, each: Advice) -> str:
    """The same run with the change, under another name unless it goes on."""
    if not (each.settings or each.flags) or not run.recipe:
        return ""
    folder = run.folder.resolve()
    recipe = f"{folder.parent.name}/{folder.name}/recipe.yaml"
    goes_on = "--resume" in each.flags
    name = ["--name", plain(folder.name)] if goes_on else ["--name", f"{plain(folder.name)[:58]}-next"]
    changes = [part for setting in each.settings for part in ("--set", setting)]
    root = [] if folder.parent.name == "runs" else ["--root", folder.parent.name]
    return shlex.join(["potstill", "run", recipe, *changes, *each.flags, *name, *root])
