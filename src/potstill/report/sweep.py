"""The page and the table of a sweep, from its files alone: neither torch nor Optuna is loaded."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from potstill.amounts import NONE, decimal, duration, percent, points
from potstill.artifacts import write_text
from potstill.errors import ArtifactError
from potstill.experiments.verdict.verdict import headline
from potstill.report.compare import compared, group
from potstill.report.contents import read_run
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.sweep import draw_importance, draw_slice
from potstill.report.page import fill
from potstill.report.paired import enter
from potstill.sealed import read_sealed_json

_STATES = {"complete": "done", "pruned": "pruned", "fail": "failed", "running": "running"}
_SMALLER_IS_BETTER = ("loss", "nll")


def render_sweep(folder: Path) -> tuple[Path, list[str]]:
    """Write sweep.html; returns its path and the lines of the table, the best trial first.

    Raises:
        ArtifactError: no sweep, or a damaged file.
        StorageError: the page cannot be written.
    """
    if not (folder / "sweep.json").is_file():
        raise ArtifactError(f"{folder} holds no sweep: sweep.json is missing")
    sweep = read_sealed_json(folder / "sweep.json")
    found = read_sealed_json(folder / "trials.json") if (folder / "trials.json").exists() else {"trials": []}
    final = _final(folder)
    trials = ranked(found["trials"], sweep["measure"])
    best = trials[0]["number"] if trials and trials[0]["value"] is not None else None
    values = {
        "title": folder.resolve().name,
        "subtitle": f"{len(trials)} of {sweep['trials']} trials",
        "measure": sweep["measure"],
        "over": [each["text"] for each in sweep["space"]],
        "keys": [each["key"] for each in sweep["space"]],
        "rows": [_row(trial, sweep) | {"best": trial["number"] == best} for trial in trials],
        "importance": _importance(found.get("importance", {})),
        "slices": [_slice(trials, each, best, at) for at, each in enumerate(sweep["space"])]
        if best is not None
        else [],
        "final": final,
    }
    target = folder / "sweep.html"
    write_text(target, fill("sweep.html.j2", values))
    return target, table(trials, sweep["measure"]) + ([] if final is None else _final_lines(final))


def ranked(trials: Sequence[Mapping[str, Any]], measure: str) -> list[Mapping[str, Any]]:
    """The best on val first; then those without a figure, in the order in which they began."""
    sign = 1 if measure in _SMALLER_IS_BETTER else -1
    return sorted(trials, key=lambda each: (each["value"] is None, sign * (each["value"] or 0.0), each["number"]))


def table(trials: Sequence[Mapping[str, Any]], measure: str, *, last: int | None = None) -> list[str]:
    """Lines for a terminal: number, figure on val, state, values; ``last``: only so many, the newest."""
    if last is not None:
        ended = [trial for trial in trials if trial["state"] != "running"]
        trials = ended[-last:]
    return [
        f"trial {trial['number']:>3}  val {measure} {_figure(trial['value'], measure):>7}  "
        f"{_STATES[trial['state']]:<7}  {', '.join(f'{key}={text}' for key, text in trial['chosen'].items())}"
        for trial in trials
    ]


def _figure(value: Any, measure: str) -> str:
    return NONE if value is None else decimal(value) if measure in _SMALLER_IS_BETTER else percent(value)


def _row(trial: Mapping[str, Any], sweep: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "number": trial["number"],
        "folder": f"trials/{trial['folder']}",
        "value": _figure(trial["value"], sweep["measure"]),
        "state": _STATES[trial["state"]] + (f": {trial['error']}" if trial["error"] else ""),
        "cells": [trial["chosen"].get(each["key"], NONE) for each in sweep["space"]],
        "epochs": str(trial["epochs"]),
        "seconds": duration(trial["seconds"]),
    }


def _importance(shares: Mapping[str, float]) -> str | None:
    if not shares:
        return None
    label = "Importance: " + ", ".join(f"{key} {percent(share)}" for key, share in shares.items())
    return as_svg(
        partial(draw_importance, shares=shares), (6.4, 0.8 + 0.4 * len(shares)), name="importance", label=label
    )


def _slice(trials: Sequence[Mapping[str, Any]], dimension: Mapping[str, Any], best: Any, at: int) -> dict[str, str]:
    draw = partial(draw_slice, trials=trials, dimension=dimension, best=best)
    label = f"{dimension['key']} against the figure on val, one dot a trial"
    return {"key": dimension["key"], "svg": as_svg(draw, (4.2, 3.0), name=f"slice{at}", label=label)}


def _final(folder: Path) -> dict[str, Any] | None:
    """The winner, and what fresh seeds gave where it was confirmed; None while trials run."""
    if not (folder / "final.json").exists():
        return None
    final = read_sealed_json(folder / "final.json")
    found: dict[str, Any] = {"trial": final["trial"], "folder": f"trials/{final['folder']}", "rows": [], "verdict": ""}
    if not (folder / "confirmation.json").exists():
        return found
    facts = read_sealed_json(folder / "confirmation.json")
    correct = {}
    for student in ("baseline", "distilled"):
        run = read_run(folder / "confirmation" / student)
        students = group([run])[0].of(student)
        correct[student] = enter(student, students).correct
        top1 = [stage.metrics["test"]["top1"] for _, stage in students.values()]
        spread = f" ± {points(statistics.stdev(top1), signed=False)}" if len(top1) > 1 else ""
        found["rows"].append((student, f"{percent(statistics.fmean(top1))}{spread}"))
    seeds = range(facts["first_seed"], facts["first_seed"] + facts["seeds"])
    found |= {"seeds": ", ".join(map(str, seeds)), "trials": facts["trials"]}
    return found | {"verdict": headline(compared(correct["baseline"], correct["distilled"]))}


def _final_lines(final: Mapping[str, Any]) -> list[str]:
    best = f"trial {final['trial']} won on val"
    if not final["rows"]:
        return [
            "",
            f"{best}: a search, unconfirmed. Its val figure is the best of many and so too high; no verdict follows",
            "from it. The same command with --confirm-seeds 5 trains it again on fresh seeds, against a baseline that",
            "was searched as long.",
        ]
    return [
        "",
        f"{best}; trained again with seeds {final['seeds']}, against a baseline that was searched with "
        f"{final['trials']} trials:",
        *(f"{name}: top-1 {test} on test" for name, test in final["rows"]),
        final["verdict"],
    ]
