"""Verdict, warnings, comparison of the stages, and what to try next."""

import shlex
from collections.abc import Callable
from typing import Any

from potstill.config import STAGES, stage_name
from potstill.experiment.verdict import (
    average_over_seeds,
    effect_of,
    folds_of,
    format_confidence,
    headline,
    interval_scope,
    repeats_of,
    seeds_count,
    verdict_sentences,
)
from potstill.formatting import (
    MISSING,
    format_count,
    format_decimal,
    format_difference,
    format_duration,
    format_interval,
    format_milliseconds,
    format_number,
    format_percent,
    format_points,
    format_ratio,
    format_scaled,
)
from potstill.report.advice import Advice, code_flag, collect_advice
from potstill.report.diagnostics import stages_figure
from potstill.report.display_names import escape_invisible, picture_labels
from potstill.report.run_reader import SPLITS, Run, StageResult
from potstill.report.text_reports import (
    ValueFormatter,
    gain_with_interval,
    latency_text,
    metric_rows,
    teaching_text,
    training_text,
)

FINDING_TITLES = {
    "helped": "Distillation helped",
    "hurt": "Distillation hurt",
    "unclear": "No clear difference",
    "one_seed": "One seed: no verdict",
}


def verdict_context(run: Run) -> dict[str, Any] | None:
    """Return sentences, facts, the interval on a number line, and what stands beside them on the first screen."""
    beside = {"picture": stages_figure(run), **_networks_table(run)}
    if run.without_labels:
        agreement, *others = map(str, run.without_labels.get("sentences") or [""])
        mark = "No labels: agreement with the teacher"
        if run.without_labels.get("classes") is False:
            mark = "No labels and no classes: cosine agreement with the teacher"
        verdict = {"finding": "unknown", "mark": mark, "headline": [agreement], "sentences": others}
        return verdict | {"facts": [], "lines": []} | beside
    comparison = run.comparison
    sentences = verdict_sentences(comparison, run.results.get("stages"))
    shown = 1 + sentences.index(headline(comparison))  # after warnings such as a network at chance
    first, others = sentences[:shown], sentences[shown:]
    if stopped := run.results.get("not_distilled"):
        first = [str(stopped)]
    others += run.teachers_without_classes
    effect = effect_of(comparison)
    mark = (
        "One fold: no verdict" if (comparison or {}).get("fold") else FINDING_TITLES.get(effect, "Nothing to compare")
    )
    means = average_over_seeds(comparison) if comparison else {}
    return {
        "finding": effect,
        "mark": mark,
        "headline": first,
        "sentences": others,
        "facts": _verdict_facts(means, effect) if comparison else [],
        "lines": [interval_line(means)] if effect != "unknown" else [],
        **beside,
    }


def _networks_table(run: Run) -> dict[str, Any]:
    metrics = (
        ("top1", "top-1 on test", format_percent, format_points),
        ("nll", "NLL", format_decimal, format_difference),
        ("agreement", "agreement with teacher", format_percent, format_points),
    )
    labeled = not run.without_labels or bool(run.without_labels.get("test_labeled"))
    shown = [each for each in metrics if (each[0] == "agreement") != labeled]
    stages = run.stages.values()
    columns = [
        *(
            (f"cosine to {teacher}", [_cosine_cell(stage, teacher) for stage in stages])
            for teacher in run.cosine_teachers
        ),
        *((name, [_test_cell(run, stage, key, form, change) for stage in stages]) for key, name, form, change in shown),
        ("parameters", [(format_scaled(stage.model.get("parameters")), "") for stage in stages]),
        ("file", [(format_scaled(stage.model.get("file_bytes"), "B"), "") for stage in stages]),
        ("latency, p50", [(format_milliseconds(stage.latency.get("p50")), "") for stage in stages]),
        ("training", [(format_duration(stage.training.get("seconds")), "") for stage in stages]),
    ]
    known = [(name, cells) for name, cells in columns if any(cell != MISSING for cell, _ in cells)]
    return {
        "columns": [name for name, _ in known],
        "rows": [
            (stage.name, stage.model.get("architecture") or MISSING, [cells[at] for _, cells in known])
            for at, stage in enumerate(stages)
        ],
    }


