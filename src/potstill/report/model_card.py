"""report.md: the model card of a run's student; the licence is left to the user."""

import ntpath
import posixpath
import re
from typing import Any

from potstill.formatting import MISSING, format_decimal, format_number, format_percent, format_scaled
from potstill.report.display_names import escape_invisible
from potstill.report.run_reader import STAGES, Run, StageResult

_CARD_METRICS = (
    ("top1", "Top-1", format_percent),
    ("top3", "Top-3", format_percent),
    ("f1_macro", "F1, macro", format_percent),
    ("ece", "ECE", format_percent),
    ("nll", "NLL", format_decimal),
)


def model_card(run: Run) -> str | None:
    """Return front matter and Markdown; None if no student was trained."""
    from huggingface_hub import ModelCard, ModelCardData

    student = run.stages.get("distilled") or run.stages.get("baseline")
    if student is None:
        return None
    data = ModelCardData(
        library_name="potstill",
        pipeline_tag="image-classification",
        tags=["image-classification", "knowledge-distillation"],
        model_name=run.name,
        eval_results=_eval_results(run, student),
        ignore_metadata_errors=True,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(run, student)}"))


def _eval_results(run: Run, student: StageResult) -> list[Any] | None:
    from huggingface_hub import EvalResult

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
    verdict = str((run.comparison or {}).get("verdict") or "")
    network = f"`{_escaped(model.get('architecture'))}`, {format_scaled(model.get('parameters'))} parameters"
    parts = [
        f"# {_escaped(run.name)}",
        f"An image classifier ({network}, images of {model.get('size') or MISSING} pixels) for "
        f"{len(run.class_names)} classes: {', '.join(map(_escaped, run.class_names[:20]))}"
        + (f" and {len(run.class_names) - 20} more." if len(run.class_names) > 20 else "."),
        _escaped(verdict),
        "## Intended use",
        "Images like the training images, of these classes only: for an image of anything else it still predicts one "
        "of them.",
        "## Metrics",
        _metric_table(run),
        "On the test split, which was used for no choice.",
        "## Limits",
        "- Metrics hold for images drawn like the test images. Nothing is known of others.\n"
        "- Confidence is not the probability of being right; see the calibration section of report.html."
        "\n- Metrics of small classes are less certain than the mean suggests: see report.html, class by class.",
        "## Training",
        _training_sentence(run, student),
        "## Licence",
        "Not stated. It depends on the images and on the teacher's weights; add `license:` to the front matter.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metric_table(run: Run) -> str:
    shown = [run.stages[name] for name in STAGES if name in run.stages]
    rows = [
        [name, *(form(stage.metrics.get("test", {}).get(key)) for stage in shown)] for key, name, form in _CARD_METRICS
    ]
    rows.append(["Parameters", *(format_scaled(stage.model.get("parameters")) for stage in shown)])
    head = ["", *(stage.name for stage in shown)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * len(shown)], *rows])


def _training_sentence(run: Run, student: StageResult) -> str:
    teachers = [_escaped(s.model.get("architecture")) for s in run.stages.values() if s.role == "teacher"]
    by = f" from {', '.join(teachers)}" if teachers and student.name == "distilled" else ""
    method = f" by {_escaped(without_folders(run.method))}" if by and run.method else ""
    return (
        f"Trained by potstill {_escaped(run.results.get('potstill'))}{by}{method}, seed {run.results.get('seed')}, on "
        f"{_escaped(without_folders(run.data.get('source')))}. The recipe is `recipe.yaml`; `potstill run recipe.yaml` "
        "repeats it."
    )


def _escaped(value: Any) -> str:
    """Escape Markdown and HTML, on one line."""
    text = " ".join(escape_invisible(str(MISSING if value is None else value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|#!])", r"\\\1", text)


def without_folders(value: Any) -> Any:
    """Return JSON values with absolute paths cut to their last part.

    Example:
        >>> without_folders({"data": {"source": "/home/me/photos"}, "lines": ["a/b"]})
        {'data': {'source': 'photos'}, 'lines': ['a/b']}
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        if posixpath.isabs(value):
            return posixpath.basename(value.rstrip("/")) or value
        if ntpath.splitdrive(value)[0] and ntpath.isabs(value):
            return ntpath.basename(value.rstrip("\\/")) or value
    return value
