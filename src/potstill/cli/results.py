"""Results as text on stdout: the table of the stages with the verdict, and the metrics of `evaluate`."""

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from potstill.config import sort_stages
from potstill.console import TEXT_WIDTH, escape_control, print_lines, print_report_path
from potstill.experiment.verdict import first_seed_note, seeds_lines
from potstill.formatting import (
    format_columns,
    format_count,
    format_decimal,
    format_milliseconds,
    format_names,
    format_percent,
    format_scaled,
)


def print_results(results: Mapping[str, Any], page: Path | None) -> None:
    """Print the table of the stages, the verdict and the report's path."""
    without_labels = results.get("without_labels") or {}
    lines = ["", *results_table(results["stages"], agreement=without_labels.get("test_labeled") is False), ""]
    for sentence in without_labels.get("sentences") or ():
        lines += [*textwrap.wrap(escape_control(str(sentence)), TEXT_WIDTH)]
    lines += [""] if without_labels else []
    comparison = results.get("comparison") or {}
    if note := first_seed_note(comparison):
        lines += [note, ""]
    if seeds := seeds_lines(comparison):
        lines += [*seeds, ""]
    if comparison.get("verdict"):
        lines += [*textwrap.wrap(escape_control(str(comparison["verdict"])), TEXT_WIDTH), ""]
    print_lines(lines)
    if page is not None:
        from potstill.report.display_names import picture_labels

        if warning := picture_labels((results.get("data") or {}).get("class_names") or ()).warning:
            print_lines(textwrap.wrap(escape_control(f"warning: {warning}"), TEXT_WIDTH))
        print_report_path(page)


def results_table(stages: Mapping[str, Any], *, agreement: bool = False) -> list[str]:
    """Return the stages' test metrics as aligned lines.

    ``agreement``: the labels are the teacher's predictions, so that top-1 is the agreement with it.  Students without
    classes have the cosine agreement with each teacher.
    """
    tests = [stage.get("test") or {} for stage in stages.values()]
    rows: list[tuple[str, ...]] = [("", "agreement", *_COLUMNS[2:]) if agreement else _COLUMNS]
    teachers: dict[str, Any] = next((test["cosine"] for test in tests if "cosine" in test), {})
    if teachers:
        rows = [("", *(f"cosine to {name}" for name in teachers), *_COLUMNS[5:])]
    for name in sort_stages(stages):
        stage = stages[name]
        test, model = stage.get("test") or {}, stage.get("model") or {}
        p50 = (stage.get("latency_ms") or {}).get("p50")
        metrics = [
            *(format_percent(test.get(key)) for key in ("top1", "top3", "f1_macro")),
            format_decimal(test.get("auc_macro")),
        ]
        if teachers:
            metrics = [format_decimal(test["cosine"][teacher]["value"]) for teacher in teachers]
        rows.append(
            (
                name,
                *metrics,
                format_count(model.get("parameters")),
                format_scaled(model.get("file_bytes"), "B"),
                format_milliseconds(p50),
            )
        )
    return format_columns(rows)


def metrics_lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of `evaluate`: the model, the overall metrics, then a line for each class."""
    percentages = ("top1", "top3", "precision_macro", "recall_macro", "f1_macro", "f1_weighted", "ece")
    numbers = ("auc_macro", "auc_micro", "nll")
    for key in ("model", "data", "count"):
        if key in metrics:
            yield f"{key:<16} {escape_control(str(metrics[key]))}"
    for key in percentages:
        yield f"{key:<16} {format_percent(metrics.get(key)):>8}"
    for key in numbers:
        yield f"{key:<16} {format_decimal(metrics.get(key)):>8}"
    names = [escape_control(str(row["class"])) for row in metrics.get("per_class", ())]
    width = max([len("class"), *map(len, names)])
    if names:
        yield ""
        yield f"{'class':<{width}}  precision   recall      F1  images"
    for name, row in zip(names, metrics.get("per_class", ()), strict=True):
        shares = [format_percent(row[key] if row["support"] else None) for key in ("precision", "recall", "f1")]
        precision, recall, f1 = shares
        yield f"{name:<{width}}  {precision:>9}  {recall:>7}  {f1:>6}  {row['support']:>6}"
    absent = [escape_control(str(name)) for name in metrics.get("absent_classes") or []]
    if absent:
        rest = len(names) - len(absent)
        averaged = f"the other {rest} classes" if rest > 1 else "the one class that has images"
        yield f"\nwarning: no images of {format_names(absent)}: macro averages are over {averaged}"
    never = [escape_control(str(name)) for name in metrics.get("never_predicted") or []]
    if metrics.get("at_chance"):
        largest = format_percent(metrics.get("largest_class"))
        yield f"\nwarning: not clearly better than chance: always predicting the most frequent class gives {largest}"
    elif never:
        yield f"\nwarning: the model never predicts {format_names(never)}"


_COLUMNS = ("", "top-1", "top-3", "macro F1", "AUC", "parameters", "file", "latency")