def interval_line(means: dict[str, Any]) -> dict[str, Any]:
    """Return the positions (0 to 100) of 0, gain and interval on a number line, and its label."""
    gain, low, high = (float(means[key]) for key in ("top1_gain", "top1_gain_low", "top1_gain_high"))
    left, right = min(0.0, low), max(0.0, high)
    margin = 0.12 * (right - left) or 0.01
    left, right = left - margin, right + margin

    def position(value: float) -> float:
        return round(100 * (value - left) / (right - left), 2)

    return {
        "zero": position(0.0),
        "low": position(low),
        "gain": position(gain),
        "width": round(position(high) - position(low), 2),
        "label": f"{format_points(gain)} points, {_interval_text(means, low, high)}",
    }


def _interval_text(means: dict[str, Any], low: float, high: float) -> str:
    confidence = format_number(means.get("confidence"))
    interval = f"{format_confidence(confidence or 0.95)} interval {format_points(low)} to {format_points(high)}"
    return f"{interval} over {interval_scope(means)}"


def _verdict_facts(means: dict[str, Any], effect: str) -> list[tuple[str, str, str]]:
    facts = []
    gain, low, high = (format_number(means.get(f"top1_gain{end}")) for end in ("", "_low", "_high"))
    seeds = format_number(means.get("seeds_count"))
    if gain is not None:
        more = _interval_text(means, low, high) if low is not None and high is not None else ""
        facts.append((format_points(gain), "points of top-1, distilled − baseline", more))
    if seeds is not None:
        p = format_number(means.get("p"))
        more = "" if p is None else f"test over {interval_scope(means)}: p = {format_decimal(p, 3)}"
        what = (
            "folds, in each of which all networks are trained"
            if folds_of(means)
            else "seeds, all with the same teacher"
        )
        facts.append((format_count(seeds), what, more))
    elif format_number(means.get("fixed")) is not None:
        p = format_number(means.get("mcnemar_p"))
        changed = f"{format_count(means['fixed'])} / {format_count(means.get('broken'))}"
        more = "" if p is None else f"McNemar's exact test: p = {format_decimal(p, 3)}"
        facts.append((changed, "test images newly right / newly wrong", more))
    facts += _gap_facts(means, effect)
    for key, what in (
        ("parameter_ratio", "parameters, teacher : student"),
        ("file_ratio", "file size, teacher : student"),
        ("latency_ratio", "latency p50, teacher : student"),
    ):
        if format_number(means.get(key)) is not None:
            facts.append((format_ratio(means[key]), what, ""))
    return facts


def _gap_facts(means: dict[str, Any], effect: str) -> list[tuple[str, str, str]]:
    gap, closed = format_number(means.get("gap")), format_number(means.get("gap_closed"))
    if gap is None:
        return []
    low, high = format_number(means.get("gap_low")), format_number(means.get("gap_high"))
    more = "" if low is None or high is None else f"95 % interval {format_points(low)} to {format_points(high)}"
    facts = [(format_points(gap), "points of top-1, teacher − baseline", more if gap > 0 else "no gap to close")]
    share_low, share_high = format_number(means.get("gap_closed_low")), format_number(means.get("gap_closed_high"))
    significant = low is None or share_low is not None
    if gap > 0 and significant and closed is not None and effect == "helped":
        known = closed < 1 and share_low is not None and share_high is not None
        more = f"95 % interval {100 * (share_low or 0):.0f} to {100 * (share_high or 0):.0f} %" if known else ""
        facts.append((f"{100 * closed:.0f} %" if closed < 1 else "all", "of the gap to the teacher closed", more))
    return facts


def warnings_context(run: Run) -> dict[str, Any] | None:
    """Return the warnings, the run's own first."""
    # Several lines in the terminal are one paragraph of the page.
    warnings = [" ".join(str(warning).split("\n")) for warning in run.results.get("warnings") or []]
    absent = [str(name) for name in run.results.get("planned") or STAGES if name not in run.stages | run.repeats]
    if absent and len(run.stages) > 1:  # a single stage was meant to be alone
        warnings.append(f"Not part of this run: {', '.join(absent)}.")
    for name, stage in run.stages.items():
        if "test" not in stage.metrics:
            warnings.append(f"No test results of {name}.")
    for split, skipped in sorted(_classes_without_auc(run).items()):
        warnings.append(f"AUC on {split} leaves out classes for which it is undefined: {', '.join(skipped)}.")
    if warning := picture_labels(run.class_names).warning:
        warnings.append(warning)
    return {"warnings": warnings} if warnings else None


