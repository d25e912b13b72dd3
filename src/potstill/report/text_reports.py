"""Text files: metrics.txt and classification reports of a stage, and report.md, the model card of the student."""

import ntpath
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from potstill.config import STAGES
from potstill.experiment.verdict import first_seed_note
from potstill.formatting import (
    MISSING,
    display_width,
    format_columns,
    format_count,
    format_decimal,
    format_duration,
    format_interval,
    format_milliseconds,
    format_number,
    format_percent,
    format_points,
    format_scaled,
)
from potstill.report.display_names import escape_invisible
from potstill.report.run_reader import SPLITS, Run, StageResult

ValueFormatter = Callable[[Any], str]


def metric_rows(best_k: int = 3) -> list[tuple[str, str, ValueFormatter]]:
    """Return (key in metrics.json, name, formatter) of each metric."""
    averages = ("micro", "macro", "weighted")
    groups = (
        ("precision", "Precision", format_percent),
        ("recall", "Recall", format_percent),
        ("f1", "F1", format_percent),
    )
    return [
        ("loss", "Loss", format_decimal),
        ("top1", "Top-1", format_percent),
        ("top3", f"Top-{best_k}", format_percent),
        *((f"{key}_{average}", f"{name}, {average}", form) for key, name, form in groups for average in averages),
        *((f"auc_{average}", f"AUC, {average}", format_decimal) for average in averages),
        ("ece", "ECE", format_percent),
        ("nll", "NLL", format_decimal),
        ("agreement", "Agreement with teacher", format_percent),
        ("kl_to_teacher", "KL to teacher", format_decimal),
    ]


def aligned_table(rows: Sequence[Sequence[str]], *, heads: int = 1) -> str:
    """Align the first column left and all others right, with a rule under the first ``heads`` rows.

    Example:
        >>> print(aligned_table([["", "train"], ["Top-1", "98.1 %"]]))
                train
        -------------
        Top-1  98.1 %
    """
    lines = format_columns(rows)
    return "\n".join([*lines[:heads], "-" * max(map(display_width, lines)), *lines[heads:]])


