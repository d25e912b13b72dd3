"""The pages and tables of searches (sweep, fit, shrink) from their files; imports neither torch nor Optuna."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.config.yaml import parse_yaml
from potstill.errors import ArtifactError
from potstill.evaluation import Array
from potstill.evaluation.significance import crossed_interval, mcnemar, paired_interval
from potstill.experiment.run_folder import RunFolder
from potstill.experiment.verdict import headline
from potstill.formatting import (
    MISSING,
    format_count,
    format_decimal,
    format_duration,
    format_loss,
    format_many,
    format_milliseconds,
    format_percent,
    format_points,
    format_scaled,
)
from potstill.io import read_checksummed_json, write_text
from potstill.report.canvas import BASELINE, DISTILLED, FAINT, VAL, add_legend_below, as_svg
from potstill.report.compare import read_contender
from potstill.report.render import render, render_template
from potstill.report.run_reader import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_STATE_LABELS = {"complete": "done", "pruned": "pruned", "fail": "failed", "running": "running"}
_MINIMIZED = ("loss", "nll")


def render_sweep(folder: Path) -> tuple[Path, list[str]]:
    """Write sweep.html; return its path and the lines of the table, best trial first."""
    if not (folder / "sweep.json").is_file():
        raise ArtifactError(f"{folder} holds no sweep: sweep.json is missing")
    sweep = read_checksummed_json(folder / "sweep.json")
    found = read_checksummed_json(folder / "trials.json") if (folder / "trials.json").exists() else {"trials": []}
    final, fit = _read_final(folder), _read_fit(folder)
    trials = rank_trials(found["trials"], sweep["measure"])
    best = trials[0]["number"] if trials and trials[0]["value"] is not None else None
    values = {
        "title": folder.resolve().name,
        "kind": "Sweep" if fit is None else "Search for a student",
        "subtitle": (
            f"{len(trials)} of {sweep['trials']} trials"
            if trials or fit is None
            else "without trials, for lack of time"
        )
        + _left_out(folder),
        "measure": sweep["measure"],
        "over": [each["text"] for each in sweep["space"]],
        "keys": [each["key"] for each in sweep["space"]],
        "rows": [_trial_row(trial, sweep) | {"best": trial["number"] == best} for trial in trials],
        "final": final,
        "fit": fit,
    }
    target = folder / "sweep.html"
    write_text(target, render_template("sweep.html.j2", values))
    labeled = (parse_yaml(sweep["recipe"], "recipe").value.get("data") or {}).get("labeled", True)
    lines = trial_table(trials, sweep["measure"]) + ([] if final is None else _final_lines(final, labeled=labeled))
    return target, lines + ([] if fit is None else ["", *fit["lines"]])


def rank_trials(trials: Sequence[Mapping[str, Any]], measure: str) -> list[Mapping[str, Any]]:
    """Sort trials by rung, trained longest first, and by their metric on val; those without it come last."""
    sign = 1 if measure in _MINIMIZED else -1

    def key(trial: Mapping[str, Any]) -> tuple[bool, int, float, int]:
        value = trial["value"]
        return value is None, -trial.get("rung", 0), sign * (value or 0.0), trial["number"]

    return sorted(trials, key=key)


def trial_table(trials: Sequence[Mapping[str, Any]], measure: str, *, last: int | None = None) -> list[str]:
    """Return lines for a terminal: number, metric on val, state, values; ``last``: only the newest so many."""
    if last is not None:
        ended = [trial for trial in trials if trial["state"] != "running"]
        trials = ended[-last:]
    return [
        f"trial {trial['number']:>3}  val {measure} {_metric_text(trial['value'], measure):>7}  "
        f"{_STATE_LABELS[trial['state']]:<7}  "
        f"{str(trial['epochs']) + ' epochs  ' if 'rung' in trial else ''}"
        f"{', '.join(f'{key}={text}' for key, text in trial['chosen'].items())}"
        for trial in trials
    ]


def _metric_text(value: Any, measure: str) -> str:
    return MISSING if value is None else format_decimal(value) if measure in _MINIMIZED else format_percent(value)


def _trial_row(trial: Mapping[str, Any], sweep: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "number": trial["number"],
        "folder": f"trials/{trial['folder']}",
        "value": _metric_text(trial["value"], sweep["measure"]),
        "state": _STATE_LABELS[trial["state"]] + (f": {trial['error']}" if trial["error"] else ""),
        "cells": [trial["chosen"].get(each["key"], MISSING) for each in sweep["space"]],
        "epochs": str(trial["epochs"]),
        "seconds": format_duration(trial["seconds"]),
    }


def _left_out(folder: Path) -> str:
    """Return a clause on what ``data.skip_bad`` has left out, if anything."""
    try:
        with (folder / "skipped.csv").open(encoding="utf-8", newline="") as file:
            count = sum(1 for _ in csv.reader(file)) - 1
    except OSError:
        return ""
    return f"; left out of the data: {format_count(count)}, listed in skipped.csv"


def _read_final(folder: Path) -> dict[str, Any] | None:
    """Return the best trial and, if it was confirmed, the results of fresh seeds; None while trials run."""
    if not (folder / "final.json").exists():
        return None
    final = read_checksummed_json(folder / "final.json")
    found: dict[str, Any] = {"trial": final["trial"], "folder": f"trials/{final['folder']}", "rows": [], "verdict": ""}
    if not (folder / "confirmation.json").exists():
        return found
    facts = read_checksummed_json(folder / "confirmation.json")
    correct = {}
    for student in ("baseline", "distilled"):
        run = read_run(folder / "confirmation" / student)
        contender = read_contender(student, run)
        correct[student] = contender.correct
        top1 = [stage.metrics["test"]["top1"] for stage in contender.students.values()]
        spread = f" ± {format_points(statistics.stdev(top1), signed=False)}" if len(top1) > 1 else ""
        found["rows"].append((student, f"{format_percent(statistics.fmean(top1))}{spread}"))
    seeds = range(facts["first_seed"], facts["first_seed"] + facts["seeds"])
    word = "seed" if len(seeds) == 1 else "seeds"
    found |= {"seeds": f"{word} {', '.join(map(str, seeds))}", "trials": facts["trials"]}
    more_seeds = "--seeds 5 and another --name" if (folder / "fit.json").exists() else "--confirm-seeds 5"
    compared = _compare_predictions(correct["baseline"], correct["distilled"])
    return found | {"verdict": headline(compared, more_seeds=more_seeds)}


def _compare_predictions(before: Mapping[int, Array], after: Mapping[int, Array]) -> dict[str, Any]:
    """Return the part of ``comparison`` for the headline, from the correct images of each student: seed -> [N] bool."""
    shared = sorted(before.keys() & after.keys())
    a, b = (np.stack([correct[seed] for seed in shared]) for correct in (before, after))
    if len(shared) == 1:
        gain, test = paired_interval(a[0], b[0]), mcnemar(a[0], b[0])
        ends = {"top1_gain": gain.value, "top1_gain_low": gain.low, "top1_gain_high": gain.high}
        return {"test_images": a.shape[1], **ends, "fixed": test["fixed"], "broken": test["broken"]}
    crossed = crossed_interval(a, b)._asdict()
    return {"test_images": a.shape[1], "seeds": {"figures": {"top1": {"n": len(shared)}}, "top1_gain": crossed}}


def _read_fit(folder: Path) -> dict[str, Any] | None:
    """Return what a search for a student has found besides its trials; None: the sweep is none."""
    if not (folder / "fit.json").exists():
        return None
    found = read_checksummed_json(folder / "fit.json")
    students = [
        [
            row["name"],
            row["weights"] or "from scratch",
            format_milliseconds(row["estimated_ms"]),
            format_milliseconds(row.get("ms")),
            format_scaled(row.get("bytes"), "B"),
            "dropped" if row["dropped"] else "",
        ]
        for row in found["students"]
    ]
    exported, lines = found.get("exported"), []
    if exported is not None:
        chosen = ", ".join(f"{key}={text}" for key, text in found["winner"].items())
        lines += [
            f"winner: {chosen}, {format_many(found['final_epochs'], 'epoch')}",
            f"exported: {exported['file']}, the {exported['role']} student, which is the better of the two on val: "
            f"{format_milliseconds(exported['ms'])} for one image on one thread, "
            f"{format_scaled(exported['bytes'], 'B')}",
        ]
        if exported.get("missed"):
            lines.append(f"the exported file is not below {exported['missed']} now, other than before its training")
        if exported.get("int8_drop") is not None:
            lines.append(f"int8 changes the accuracy on test by {format_points(-exported['int8_drop'])} points")
        lines.append(
            f"time: {format_duration(found['seconds'])}, of which the teacher {format_duration(found['teacher'])}"
        )
    return {"students": students, "lines": lines}


def _final_lines(final: Mapping[str, Any], *, labeled: bool) -> list[str]:
    best = f"trial {final['trial']} is the best on val"
    if final["trial"] is None:
        best = "one candidate, for lack of time"
    if not final["rows"]:
        confirm = [
            "The same command with --confirm-seeds 5 trains it again on fresh seeds, against a baseline that was",
            "searched with as many trials.",
        ]
        return [
            "",
            f"{best}: a search, unconfirmed. As the best of many, its metric on val is too high; it gives no verdict.",
            *(confirm if labeled else ()),  # without labels there is no baseline
        ]
    return [
        "",
        f"{best}; trained again with {final['seeds']}, against a baseline that was searched with "
        f"{final['trials']} trial{'' if final['trials'] == 1 else 's'}:",
        *(f"{name}: top-1 {test} on test" for name, test in final["rows"]),
        final["verdict"],
    ]


def render_shrink(folder: Path) -> tuple[Path, list[str]]:
    """Write the page of ``potstill shrink`` and the run's report, which links it; return its path and a text."""
    if not (folder / "shrink.json").is_file():
        raise ArtifactError(f"{folder} holds no result of `potstill shrink`: shrink.json is missing")
    found = read_checksummed_json(folder / "shrink.json")
    reference, chosen = found["reference"], found["candidates"][found["chosen"]]
    rows = [_shrink_row(found, {"how": "the student, float32", **reference}, note="reference")]
    for at, row in enumerate(found["candidates"]):
        note = "chosen" if at == found["chosen"] else "" if row["passes"] else "may lose too much"
        rows.append(_shrink_row(found, row, note=note))
    kind = "int8" if found["int8"] else "float32"
    summary = (
        f"{format_scaled(chosen['bytes'], 'B')} in place of {format_scaled(reference['bytes'], 'B')} "
        f"({reference['bytes'] / chosen['bytes']:.1f} times smaller), {format_milliseconds(chosen['ms'])} in place of "
        f"{format_milliseconds(reference['ms'])}, with "
        f"{format_percent(chosen['weights'] / reference['weights'], 0)} of the weights, {kind}"
    )
    test, looks = found["test"], found["test"]["looks"]
    sentence = (
        f"Test ({test['images']:,} images): {_interval_text(test['file'])} top-1, the student "
        f"{_interval_text(test['student'])}; difference {format_points(test['difference']['value'])} points "
        f"({format_points(test['difference']['low'])} to {format_points(test['difference']['high'])}, 95 %)"
    )
    if looks > 1:
        sentence += f". This is look {looks} of searches here at test: quote the first"
    bound = (
        f"On {found['val_images']:,} val images it {format_loss(chosen['loss'])}, and loses "
        f"at most {format_points(chosen['bound'], signed=False)} with {_confidence(chosen)} confidence; allowed were "
        f"{found['max_loss']:g}."
    )
    figure = as_svg(
        partial(draw_trade_off, found=found),
        (6.4, 3.4),
        name="tradeoff",
        label="Accuracy on val against the size of the file, for every candidate",
    )
    values = {
        "title": found["stage"],
        "kind": "Smaller files of a student",
        "subtitle": f"{found['architecture']}, {len(found['candidates'])} candidates, at most {found['max_loss']:g} "
        f"points of loss{_left_out(folder.parent.parent)}",
        "summary": summary,
        "bound": bound,
        "test": sentence,
        "rows": rows,
        "figure": figure,
    }
    target = folder / "shrink.html"
    write_text(target, render_template("shrink.html.j2", values))
    run = RunFolder(folder.parent.parent)
    if run.results.is_file():
        render(run.path)
    lines = [
        f"{row['how']}: {row['bytes']}, {row['ms']}, val {row['val']}{', ' + row['note'] if row['note'] else ''}"
        for row in rows
    ]
    return target, [*lines, "", f"file: {found['file']}", summary, bound, f"{sentence}."]


