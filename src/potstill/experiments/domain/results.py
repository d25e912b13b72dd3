"""What results.json says of a run between two domains beside the figures in the target."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from potstill.data.splits import DataSplits
from potstill.evaluation.evaluate import collect
from potstill.evaluation.exact import final_metrics
from potstill.experiments.domain.domains import Domains
from potstill.experiments.loaders import split_loader
from potstill.experiments.recipe import Recipe
from potstill.experiments.stage_names import in_order, role
from potstill.models.classifier import Classifier
from potstill.training.batch_norm import batch_norms
from potstill.training.devices import Compute
from potstill.training.observer import Silent


def in_source(
    models: Mapping[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, dict[str, Any]]:
    """Figures of every network on the source's test images; nothing where there is no target.  All processes ask.

    Args:
        models: by stage.
        recipe: how the images are prepared.
        data: the source's, with the target beside.
        compute: where.
    """
    if data.target is None:
        return {}
    return {name: _on_test(name, model, recipe, data, compute) for name, model in models.items()}


def adapted_baselines(
    models: Mapping[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, float]:
    """Top-1 on the target's test of every baseline that is given the target's BatchNorm statistics, as its teacher was:
    what the statistics alone would have brought.  Nothing where no teacher was.  All processes ask.

    Args:
        models: by stage; they stay as they are.
        recipe: whether statistics were adapted.
        data: the source's, with the target beside.
        compute: where.
    """
    found: dict[str, float] = {}
    if data.target is None or not recipe.domains.adapt_batch_norm:
        return found
    silent = Silent()
    domains = Domains(recipe, data, compute, silent, silent.warn)
    for name, model in models.items():
        if role(name) == "baseline" and batch_norms(model.module):
            adapted = replace(model, module=copy.deepcopy(model.module))
            domains.take_statistics(adapted, name)
            found[name] = _on_test(f"adapted {name}", adapted, recipe, data.target, compute)["top1"]
    return found


def describe_domains(
    recipe: Recipe,
    data: DataSplits,
    models: Mapping[str, Classifier],
    figures: Mapping[str, Mapping[str, Any]],
    adapted: Mapping[str, float],
) -> dict[str, Any] | None:
    """``domain`` of the comparison; None where there is no target.

    Args:
        recipe: says what was learned from.
        data: the source's, with the target beside.
        models: by stage.
        figures: of ``in_source``.
        adapted: of ``adapted_baselines``.
    """
    if data.target is None:
        return None
    share, settings = recipe.data.target_labels, recipe.domains
    chosen: dict[str, Any] = next((model.facts["domain"] for model in models.values() if "domain" in model.facts), {})
    by_stage: dict[str, list[float]] = {}
    for name in in_order(figures):
        of_seeds = role(name) in ("baseline", "distilled")
        by_stage.setdefault(role(name) if of_seeds else name, []).append(figures[name]["top1"])
    return {
        "source": data.source,
        "target": data.target.source,
        "target_labels": share,
        "confidence": settings.confidence,
        "balance": settings.balance,
        "adapted": any("batch_norm" in model.facts for model in models.values()),
        **chosen,
        "picked_by": "the target's labelled val" if share else "the source's val",
        "source_images": len(data.test),
        "source_top1": {stage: float(np.mean(found)) for stage, found in by_stage.items()},  # of several seeds the mean
        **({"adapted_baseline_top1": float(np.mean(list(adapted.values())))} if adapted else {}),
    }


def _on_test(name: str, model: Classifier, recipe: Recipe, data: DataSplits, compute: Compute) -> dict[str, Any]:
    settings = recipe.stage_training("student")
    probabilities, labels, _ = collect(
        model.module.to(compute.device),
        split_loader(data, "test", model.input, recipe, settings, compute),
        classes=len(model.class_names),
        device=compute.device,
        processes=compute.processes,
        names=[f"the {name} on {data.source}, {image}," for image in data.test.names],
    )
    return final_metrics(probabilities, labels, data.class_names)