def _classes_without_auc(run: Run) -> dict[str, list[str]]:
    """Return the classes by split, from any stage, as they depend on the images only."""
    found: dict[str, list[str]] = {}
    for stage in run.stages.values():
        for split, metrics in stage.metrics.items():
            if metrics.get("auc_skipped"):
                found[split] = [str(name) for name in metrics["auc_skipped"]]
    return found


DifferenceFormatter = Callable[..., str]


def flips_context(run: Run) -> dict[str, Any] | None:
    """Return a row for each student on what it has wrong that the model in use has right; None without such a model."""
    facts = run.results.get("flips")
    students = facts.get("students") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(students, dict):
        return None
    rows = []
    for name, row in students.items():
        if isinstance(row, dict) and format_number(row.get("rate")) is not None:
            ends = f" ({format_percent(row.get('rate_low'))} to {format_percent(row.get('rate_high'))})"
            counts = [format_count(row.get(key)) for key in ("negative", "positive")]
            rows.append((name, [*counts, format_percent(row["rate"]) + ends]))
    change = [format_number(facts.get(key)) for key in ("difference", "difference_low", "difference_high")]
    value, low, high = change
    sentence = ""
    if value is not None and low is not None and high is not None:
        clear = "" if low > 0 or high < 0 else ": no clear difference"
        sentence = (
            f"The distilled student's negative flip rate is {format_points(value)} points from the baseline's (95 % "
            f"interval over test images {format_points(low)} to {format_points(high)}){clear}."
        )
    return {
        "rows": rows,
        "images": format_count(facts.get("images")),
        "correct": format_count(facts.get("previous_correct")),
        "sentence": sentence,
    }


_INTERMEDIATE_ROLES = ("assistant", "generation")
_STUDENTS = ("baseline", "distilled")


def comparison_context(run: Run) -> dict[str, Any] | None:
    """Return the table on test, the costs of each network, each seed, and all metrics on all splits."""
    if not run.stages:
        return None
    stages = list(run.stages.values())
    return {
        "stages": [(stage.name, stage.model.get("architecture") or MISSING) for stage in stages],
        "difference": {"baseline", "distilled"} <= set(run.stages),
        "looks": int(format_number((run.results.get("looks") or {}).get("test_evaluations")) or 1),
        "several": 0 if folds_of(run.comparison) else len(_seeds_summary(run).get("seeds") or [0]),
        "folds": _fold_rows(run),
        "fold_seeds": seeds_count(run.comparison) if folds_of(run.comparison) else 0,
        "results": _test_rows(run),
        "costs": _cost_rows(stages),
        "seeds": [] if run.folds else _seed_rows(run),
        "splits": [split for split in SPLITS if any(split in stage.metrics for stage in stages)],
        "all_rows": _split_rows(run, stages),
        "notes": [(stage.name, training_text(stage), latency_text(stage), teaching_text(stage)) for stage in stages],
        "others": _intermediate_rows(run),
    }


def _seeds_summary(run: Run) -> dict[str, Any]:
    """Return the comparison over seeds or folds; empty for a single seed."""
    found: Any = repeats_of(run.comparison)
    return found or {}


def _fold_rows(run: Run) -> list[dict[str, Any]]:
    gains = {each.get("fold"): format_number(each.get("top1_gain")) for each in _seeds_summary(run).get("each") or []}
    rows = []
    for each in run.folds:
        gain = gains.get(each.get("fold"))
        rows.append(
            {
                "name": format_count(each.get("fold")),
                "page": f"fold-{format_number(each.get('fold')) or 0:.0f}/report.html",
                "images": format_count(each.get("images")),
                "cells": [format_percent((each.get("top1") or {}).get(stage)) for stage in run.stages],
                "gain": MISSING if gain is None else format_points(gain),
            }
        )
    return rows


def _seed_rows(run: Run) -> list[list[str]]:
    rows = []
    for at, each in enumerate(_seeds_summary(run).get("each") or [], start=1):
        stages = [(run.stages | run.repeats).get(stage_name(role, at)) for role in ("baseline", "distilled")]
        tests = [{} if stage is None else stage.metrics.get("test", {}) for stage in stages]
        cells = [format_percent(test.get("top1")) for test in tests]
        changed = f"{format_count(each.get('fixed'))} / {format_count(each.get('broken'))}"
        rows.append(
            [
                format_count(each.get("seed")),
                *cells,
                gain_with_interval(each),
                changed,
                format_decimal(each.get("mcnemar_p"), 3),
            ]
        )
    return rows