def metrics_text(run: Run, stage: StageResult) -> str:
    """Return metrics.txt: the network and its training, and all metrics on each split, also by class."""
    title = f"{stage.name} of run {escape_invisible(run.name)}"
    parts = [
        f"{title}\n{'=' * len(title)}",
        "\n".join(format_columns(_stage_facts(run, stage), left=(0, 1))),
        _metric_table(run, stage),
        _class_table(stage),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def classification_report_text(stage: StageResult, split: str) -> str | None:
    """Return the report in the layout of scikit-learn's ``classification_report``; None for an empty split."""
    metrics = stage.metrics.get(split, {})
    classes, images = metrics.get("per_class"), format_number(metrics.get("count"))
    if not classes or not images:
        return None
    names = [escape_invisible(str(row["class"])) for row in classes]
    width = max(len("weighted avg"), *map(len, names))
    keys = ("precision", "recall", "f1")
    support = np.array([row["support"] for row in classes])
    columns = np.array([[row[key] for key in keys] for row in classes])

    def line(name: str, values: Iterable[float], count: object) -> str:
        return f"{name:>{width}} " + "".join(f" {value:>9.4f}" for value in values) + f" {count:>9}"

    rows = [line(name, values, n) for name, values, n in zip(names, columns, support, strict=True)]
    accuracy = " " * 20 + f" {metrics['top1']:>9.4f} {int(images):>9}"
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


def latency_text(stage: StageResult) -> str:
    """Return ``1.20 ms (p95 1.40 ms), one image at a time, 2 threads, cpu``."""
    latency = stage.latency
    if format_number(latency.get("p50")) is None:
        return MISSING
    batch = format_number(latency.get("batch"))
    how = ["one image at a time" if batch == 1 else f"batches of {format_count(batch)}" if batch else ""]
    how += [_plural(latency["threads"], "thread") if format_number(latency.get("threads")) else ""]
    how += [escape_invisible(str(latency.get("device") or ""))]
    text = f"{format_milliseconds(latency['p50'])} (p95 {format_milliseconds(latency.get('p95'))})"
    return ", ".join([text, *filter(None, how)])


def memory_text(stage: StageResult) -> str:
    """Return ``15.7 MB of weights, 537 kB of activations at most (batch 1)``."""
    weights, activations = (format_scaled(stage.memory.get(key), "B") for key in ("weights", "activations"))
    return f"{weights} of weights, {activations} of activations at most (batch 1)"


def training_text(stage: StageResult) -> str:
    """``10 epochs in 1 min 23 s (321 images/s), best epoch 8 by top1 on val``."""
    training, head = stage.training, head_text(stage)
    if not training:
        return head or "none, pretrained"
    text = f"{_plural(training.get('epochs'), 'epoch')} in {format_duration(training.get('seconds'))}"
    if training.get("extended_from"):
        text += (
            f", extended after {' and '.join(format_count(each) for each in training['extended_from'])} with --resume"
        )
    if stage.facts.get("reused_from"):
        text += f", reused from {escape_invisible(str(stage.facts['reused_from']))}"
    if format_number(training.get("images_per_second")) is not None:
        text += f" ({format_count(training['images_per_second'])} images/s)"
    if stage.best_epoch is not None:
        metric = escape_invisible(str(training.get("selection_metric") or "top1"))
        text += f", best epoch {stage.best_epoch} by {metric} on val"
    text += _adapted_text(training)
    return f"{text}; from {head}" if head else text


def _adapted_text(training: Mapping[str, Any]) -> str:
    """Return what the method took from this training instead of from its paper, with a semicolon before it; or ""."""
    factors, epochs = training.get("term_factors"), training.get("method_epochs")
    texts = []
    bounded = {name: each for name, each in factors.items() if each != 1} if isinstance(factors, dict) else {}
    if bounded:
        shown = ", ".join(f"{escape_invisible(str(name))} {format_decimal(each, 3)}" for name, each in bounded.items())
        texts.append(f"factors that bounded the teacher's terms in that epoch: {shown}")
    if isinstance(epochs, dict) and epochs:
        shown = ", ".join(f"{escape_invisible(str(name))} {format_decimal(each, 3)}" for name, each in epochs.items())
        texts.append(f"{shown} as a share of the training")
    return "".join(f"; {text}" for text in texts)


def head_text(stage: StageResult) -> str:
    """Return ``a linear probe on embeddings of 1,000 images (C 0.01, ...)``, or "" without a fitted head."""
    head = stage.facts.get("head")
    if not isinstance(head, dict):
        return ""
    if head.get("kind") == "zero_shot":
        prompts = head.get("prompts")
        first = f", such as {escape_invisible(repr(str(prompts[0])))}" if isinstance(prompts, list) and prompts else ""
        return f"a zero-shot head, made of {_plural(head.get('texts'), 'text')} without labels{first}"
    if head.get("kind") == "none":
        return ""
    checked = head.get("cross_validated") or {}
    strength = format_number(head.get("C"))
    rule = ", the default for weights of other classes," if head.get("default") is True else ""
    text = (
        f"a linear probe{rule} on embeddings of {format_count(head.get('images'))} images "
        f"(C {MISSING if strength is None else f'{strength:.2g}'}, cross-validated top-1 "
        f"{format_percent(checked.get('top1'))}, {format_duration(head.get('seconds'))})"
    )
    if "taken" in head:
        taken = "the probe" if head["taken"] == "probe" else "the fine-tuned network"
        text += (
            f"; val top-1 {format_percent(head.get('val_top1'))} as a probe, "
            f"{format_percent(head.get('finetuned_val_top1'))} fine-tuned: {taken} was taken"
        )
    return text


def teaching_text(stage: StageResult) -> str:
    """Return ``assistant-1: 3.97 M parameters (15.9 MB), 12.3 ms in each step of 64 images``; "" without teacher."""
    teaching = stage.teaching
    if not teaching:
        return ""
    names = ", ".join(escape_invisible(str(name)) for name in teaching.get("by") or [])
    memory = f"{format_scaled(teaching.get('parameters'))} parameters ({format_scaled(teaching.get('bytes'), 'B')})"
    images = _plural(teaching.get("batch_size"), "image")
    each = format_milliseconds(teaching.get("ms_per_step"))
    return f"{names}: {memory}, {each} in each step of {images}{_cache_text(teaching)}"


def _cache_text(teaching: Mapping[str, Any]) -> str:
    computed, read = format_number(teaching.get("computed")), format_number(teaching.get("read"))
    if computed is None or read is None:
        return ""
    return f"; {format_count(read)} of {format_count(computed + read)} outputs read from the teacher cache"


def _stage_facts(run: Run, stage: StageResult) -> list[tuple[str, str]]:
    model = stage.model
    size = format_number(model.get("size")) or format_number(run.data.get("size"))
    return [
        ("Architecture", escape_invisible(str(model.get("architecture") or MISSING))),
        ("Input", f"{format_count(size)} × {format_count(size)} pixels" if size else MISSING),
        ("Parameters", format_count(model.get("parameters"))),
        ("FLOPs", f"{format_scaled(model.get('flops'))} for one image (2 for each multiply-add)"),
        ("File", format_scaled(model.get("file_bytes"), "B")),
        ("Training", training_text(stage)),
        *([("Learns from", teaching_text(stage))] if stage.teaching else []),
        ("Latency", latency_text(stage)),
        *([("Memory", memory_text(stage))] if stage.memory else []),
        *([("Seed", format_count(stage.facts["seed"]))] if format_number(stage.facts.get("seed")) is not None else []),
    ]


def gain_with_interval(gain: Any) -> str:
    """Return the gain of top-1 in points, and its interval if known."""
    gain = gain if isinstance(gain, dict) else {}
    value, low, high = (format_number(gain.get(f"top1_gain{end}")) for end in ("", "_low", "_high"))
    if value is None:
        return MISSING
    interval = format_interval(low, high, format_points)
    return format_points(value) + (f" ({interval})" if interval else "")


def _metric_table(run: Run, stage: StageResult) -> str:
    splits = list(stage.metrics)
    if not splits:
        return ""
    rows = [["Images", *(format_count(stage.metrics[split].get("count")) for split in splits)]]
    intervals = [""]
    for key, name, form in metric_rows(run.best_k):
        if any(key in stage.metrics[split] for split in splits):
            rows.append([name, *(form(stage.metrics[split].get(key)) for split in splits)])
            low, high = stage.interval(key)
            intervals.append(format_interval(low, high, form))
    heads = ["", *splits]
    if any(intervals):
        heads.append("95 % interval on test")
        rows = [[*row, interval] for row, interval in zip(rows, intervals, strict=True)]
    for teacher, found in ((stage.metrics.get("test") or {}).get("cosine") or {}).items():  # test is the only split
        mean, *ends, before = (format_decimal(found.get(key), 3) for key in ("value", "low", "high", "before"))
        rows += [[f"Cosine to {escape_invisible(str(teacher))}", mean], ["95 % interval", " to ".join(ends)]]
        rows += [["Before the training", before]]
    text = aligned_table([heads, *rows])
    for split in splits:
        skipped = stage.metrics[split].get("auc_skipped") or []
        if skipped:
            names = ", ".join(escape_invisible(str(name)) for name in skipped)
            text += f"\nAUC on {split} leaves out classes for which it is undefined: {names}"
    return text


def _class_table(stage: StageResult) -> str:
    per_split = {
        split: {row["class"]: row for row in stage.metrics[split]["per_class"]}
        for split in SPLITS
        if stage.metrics.get(split, {}).get("per_class")
    }
    if not per_split:
        return ""
    keys: tuple[tuple[str, str, ValueFormatter], ...] = (
        ("support", "images", format_count),
        ("precision", "precision", format_percent),
        ("recall", "recall", format_percent),
        ("f1", "F1", format_percent),
        ("auc", "AUC", format_decimal),
    )
    columns = [(split, key, form) for key, _, form in keys for split in per_split]
    # Two head lines: the metric above the first of its splits, the splits below.
    above = [name if i == 0 else "" for _, name, _ in keys for i in range(len(per_split))]
    names = list(dict.fromkeys(name for rows in per_split.values() for name in rows))
    rows = [
        [escape_invisible(str(name)), *(form(per_split[split].get(name, {}).get(key)) for split, key, form in columns)]
        for name in names
    ]
    return "Per class\n" + aligned_table([["", *above], ["class", *(split for split, _, _ in columns)], *rows], heads=2)


def _plural(value: object, noun: str) -> str:
    return f"{format_count(value)} {noun}{'' if value == 1 else 's'}"


_CARD_METRICS = (
    ("top1", "Top-1", format_percent),
    ("top3", "Top-3", format_percent),
    ("f1_macro", "F1, macro", format_percent),
    ("ece", "ECE", format_percent),
    ("nll", "NLL", format_decimal),
)


def model_card(run: Run) -> str | None:
    """Return the model card: front matter and Markdown, without licence; None if no student was trained."""
    from huggingface_hub import ModelCard, ModelCardData

    student = run.stages.get("distilled") or run.stages.get("baseline")
    if student is None:
        return None
    task = "image-classification" if run.class_names else "image-feature-extraction"
    data = ModelCardData(
        library_name="potstill",
        pipeline_tag=task,
        tags=[task, "knowledge-distillation"],
        model_name=run.name,
        eval_results=_eval_results(run, student),
        ignore_metadata_errors=True,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(run, student)}"))


def _eval_results(run: Run, student: StageResult) -> list[Any] | None:
    from huggingface_hub import EvalResult

    if run.without_labels.get("test_labeled") is False:
        return None  # accuracy is unknown
    test = student.metrics.get("test", {})
    source = str(without_folders(run.data.get("source") or "images"))
    found = [
        EvalResult("image-classification", source, source, kind, value, dataset_split="test", metric_name=name)
        for kind, key, name in (("accuracy", "top1", "Top-1"), ("f1", "f1_macro", "F1, macro"))
        if (value := format_number(test.get(key))) is not None
    ]
    return found or None


def _card_text(run: Run, student: StageResult) -> str:
    model = student.model
    verdict = str((run.comparison or {}).get("verdict") or " ".join(run.without_labels.get("sentences") or ()))
    network = f"`{_markdown(model.get('architecture'))}`, {format_scaled(model.get('parameters'))} parameters"
    parts = [
        f"# {_markdown(run.name)}",
        _card_purpose(run, f"{network}, images of {model.get('size') or MISSING} pixels"),
        _markdown(verdict),
        "## Intended use",
        "Images like the training images, of these classes only: for an image of anything else it still predicts one "
        "of them."
        if run.class_names
        else "The start of a classifier, for images like the training images: it has an embedding and no classes.",
        "## Metrics",
        _card_metrics(run),
        f"On the test split, which was used for no choice. {first_seed_note(run.comparison)}".rstrip(),
        "## Limits",
        "- Metrics hold for images drawn like the test images. Nothing is known of others.\n"
        "- Confidence is not the probability of being right.\n"
        "- Metrics of small classes are less certain than the mean suggests.",
        "## Training",
        _training_sentence(run, student),
        "## Licence",
        "Not stated. It depends on the images and on the teacher's weights; add `license:` to the front matter.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _card_purpose(run: Run, network: str) -> str:
    names = run.class_names
    if not names:
        return f"A network ({network}) that was trained on embeddings and predicts no classes."
    more = f" and {len(names) - 20} more." if len(names) > 20 else "."
    return f"An image classifier ({network}) for {len(names)} classes: {', '.join(map(_markdown, names[:20]))}{more}"


def _card_metrics(run: Run) -> str:
    shown, metrics = [run.stages[name] for name in STAGES if name in run.stages], list(_CARD_METRICS)
    if run.without_labels:
        metrics = metrics if run.without_labels.get("test_labeled") else []  # they are of the teacher's own classes
        if run.class_names:
            metrics += [
                ("agreement", "Agreement with teacher", format_percent),
                ("kl_to_teacher", "KL", format_decimal),
            ]
    rows = [[name, *(form(stage.metrics.get("test", {}).get(key)) for stage in shown)] for key, name, form in metrics]
    rows += [
        [
            f"Cosine agreement with {teacher}",
            *(
                format_decimal(((stage.metrics.get("test", {}).get("cosine") or {}).get(teacher) or {}).get("value"), 3)
                for stage in shown
            ),
        ]
        for teacher in run.cosine_teachers
    ]
    rows.append(["Parameters", *(format_scaled(stage.model.get("parameters")) for stage in shown)])
    head = ["", *(stage.name for stage in shown)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * len(shown)], *rows])


