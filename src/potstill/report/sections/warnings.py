"""What the run warned of, and what is missing from the folder."""

from typing import Any

from potstill.report.contents import STAGES, Run
from potstill.report.figures.fonts import labels


def context(run: Run) -> dict[str, Any] | None:
    """Sentences, the run's own first."""
    said = [str(warning) for warning in run.results.get("warnings") or []]
    absent = [str(name) for name in run.results.get("planned") or STAGES if name not in run.stages | run.repeats]
    if absent and len(run.stages) > 1:  # a stage trained alone on purpose misses nothing
        said.append(f"Not part of this run: {', '.join(absent)}.")
    for name, stage in run.stages.items():
        if "test" not in stage.metrics:
            said.append(f"No test results of {name}.")
    for split, skipped in sorted(_skipped(run).items()):
        said.append(f"AUC on {split} leaves out classes that it cannot be had for: {', '.join(skipped)}.")
    if warning := labels(run.class_names).warning:
        said.append(warning)
    return {"warnings": said} if said else None


def _skipped(run: Run) -> dict[str, list[str]]:
    """Split -> classes, as any stage says (they depend on the images alone)."""
    found: dict[str, list[str]] = {}
    for stage in run.stages.values():
        for split, metrics in stage.metrics.items():
            if metrics.get("auc_skipped"):
                found[split] = [str(name) for name in metrics["auc_skipped"]]
    return found