def _intermediate_rows(run: Run) -> list[dict[str, Any]]:
    gains = (run.comparison or {}).get("others") or {}
    tests = {
        name: stage.metrics.get("test", {}) for name, stage in run.stages.items() if stage.role in _INTERMEDIATE_ROLES
    }
    titles = dict.fromkeys(tests, "")
    for name, group in run.together.items():
        tests[name] = group.get("test") or {}
        titles[name] = ", ".join(map(str, group.get("of") or []))
    return [
        {
            "name": f"{name} together" if name in run.together else name,
            "of": titles[name],
            "cells": [
                format_percent(test.get("top1")),
                format_percent(test.get("f1_macro")),
                format_decimal(test.get("auc_macro")),
            ],
            "gain": gain_with_interval(gains.get(name)),
        }
        for name, test in tests.items()
    ]


def _test_rows(run: Run) -> list[dict[str, Any]]:
    rows = [
        ("top1", "Top-1", format_percent, format_points),
        ("top3", f"Top-{run.best_k}", format_percent, format_points),
        ("f1_macro", "F1, macro", format_percent, format_points),
        ("auc_macro", "AUC, macro", format_decimal, format_difference),
        ("ece", "ECE (lower is better)", format_percent, format_points),
        ("nll", "NLL (lower is better)", format_decimal, format_difference),
        ("agreement", "Agreement with teacher", format_percent, format_points),
    ]
    if run.without_labels:
        rows = rows if run.without_labels.get("test_labeled") else rows[-1:]  # others are of the teacher's own classes
        rows += [("kl_to_teacher", "KL divergence from teacher", format_decimal, format_difference)]
    tests = {name: stage.metrics.get("test", {}) for name, stage in run.stages.items()}
    cosines = [
        {
            "name": f"Cosine agreement with {teacher}",
            "cells": [_cosine_cell(stage, teacher) for stage in run.stages.values()],
            "difference": ("", ""),
        }
        for teacher in run.cosine_teachers
    ]
    return cosines + [
        {
            "name": name,
            "cells": [_test_cell(run, stage, key, form, change) for stage in run.stages.values()],
            "difference": _test_difference(run, key, change),
        }
        for key, name, form, change in rows
        if any(format_number(test.get(key)) is not None for test in tests.values())
    ]


def _test_cell(
    run: Run, stage: StageResult, key: str, form: ValueFormatter, change: DifferenceFormatter
) -> tuple[str, str]:
    """Return a metric on test and its interval; of several seeds or folds, mean and standard deviation."""
    over_folds = _over_folds(stage, key)
    if (deviation := format_number(over_folds.get("sd"))) is not None:
        return form(over_folds.get("mean")), f"± {change(deviation, signed=False)}"
    summary = (_seeds_summary(run).get("figures") or {}).get(key) or {}
    which = {"baseline": "a", "distilled": "b"}.get(stage.name)
    mean, deviation = (format_number(summary.get(f"{part}_{which}")) for part in ("mean", "sd"))
    if mean is not None and deviation is not None:
        return form(mean), f"± {change(deviation, signed=False)}"
    return _with_interval(stage, "test", key, form)


def _cosine_cell(stage: StageResult, teacher: str) -> tuple[str, str]:
    """Return the cosine agreement of a student with a teacher on test, and its interval."""
    found = (stage.metrics.get("test", {}).get("cosine") or {}).get(teacher) or {}
    low, high = (format_number(found.get(end)) for end in ("low", "high"))
    return format_decimal(found.get("value"), 3), format_interval(low, high, lambda value: format_decimal(value, 3))


def _over_folds(stage: StageResult, key: str) -> dict[str, Any]:
    """Return mean and standard deviation of a metric over the folds; empty for other runs."""
    return (stage.facts.get("over_folds") or {}).get(key) or {}


def _shown_metric(stage: StageResult | None, key: str) -> float | None:
    """Return a metric on test as the table shows it: the mean over folds, if there are some."""
    if stage is None:
        return None
    return format_number(_over_folds(stage, key).get("mean", stage.metrics.get("test", {}).get(key)))


