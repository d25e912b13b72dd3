"""What a stage writes for people who read text: metrics.txt and scikit-learn's classification reports."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from potstill.amounts import NONE, count, decimal, duration, milliseconds, number, percent, scaled
from potstill.report.aligned import facts, table
from potstill.report.contents import SPLITS, Run, Stage
from potstill.report.metric_names import Format, metric_rows
from potstill.report.names import plain


def metrics_text(run: Run, stage: Stage) -> str:
    """metrics.txt: what was trained, all figures on train, val and test, and the same for each class."""
    title = f"{stage.name} of run {plain(run.name)}"
    parts = [f"{title}\n{'=' * len(title)}", facts(_facts(run, stage)), _figures(run, stage), _classes(stage)]
    return "\n\n".join(part for part in parts if part) + "\n"


def classification_report_text(stage: Stage, split: str) -> str | None:
    """Precision, recall and F1 of each class in the layout of scikit-learn's ``classification_report``; None where the
    split has no images.
    """
    figures = stage.metrics.get(split, {})
    classes, images = figures.get("per_class"), number(figures.get("count"))
    if not classes or not images:
        return None
    names = [plain(str(row["class"])) for row in classes]
    width = max(len("weighted avg"), *map(len, names))
    keys = ("precision", "recall", "f1")
    support = np.array([row["support"] for row in classes])
    columns = np.array([[row[key] for key in keys] for row in classes])

    def line(name: str, values: Iterable[float], count: object) -> str:
        return f"{name:>{width}} " + "".join(f" {value:>9.4f}" for value in values) + f" {count:>9}"

    rows = [line(name, values, n) for name, values, n in zip(names, columns, support, strict=True)]
    accuracy = " " * 20 + f" {figures['top1']:>9.4f} {int(images):>9}"
    return "\n".join(
        [
            " " * width + " " + "".join(f" {head:>9}" for head in ("precision", "recall", "f1-score", "support")),
            "",
            *rows,
            "",
            f"{'accuracy':>{width}} {accuracy}",
            line("macro avg", columns.mean(axis=0), int(images)),
            line("weighted avg", np.average(columns, axis=0, weights=support), int(images)),
            "",
        ]
    )


def latency_text(stage: Stage) -> str:
    """``1.20 ms (p95 1.40 ms), one image at a time, 2 threads, cpu``."""
    latency = stage.latency
    if number(latency.get("p50")) is None:
        return NONE
    batch = number(latency.get("batch"))
    how = ["one image at a time" if batch == 1 else f"batches of {count(batch)}" if batch else ""]
    how += [_several(latency["threads"], "thread") if number(latency.get("threads")) else ""]
    how += [plain(str(latency.get("device") or ""))]
    text = f"{milliseconds(latency['p50'])} (p95 {milliseconds(latency.get('p95'))})"
    return ", ".join([text, *filter(None, how)])


def memory_text(stage: Stage) -> str:
    """``15.7 MB of weights, 537 kB for one image on its way``."""
    weights, on_its_way = (scaled(stage.memory.get(key), "B") for key in ("weights", "activations"))
    return f"{weights} of weights, {on_its_way} for one image on its way"


def training_text(stage: Stage) -> str:
    """``10 epochs in 1 min 23 s (321 images/s), best epoch 8 by top1 on val``."""
    training = stage.training
    if not training:
        return "not here: it came ready-made"
    text = f"{_several(training.get('epochs'), 'epoch')} in {duration(training.get('seconds'))}"
    if training.get("extended_from"):
        text += f", extended after {' and '.join(count(each) for each in training['extended_from'])} with --resume"
    if stage.facts.get("reused_from"):
        text += f", reused from {plain(str(stage.facts['reused_from']))}"
    if number(training.get("images_per_second")) is not None:
        text += f" ({count(training['images_per_second'])} images/s)"
    if stage.best_epoch is not None:
        text += f", best epoch {stage.best_epoch} by {plain(str(training.get('selection_metric') or 'top1'))} on val"
    return text


def teaching_text(stage: Stage) -> str:
    """``assistant-1: 3.97 M parameters (15.9 MB), 12.3 ms in each step of 64 images``; "" where nobody teaches it."""
    teaching = stage.teaching
    if not teaching:
        return ""
    names = ", ".join(plain(str(name)) for name in teaching.get("by") or [])
    memory = f"{scaled(teaching.get('parameters'))} parameters ({scaled(teaching.get('bytes'), 'B')})"
    images = _several(teaching.get("batch_size"), "image")
    each = milliseconds(teaching.get("ms_per_step"))
    return f"{names}: {memory}, {each} in each step of {images}{_store_text(teaching)}"


def _store_text(teaching: Mapping[str, Any]) -> str:
    asked, read = number(teaching.get("asked")), number(teaching.get("read"))
    if asked is None or read is None:
        return ""
    return f"; {count(read)} of {count(asked + read)} answers read from the store"


def _facts(run: Run, stage: Stage) -> list[tuple[str, str]]:
    model = stage.model
    size = number(model.get("size")) or number(run.data.get("size"))
    return [
        ("Architecture", plain(str(model.get("architecture") or NONE))),
        ("Input", f"{count(size)} × {count(size)} pixels" if size else NONE),
        ("Parameters", count(model.get("parameters"))),
        ("FLOPs", f"{scaled(model.get('flops'))} for one image (2 for each multiply-add)"),
        ("File", scaled(model.get("file_bytes"), "B")),
        ("Training", training_text(stage)),
        *([("Learns from", teaching_text(stage))] if stage.teaching else []),
        ("Latency", latency_text(stage)),
        *([("Memory", memory_text(stage))] if stage.memory else []),
        *([("Seed", count(stage.facts["seed"]))] if number(stage.facts.get("seed")) is not None else []),
    ]


def _figures(run: Run, stage: Stage) -> str:
    splits = list(stage.metrics)
    if not splits:
        return ""
    rows = [["Images", *(count(_images(stage.metrics[split])) for split in splits)]]
    sure = [""]
    for key, name, form in metric_rows(run.best_k):
        if any(key in stage.metrics[split] for split in splits):
            rows.append([name, *(form(stage.metrics[split].get(key)) for split in splits)])
            low, high = stage.interval(key)
            sure.append("" if low is None or high is None else f"{form(low).removesuffix(' %')} to {form(high)}")
    heads = ["", *splits]
    if any(sure):
        heads.append("95 % interval on test")
        rows = [[*row, interval] for row, interval in zip(rows, sure, strict=True)]
    text = table([heads, *rows])
    for split in splits:
        skipped = stage.metrics[split].get("auc_skipped") or []
        if skipped:
            names = ", ".join(plain(str(name)) for name in skipped)
            text += f"\nAUC on {split} leaves out classes that it cannot be had for: {names}"
    return text


def _images(metrics: dict[str, Any]) -> Any:
    return metrics.get("count")


def _classes(stage: Stage) -> str:
    """Each class in a row; precision, recall and F1 of the splits beside each other."""
    per_split = {
        split: {row["class"]: row for row in stage.metrics[split]["per_class"]}
        for split in SPLITS
        if stage.metrics.get(split, {}).get("per_class")
    }
    if not per_split:
        return ""
    keys: tuple[tuple[str, str, Format], ...] = (
        ("support", "images", count),
        ("precision", "precision", percent),
        ("recall", "recall", percent),
        ("f1", "F1", percent),
        ("auc", "AUC", decimal),
    )
    wanted = [(split, key, form) for key, _, form in keys for split in per_split]
    # Two head lines: the figure above the first of its splits, the splits below.
    above = [name if i == 0 else "" for _, name, _ in keys for i in range(len(per_split))]
    names = list(dict.fromkeys(name for rows in per_split.values() for name in rows))
    rows = [
        [plain(str(name)), *(form(per_split[split].get(name, {}).get(key)) for split, key, form in wanted)]
        for name in names
    ]
    return "Per class\n" + table([["", *above], ["class", *(split for split, _, _ in wanted)], *rows], heads=2)


def _several(value: object, noun: str) -> str:
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"
