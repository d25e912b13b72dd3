"""The last part of a run: every stage on train, val and test, once; then the comparison."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from potstill import __version__
from potstill.artifacts import write_text
from potstill.data.splits import DataSplits
from potstill.evaluation.agreement import agreement
from potstill.evaluation.averages import Array
from potstill.evaluation.cost import flops, latency, parameters, summary_text
from potstill.evaluation.evaluate import collect
from potstill.evaluation.exact import final_metrics
from potstill.evaluation.significance import mcnemar, paired_bootstrap
from potstill.experiments.groups import Probabilities, members, together
from potstill.experiments.loaders import split_loader
from potstill.experiments.recipe import Recipe
from potstill.experiments.run_folder import SPLITS, RunFolder
from potstill.experiments.stage_names import in_order, role
from potstill.experiments.verdict import verdict
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute

_LONG = ("per_class", "confusion")  # kept in metrics.json, left out of results.json
_BETWEEN = ("assistant", "generation")  # stages on the way to the distilled student


def evaluate_stages(
    run: RunFolder, models: dict[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, Any]:
    """Write predictions, metrics and summaries of every stage; return ``stages``, ``together`` and ``comparison`` of
    results.json.

    The test split is read here and nowhere before, unless the recipe asks for test curves.  In float32, as ``predict``
    and ``evaluate`` compute, so that they give the same answers.
    """
    probabilities = {name: _predict(run, name, model, recipe, data, compute) for name, model in models.items()}
    labels = {split: np.asarray(getattr(data, split).labels) for split in SPLITS}
    delays = latency({name: (model.module, model.input) for name, model in models.items()}, batch=1)
    groups = together(probabilities, recipe.teachers)
    stages = {}
    for name, model in models.items():
        folder, own = run.stage(name), probabilities[name]
        learns = role(name) not in ("teacher", "baseline")
        metrics = {
            split: _metrics(own[split], labels[split], data.class_names)
            | (agreement(own[split], groups["teachers"][split]) if learns and "teachers" in groups else {})
            for split in SPLITS
        }
        run.write_metrics(name, metrics)
        write_text(folder / "summary.txt", summary_text(model.module, model.input, model.class_names))
        stages[name] = {
            "model": {
                "architecture": model.architecture,
                **({} if model.remodelled is None else {"remodelled": model.remodelled["name"]}),
                "parameters": parameters(model.module),
                "flops": flops(model.module, model.input),
                "file_bytes": (folder / "model.safetensors").stat().st_size,
                "size": model.input.size,
            },
            "training": model.facts.get("training"),
            **({"teaching": model.facts["teaching"]} if "teaching" in model.facts else {}),
            "latency_ms": delays[name],
            **{split: _short(metrics[split]) for split in SPLITS},
        }
    correct = {name: found["test"].argmax(axis=1) == labels["test"] for name, found in probabilities.items()}
    correct |= {name: found["test"].argmax(axis=1) == labels["test"] for name, found in groups.items()}
    described = {
        name: {
            "of": members(name, probabilities),
            **{split: _short(_metrics(found[split], labels[split], data.class_names)) for split in SPLITS},
        }
        for name, found in groups.items()
        if len(members(name, probabilities)) > 1
    }
    comparison = compare(stages, correct, described) if {"baseline", "distilled"} <= stages.keys() else None
    return {"stages": stages, "together": described, "comparison": comparison}


def describe_run(
    name: str,
    recipe: Recipe,
    data: DataSplits,
    planned: list[str],
    evaluated: dict[str, Any],
    seconds: float,
    warnings: list[str],
) -> dict[str, Any]:
    """The whole of results.json, schema 1."""
    return {
        "schema": 1,
        "name": name,
        "recipe": recipe.name,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "potstill": __version__,
        "seconds": round(seconds, 3),
        "seed": recipe.seed,
        "data": {
            "source": data.source,
            "origin": data.origin,
            "fingerprint": data.fingerprint,
            "class_names": list(data.class_names),
            "counts": data.counts(),
            "size": recipe.data.size,
        },
        "method": recipe.method,
        "planned": planned,
        **evaluated,
        "warnings": warnings,
    }


def _predict(
    run: RunFolder, name: str, model: Classifier, recipe: Recipe, data: DataSplits, compute: Compute
) -> Probabilities:
    settings = recipe.stage_training(name)
    model.module.to(compute.device)
    found: Probabilities = {}
    for split in SPLITS:
        images = getattr(data, split)
        loader = split_loader(data, split, model.input, recipe, settings, compute)
        found[split], _, _ = collect(
            model.module,
            loader,
            classes=len(model.class_names),
            device=compute.device,
        )
        run.write_predictions(
            name, split, images.names, images.labels.tolist(), found[split].tolist(), model.class_names
        )
    return found


def _metrics(probabilities: Array, labels: Array, classes: tuple[str, ...]) -> dict[str, Any]:
    metrics = final_metrics(probabilities, labels, classes)
    return metrics | {"loss": metrics["nll"]}


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in _LONG}


def compare(stages: dict[str, Any], correct: dict[str, Array], groups: dict[str, Any] | None = None) -> dict[str, Any]:
    """``comparison`` of results.json: the distilled student against the baseline on the same test images.

    Args:
        stages: of results.json, with baseline and distilled; with teachers where there are any.
        correct: stage or group -> [N] bool, whether each test image was classified correctly.
        groups: ``together`` of results.json.
    """
    groups = groups or {}
    baseline, distilled = (stages[name]["test"] for name in ("baseline", "distilled"))
    gained = _gain(correct["baseline"], correct["distilled"])
    others = [name for name in (*in_order(stages), *groups) if name == "generations" or role(name) in _BETWEEN]
    comparison = {
        **gained,
        "f1_macro_gain": distilled["f1_macro"] - baseline["f1_macro"],
        "auc_macro_gain": _difference(distilled["auc_macro"], baseline["auc_macro"]),
        **_against_teachers(stages, groups, gained["top1_gain"]),
        "test_images": len(correct["baseline"]),
        "others": {name: _gain(correct["baseline"], correct[name]) for name in others},
    }
    return comparison | {"verdict": verdict(comparison, stages)}


def _gain(before: Array, after: Array) -> dict[str, Any]:
    gain, low, high = paired_bootstrap(before, after)
    test = mcnemar(before, after)
    return {
        "top1_gain": gain,
        "top1_gain_low": low,
        "top1_gain_high": high,
        "mcnemar_p": test["p"],
        "fixed": test["fixed"],
        "broken": test["broken"],
    }


def _against_teachers(stages: dict[str, Any], groups: dict[str, Any], gain: float) -> dict[str, Any]:
    """How far the teacher, or the teachers together, lead, and what they cost beside the student."""
    names, student = members("teachers", stages), stages["distilled"]
    if not names:
        return {"teachers": 0, "gap": None, "gap_closed": None}
    lead = groups.get("teachers", stages[names[0]])["test"]["top1"] - stages["baseline"]["test"]["top1"]
    sums = {
        "parameter_ratio": ("model", "parameters"),
        "file_ratio": ("model", "file_bytes"),
        "latency_ratio": ("latency_ms", "p50"),
    }
    return {
        "teachers": len(names),
        "gap": lead,
        "gap_closed": gain / lead if lead > 0 else None,
        **{
            name: sum(stages[teacher][part][key] for teacher in names) / student[part][key]
            for name, (part, key) in sums.items()
        },
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