def _training_sentence(run: Run, student: StageResult) -> str:
    teachers = [_markdown(s.model.get("architecture")) for s in run.stages.values() if s.role == "teacher"]
    by = f" from {', '.join(teachers)}" if teachers and student.name == "distilled" else ""
    method = f" by {_markdown(without_folders(run.method))}" if by and run.method else ""
    return (
        f"Trained by potstill {_markdown(run.results.get('potstill'))}{by}{method}, seed {run.results.get('seed')}, on "
        f"{_markdown(without_folders(run.data.get('source')))}. The recipe is `recipe.yaml`; `potstill run "
        "recipe.yaml` repeats it."
    )


def _markdown(value: Any) -> str:
    text = " ".join(escape_invisible(str(MISSING if value is None else value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#!])", r"\\\1", text)


def without_folders(value: Any) -> Any:
    """Return JSON values with absolute paths cut to their last part, since folders describe a machine.

    Example:
        >>> without_folders({"data": {"source": "/home/me/photos"}, "lines": ["a/b"]})
        {'data': {'source': 'photos'}, 'lines': ['a/b']}
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        for system in (posixpath, ntpath):
            if system.isabs(value) and (system is posixpath or system.splitdrive(value)[0]):
                return system.basename(value.rstrip("/\\")) or value
    return value