def draw_trade_off(figure: "Figure", found: Mapping[str, Any]) -> None:
    """Draw accuracy on val with its interval against the size of the file; the chosen candidate is marked."""
    from matplotlib.ticker import PercentFormatter

    axes = figure.add_subplot()
    axes.set_xscale("log")
    reference, candidates = found["reference"], found["candidates"]
    for rows, color, label in (([reference], BASELINE, "float32 student"), (candidates, DISTILLED, "smaller files")):
        x, y = [row["bytes"] / 1e6 for row in rows], [row["val"]["value"] for row in rows]
        low = [row["val"]["value"] - row["val"]["low"] for row in rows]
        high = [row["val"]["high"] - row["val"]["value"] for row in rows]
        axes.errorbar(x, y, yerr=[low, high], fmt="o-", color=color, markersize=4, linewidth=1, capsize=2, label=label)
    chosen = candidates[found["chosen"]]
    axes.scatter(
        [chosen["bytes"] / 1e6], [chosen["val"]["value"]], s=90, facecolors="none", edgecolors=VAL, zorder=4,
        label="chosen",
    )  # fmt: skip
    sizes = sorted({row["bytes"] / 1e6 for row in (reference, *candidates)})
    shown = sizes[:1]
    for size in sizes:
        if size > shown[-1] * max(1.15, (sizes[-1] / sizes[0]) ** 0.14):  # a label has about a seventh of the axis
            shown.append(size)
    axes.set_xticks(shown, [f"{size:.3g}" for size in shown])
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_xlabel("size of the file, MB")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1, symbol=" %"))
    axes.set_ylabel("top-1 on val, 95 % interval", color=FAINT)
    add_legend_below(figure, axes)


def _shrink_row(found: Mapping[str, Any], row: Mapping[str, Any], *, note: str) -> dict[str, str]:
    return {
        "how": row["how"],
        "weights": format_percent(row["weights"] / found["reference"]["weights"], 0),
        "bytes": format_scaled(row["bytes"], "B"),
        "ms": format_milliseconds(row["ms"]),
        "val": _interval_text(row["val"]),
        "changed": f"{row['lost']} / {row['gained']}" if "lost" in row else MISSING,
        "bound": f"{format_points(row['bound'], signed=False)} ({_confidence(row)})" if "bound" in row else MISSING,
        "note": note,
    }


def _confidence(row: Mapping[str, Any]) -> str:
    return format_percent(row.get("confidence", 0.95), 0)


def _interval_text(interval: Mapping[str, float]) -> str:
    return f"{format_percent(interval['value'])} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"
