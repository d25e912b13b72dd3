"""The last part of a run: every stage on train, val and test, once; then the comparison."""

from datetime import UTC, datetime
from typing import Any

import numpy as np

from potstill import __version__
from potstill.artifacts import write_json, write_text
from potstill.data.splits import DataSplits
from potstill.evaluation.agreement import agreement
from potstill.evaluation.averages import Array
from potstill.evaluation.cost import flops, latency, parameters, summary_text
from potstill.evaluation.evaluate import collect
from potstill.evaluation.exact import final_metrics
from potstill.evaluation.significance import mcnemar, paired_bootstrap
from potstill.experiments.recipe import Recipe
from potstill.experiments.run_folder import SPLITS, RunFolder
from potstill.experiments.stage import split_loader
from potstill.experiments.verdict import verdict
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute

_LONG = ("per_class", "confusion")  # kept in metrics.json, left out of results.json

Probabilities = dict[str, Array]  # by split, each [N, K]


def evaluate_stages(
    run: RunFolder, models: dict[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, Any]:
    """Write predictions, metrics and summaries of every stage; return ``stages`` and ``comparison`` of
    results.json.

    The test split is read here and nowhere before, unless the recipe asks for test curves.  In float32, as ``predict``
    and ``evaluate`` compute, so that they give the same answers.
    """
    probabilities = {name: _predict(run, name, model, recipe, data, compute) for name, model in models.items()}
    delays = latency({name: (model.module, model.input) for name, model in models.items()}, batch=1)
    stages = {}
    for name, model in models.items():
        folder = run.stage(name)
        metrics = {
            split: _metrics(name, split, probabilities, np.asarray(getattr(data, split).labels), data.class_names)
            for split in SPLITS
        }
        write_json(folder / "metrics.json", metrics)
        write_text(folder / "summary.txt", summary_text(model.module, model.input, model.class_names))
        stages[name] = {
            "model": {
                "architecture": model.architecture,
                "parameters": parameters(model.module),
                "flops": flops(model.module, model.input),
                "file_bytes": (folder / "model.safetensors").stat().st_size,
                "size": model.input.size,
            },
            "training": model.facts.get("training"),
            "latency_ms": delays[name],
            **{split: {k: v for k, v in metrics[split].items() if k not in _LONG} for split in SPLITS},
        }
    if {"teacher", "baseline", "distilled"} <= stages.keys():
        correct = {name: probabilities[name]["test"].argmax(axis=1) == np.asarray(data.test.labels) for name in stages}
        return {"stages": stages, "comparison": compare(stages, correct)}
    return {"stages": stages, "comparison": None}


def describe_run(
    name: str, recipe: Recipe, data: DataSplits, evaluated: dict[str, Any], seconds: float, warnings: list[str]
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
        **evaluated,
        "warnings": warnings,
    }


def _predict(
    run: RunFolder, name: str, model: Classifier, recipe: Recipe, data: DataSplits, compute: Compute
) -> Probabilities:
    settings = recipe.stage_training("teacher" if name == "teacher" else "student")
    model.module.to(compute.device)
    found: Probabilities = {}
    for split in SPLITS:
        images = getattr(data, split)
        loader = split_loader(images, model.input, recipe, settings, compute)
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


def _metrics(
    name: str, split: str, probabilities: dict[str, Probabilities], labels: Array, classes: tuple[str, ...]
) -> dict[str, Any]:
    own = probabilities[name][split]
    metrics = final_metrics(own, labels, classes)
    metrics["loss"] = metrics["nll"]
    if name == "distilled" and "teacher" in probabilities:
        metrics |= agreement(own, probabilities["teacher"][split])
    return metrics


def compare(stages: dict[str, Any], correct: dict[str, Array]) -> dict[str, Any]:
    """``comparison`` of results.json: the distilled student against the baseline on the same test images.

    Args:
        stages: of results.json, with teacher, baseline and distilled.
        correct: stage -> [N] bool, whether each test image was classified correctly.
    """
    teacher, baseline, distilled = (stages[name]["test"] for name in ("teacher", "baseline", "distilled"))
    gain, low, high = paired_bootstrap(correct["baseline"], correct["distilled"])
    test = mcnemar(correct["baseline"], correct["distilled"])
    gap = teacher["top1"] - baseline["top1"]
    large, small = stages["teacher"], stages["distilled"]
    comparison = {
        "top1_gain": gain,
        "top1_gain_low": low,
        "top1_gain_high": high,
        "mcnemar_p": test["p"],
        "fixed": test["fixed"],
        "broken": test["broken"],
        "f1_macro_gain": distilled["f1_macro"] - baseline["f1_macro"],
        "auc_macro_gain": _difference(distilled["auc_macro"], baseline["auc_macro"]),
        "gap": gap,
        "gap_closed": gain / gap if gap > 0 else None,
        "parameter_ratio": large["model"]["parameters"] / small["model"]["parameters"],
        "file_ratio": large["model"]["file_bytes"] / small["model"]["file_bytes"],
        "latency_ratio": large["latency_ms"]["p50"] / small["latency_ms"]["p50"],
        "test_images": len(correct["baseline"]),
    }
    return comparison | {"verdict": verdict(comparison, stages)}


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
