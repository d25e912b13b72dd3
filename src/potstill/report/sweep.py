"""The page and the table of a sweep, from its files alone: neither torch nor Optuna is loaded."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from potstill.amounts import NONE, decimal, duration, percent
from potstill.artifacts import write_text
from potstill.errors import ArtifactError
from potstill.report.figures.canvas import as_svg
from potstill.report.figures.sweep import draw_importance, draw_slice
from potstill.report.page import fill
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
    final = read_sealed_json(folder / "final.json") if (folder / "final.json").exists() else None
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
        "final": None if final is None else _final(folder, final),
    }
    target = folder / "sweep.html"
    write_text(target, fill("sweep.html.j2", values))
    return target, table(trials, sweep["measure"]) + ([] if final is None else _final_lines(_final(folder, final)))


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


def _final(folder: Path, final: Mapping[str, Any]) -> dict[str, Any]:
    run = folder / "trials" / str(final["folder"])
    stages = read_sealed_json(run / "results.json")["stages"]
    rows = [(name, percent(found["val"]["top1"]), percent(found["test"]["top1"])) for name, found in stages.items()]
    return {"trial": final["trial"], "folder": f"trials/{final['folder']}", "rows": rows}


def _final_lines(final: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: top-1 {val} on val, {test} on test" for name, val, test in final["rows"]]
    return ["", f"trial {final['trial']} won on val, and met the test split once:", *lines]