def _test_difference(run: Run, key: str, change: DifferenceFormatter) -> tuple[str, str]:
    """Return distilled - baseline and its interval, over seeds if there are several, else over images if known."""
    summary = (_seeds_summary(run).get("figures") or {}).get(key) or {}
    if format_number(summary.get("difference")) is not None:
        value = change(summary["difference"])
        low, high = (format_number(summary.get(f"difference_{end}")) for end in ("low", "high"))
        if key == "top1":  # the verdict's interval, over seeds and images; the others are over seeds only
            low, high = (
                format_number((_seeds_summary(run).get("top1_gain") or {}).get(end)) for end in ("low", "high")
            )
    else:
        before, after = (_shown_metric(run.stages.get(name), key) for name in _STUDENTS)
        if before is None or after is None:
            return MISSING, ""
        value = change(after - before)
        low, high = (format_number((run.comparison or {}).get(f"{key}_gain_{end}")) for end in ("low", "high"))
    return value, format_interval(low, high, change)


def _cost_rows(stages: list[StageResult]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = [
        ("Parameters", [format_scaled(stage.model.get("parameters")) for stage in stages]),
        ("FLOPs, one image", [format_scaled(stage.model.get("flops")) for stage in stages]),
        ("File size", [format_scaled(stage.model.get("file_bytes"), "B") for stage in stages]),
        ("Latency of one image, p50", [format_milliseconds(stage.latency.get("p50")) for stage in stages]),
        ("Latency of one image, p95", [format_milliseconds(stage.latency.get("p95")) for stage in stages]),
        ("Memory: weights", [format_scaled(stage.memory.get("weights"), "B") for stage in stages]),
        ("Peak activation memory (batch 1)", [format_scaled(stage.memory.get("activations"), "B") for stage in stages]),
        ("Training time", [format_duration(stage.training.get("seconds")) for stage in stages]),
        ("Epochs (best)", [_epochs_text(stage) for stage in stages]),
        ("Teacher time per step", [format_milliseconds(stage.teaching.get("ms_per_step")) for stage in stages]),
    ]
    return [(name, cells) for name, cells in rows if any(cell != MISSING for cell in cells)]


def _epochs_text(stage: StageResult) -> str:
    if not stage.training:
        return MISSING
    best = "" if stage.best_epoch is None else f" ({stage.best_epoch})"
    return format_count(stage.training.get("epochs")) + best


def _split_rows(run: Run, stages: list[StageResult]) -> list[tuple[str, list[list[tuple[str, str]]]]]:
    """Return (metric, cells of each stage over the splits)."""
    splits = [split for split in SPLITS if any(split in stage.metrics for stage in stages)]
    rows = []
    for key, name, form in metric_rows(run.best_k):
        cells = [[_with_interval(stage, split, key, form) for split in splits] for stage in stages]
        if any(cell[0] != MISSING for stage_cells in cells for cell in stage_cells):
            rows.append((name, cells))
    return rows


def _with_interval(stage: StageResult, split: str, key: str, form: ValueFormatter) -> tuple[str, str]:
    low, high = stage.interval(key) if split == "test" else (None, None)
    value = form(stage.metrics.get(split, {}).get(key))
    return value, "" if value == MISSING else format_interval(low, high, form)


def advice_context(run: Run) -> dict[str, Any] | None:
    """Return the advice with evidence and commands; None if there is none."""
    found = collect_advice(run)
    if not found:
        return None
    return {"advice": [(each.title, each.evidence, each.action, _follow_up_command(run, each)) for each in found]}


def _follow_up_command(run: Run, each: Advice) -> str:
    """Return the command for the same run with the change, under another name unless it is resumed."""
    if not (each.settings or each.flags) or not run.recipe:
        return ""
    folder = run.folder.resolve()
    recipe = f"{run.shown_path}/recipe.yaml"
    name = escape_invisible(folder.name)
    name = name if "--resume" in each.flags else f"{name[:58]}-next"
    changes = [part for setting in each.settings for part in ("--set", setting)]
    root = [] if folder.parent.name == "runs" else ["--output-dir", folder.parent.name]
    return shlex.join(["potstill", "run", recipe, *changes, *each.flags, "--name", name, *root, *code_flag(run)])
