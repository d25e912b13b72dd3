"""Final evaluation of a run: all stages on train, val and test, and the comparison, for results.json."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from potstill import __version__
from potstill.config import repeat_index, stage_role
from potstill.config.recipe import Recipe
from potstill.data.decoded_cache import JPEG_RECORDS
from potstill.data.image_sets import Subset, image_sizes
from potstill.data.preprocessing import crop_notes
from potstill.data.samplers import EpochSampler
from potstill.data.splits import DataSplits
from potstill.distillation.teacher_inference import InferenceSettings
from potstill.evaluation import Array
from potstill.evaluation.cascade import Cascade, CascadeCalibration, cascade_figures
from potstill.evaluation.cost import count_flops, known_parameters, measure_latency, measure_memory, model_summary
from potstill.evaluation.fidelity import MAX_READ_OUT_IMAGES, agreement, cosine_agreement
from potstill.evaluation.final_metrics import calibration_report, split_intervals, split_metrics
from potstill.evaluation.predictions import MAX_VALUES_IN_MEMORY, Predictions, evaluation_mode, predict_split
from potstill.evaluation.significance import mean_interval, paired_interval, wilson_interval
from potstill.experiment.builders import build_network, split_loader
from potstill.experiment.comparison import compare_with_baseline, count_flips
from potstill.experiment.domain_adaptation import describe_domains, evaluate_adapted_baselines, evaluate_on_source
from potstill.experiment.ensembles import SplitPredictions, ensemble_predictions, group_members, predict_images
from potstill.experiment.examples import describe_examples
from potstill.experiment.plan import derive_seed
from potstill.experiment.probe import embed_images
from potstill.experiment.run_folder import SPLITS, RunFolder
from potstill.experiment.teacher_cache import open_prediction_cache
from potstill.features.stages import find_stages
from potstill.io import write_text
from potstill.models.families.opaque_models import FunctionNetwork, example_answers, find_opaque, find_table
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute

_PER_CLASS_KEYS = ("per_class",)  # kept in metrics.json, left out of results.json


def evaluate_stages(
    run: RunFolder,
    models: dict[str, Classifier],
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write predictions, metrics and summaries of every stage, and examples.json; return ``stages`` to
    ``cascade`` of results.json.

    With a target, all of these are on its images.  The test split is not read before, unless the recipe requests test
    metrics of every epoch.  The networks run in float32, as in ``predict``.  Call in all processes; the first one
    writes.
    """
    source, data = data, data.measured
    before = evaluate_on_source(models, recipe, source, compute)
    adapted = evaluate_adapted_baselines(models, recipe, source, compute)
    found = {name: _predict(run, name, model, recipe, data, compute, observer) for name, model in models.items()}
    if not compute.processes.first:
        return {}
    once = {name: model for name, model in models.items() if not repeat_index(name)}
    costs = _costs(once)
    groups = ensemble_predictions({name: found[name] for name in once}, recipe.teachers)
    entries = {}
    for name, model in models.items():
        own = found[name]
        learns = stage_role(name) not in ("teacher", "previous", "baseline")
        metrics = {
            split: describe_metrics(own[split], data.class_names)
            | (describe_fidelity(own[split], groups["teachers"].get(split)) if learns and "teachers" in groups else {})
            for split in SPLITS
        }
        run.write_metrics(name, metrics)
        entries[name] = {
            **_describe_stage(run, name, model, recipe),
            **costs.get(name, {}),
            **{split: without_per_class(metrics[split]) for split in SPLITS},
            **({"source_test": without_per_class(before[name])} if name in before else {}),
            "test_intervals": split_intervals(own["test"]),
            "calibration": None if data.teacher_labels else _calibration(own["val"], own["test"], model),
        }
    stages = {name: entries.pop(name) for name in once}
    correct = {name: own["test"].correct for name, own in (found | groups).items()}
    described = describe_groups(groups, once, data.class_names)
    both = {"baseline", "distilled"} <= stages.keys()
    domain = describe_domains(recipe, source, models, before, adapted)
    comparison = (
        compare_with_baseline(stages, correct, described, entries, recipe.seed, domain, known) if both else None
    )
    examples = describe_examples({name: found[name]["test"] for name in once}, data.test, data.class_names)
    if examples is not None:
        run.write_examples(examples)
    return {
        "stages": stages,
        "repeats": entries,
        "together": described,
        "comparison": comparison,
        **(
            {"without_labels": describe_agreement(stages, found, groups.get("teachers", {}).get("test"), data)}
            if data.teacher_labels
            else {}
        ),
        **({"flips": count_flips(correct)} if "previous" in correct else {}),
        "cascade": _calibrate_cascade(run, once, found, groups.get("teachers", {}), recipe),
        **(known or {}),
    }


def evaluate_embeddings(
    run: RunFolder,
    models: dict[str, Classifier],
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Do as ``evaluate_stages`` for teachers without classes: compare embeddings by ``cosine``."""
    parts = data
    if len(data.train) > MAX_READ_OUT_IMAGES:
        chosen = np.linspace(0, len(data.train) - 1, MAX_READ_OUT_IMAGES).round()
        parts = replace(data, train=Subset(data.train, chosen), fingerprint=f"{data.fingerprint}/read-out")
    teachers = {name: model for name, model in models.items() if stage_role(name) == "teacher"}
    students = {name: model for name, model in models.items() if name not in teachers}
    theirs = {name: _embeddings(name, model, recipe, parts, compute) for name, model in teachers.items()}
    cosines: dict[str, dict[str, tuple[Array, Array]]] = {}
    for name, model in students.items():
        own = recipe.model_copy(update={"seed": recipe.seed + repeat_index(name)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(own.seed, "student" if stage_role(name) == "distilled" else name))
            start = build_network(own, own.network(name), data.class_names, data.range)
        first = Classifier(start.module, start.architecture, data.class_names, start.input)
        after, before = (_embeddings(name, each, recipe, parts, compute) for each in (model, first))
        if compute.processes.first:
            cosines[name] = {
                teacher: tuple(  # type: ignore[misc]
                    cosine_agreement((each["train"], found["train"]), (each["test"], found["test"]))
                    for each in (after, before)
                )
                for teacher, found in theirs.items()
            }
    if not compute.processes.first:
        return {}
    once = {name: model for name, model in students.items() if not repeat_index(name)}
    costs, entries = _costs(once), dict[str, Any]()
    for name, model in students.items():
        test = {
            "count": len(data.test),
            "cosine": {key: _describe_cosines(*each) for key, each in cosines[name].items()},
        }
        entries[name] = _describe_stage(run, name, model, recipe) | costs.get(name, {}) | {"test": test}
    stages = {name: entries.pop(name) for name in once}
    return {
        "stages": stages,
        "repeats": entries,
        "together": {},
        "comparison": None,
        "without_labels": _describe_embeddings(run, stages, entries, data),
        "cascade": None,
        **(known or {}),
    }


def _describe_stage(run: RunFolder, name: str, model: Classifier, recipe: Recipe) -> dict[str, Any]:
    folder = run.stage(name)
    is_function = isinstance(find_opaque(model.module), FunctionNetwork)  # which has no weights in the file
    parameters = known_parameters(model.module)
    flops = None if parameters is None else count_flops(model.module, model.input)
    write_text(folder / "summary.txt", model_summary(model.module, model.input, model.class_names, flops=flops))
    return {
        **({"seed": recipe.seed + repeat_index(name)} if repeat_index(name) else {}),
        "model": {
            "architecture": model.architecture,
            **({} if model.remodelled is None else {"remodelled": model.remodelled["name"]}),
            "parameters": parameters,
            "flops": flops,
            "file_bytes": None if is_function else (folder / "model.safetensors").stat().st_size,
            "size": model.input.size,
        },
        "training": model.facts.get("training"),
        **{key: model.facts[key] for key in ("head", "reused_from", "views", "teaching") if key in model.facts},
    }


def _embeddings(name: str, model: Classifier, recipe: Recipe, data: DataSplits, compute: Compute) -> dict[str, Array]:
    """Return the embeddings [N, D] of train and test by a network, float32; nothing in all processes but the first."""
    module, size = model.module.to(compute.device).to(memory_format=compute.memory_format), model.input.size
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(compute.device)
    with evaluation_mode(module), example_answers([module]):
        layer = find_stages(module, example).head
    assert layer is not None  # networks without a linear head were refused
    settings, inference = recipe.stage_training(name), InferenceSettings(memory_format=compute.memory_format)
    found = dict[str, Array]()
    for split in ("train", "test"):
        loader = split_loader(data, split, model.input, recipe, settings, compute, network=module)
        label = f"{name}: embeddings of {split}"
        embeddings = embed_images(module, inference, layer, loader, label, SilentObserver(), compute)
        if embeddings is not None:
            found[split] = embeddings.numpy()
    return found


def _describe_cosines(after: Array, before: Array) -> dict[str, Any]:
    """Return the mean cosine with its interval, that before the training, and the difference."""
    return {
        **mean_interval(after)._asdict(),
        "before": float(before.mean()),
        "difference": mean_interval(after - before)._asdict(),
    }


def _describe_embeddings(
    run: RunFolder, stages: Mapping[str, Any], repeats: Mapping[str, Any], data: DataSplits
) -> dict[str, Any]:
    """Return ``without_labels`` of results.json: what is known of a student of teachers without classes."""
    sentences = list[str]()
    for teacher, each in stages["distilled"]["test"]["cosine"].items():
        value, low, high = (each["difference"][key] for key in ("value", "low", "high"))
        sentences.append(
            f"Cosine agreement with the {teacher} on {len(data.test):,} held-out images: {each['value']:.3f} (95 % "
            f"interval {each['low']:.3f} to {each['high']:.3f}), {each['before']:.3f} before the training; difference "
            f"{value:+.3f} ({low:+.3f} to {high:+.3f})."
        )
        further = [entry["test"]["cosine"][teacher]["value"] for name, entry in repeats.items()]
        if further:
            sentences.append(f"With further seeds: {', '.join(f'{each:.3f}' for each in further)}.")
    sentences += [
        "It is the mean cosine of the teacher's embedding and a linear map of the student's, fitted on training "
        "images; both without the teacher's mean embedding. 1: the student's embedding determines the teacher's "
        "linearly; 0: not at all.",
        "Accuracy is unknown: neither the images nor the teacher have classes, so the student predicts none. Whether "
        "its embedding serves a task is seen once a head is fitted on labeled images: `potstill run RECIPE --data "
        f"LABELED --student runs/{run.path.name}`; the same command without --student shows what this training gained.",
        "There is no baseline, since it learns from labels.",
    ]
    return {"test_labeled": False, "classes": False, "sentences": sentences}


def _calibrate_cascade(
    run: RunFolder,
    models: Mapping[str, Classifier],
    found: Mapping[str, SplitPredictions],
    teachers: SplitPredictions,
    recipe: Recipe,
) -> dict[str, Any] | None:
    """Write cascade.json of the deployed student; return its figures on test; None without a teacher for new images."""
    student = next((name for name in ("distilled", "baseline") if name in models), None)
    names = group_members("teachers", models)
    if student is None or not {"val", "test"} <= teachers.keys() or any(find_table(models[n].module) for n in names):
        return None
    val, test = found[student]["val"], found[student]["test"]
    facts = models[student].facts
    # Each epoch, with each way to average its heads, and a probe in place of all of them, were candidates on val.
    candidates = int((facts.get("training") or {}).get("epochs") or 1) * int(facts.get("head_candidates") or 1)
    candidates += (facts.get("head") or {}).get("kind") == "finetune"
    calibration = CascadeCalibration.fit(val.confidence, val.correct, teachers["val"].correct, candidates)
    settings = recipe.teachers
    weights = None if settings.weights is None else tuple(settings.weights)
    Cascade(student, tuple(names), settings.combine, weights, calibration).write(run.path)
    figures = cascade_figures(calibration, test.confidence, test.correct, teachers["test"].correct)
    return {"student": student, "teachers": names, **figures}


def describe_run(
    name: str,
    recipe: Recipe,
    data: DataSplits,
    planned: list[str],
    evaluated: dict[str, Any],
    seconds: float,
    warnings: list[str],
) -> dict[str, Any]:
    """Return the content of results.json, schema 1."""
    source, data = data, data.measured
    before = {"source": source.source, "origin": source.origin, "counts": source.counts()}
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
            "class_names": list(data.class_names) if data.has_classes else [],
            "counts": data.counts(),
            **({"teacher_labels": list(data.teacher_labels)} if data.teacher_labels else {}),
            "size": recipe.data.size,
            "resize_mode": recipe.data.resize_mode,
            **({"training_images": JPEG_RECORDS} if recipe.data.cache == "jpeg" else {}),
            "unseen": crop_notes(*image_sizes(data.train), recipe.data.resize_mode),
            "skipped": len(source.all_skipped),
            **({} if data.unlabeled is None or source is not data else {"unlabeled": describe_unlabeled(recipe, data)}),
            **({} if source is data else {"source_domain": before}),
        },
        "method": recipe.method,
        "planned": planned,
        **evaluated,
        "warnings": warnings,
    }


def describe_missing_labels(data: DataSplits) -> str:
    """Return what the metrics of data without labels mean, for warnings."""
    if not data.has_classes:
        return (
            "accuracy is unknown, as neither the images nor the teacher have classes: the student learns embeddings, "
            "and predicts nothing until a head is fitted on labeled images (--student RUN)"
        )
    splits = " and ".join(data.teacher_labels) if len(data.teacher_labels) < 3 else "train, val and test"
    known = "" if "test" in data.teacher_labels else "; test has labels of its own"
    unknown = "accuracy is unknown, as the images have no labels" if not known else "the training images have no labels"
    return (
        f"{unknown}: on {splits}, the labels in every table and picture are the classes that the teacher predicts, so "
        f"that top-1 is the agreement with the teacher, and the teacher's own is 100 %{known}"
    )


def describe_agreement(
    stages: Mapping[str, Any],
    predictions: Mapping[str, SplitPredictions],
    teacher: Predictions | None,
    data: DataSplits,
) -> dict[str, Any]:
    """Return ``without_labels`` of results.json: what is known of the student where there is no baseline."""
    labeled, sentences = "test" not in data.teacher_labels, list[str]()
    found: dict[str, Any] = {"test_labeled": labeled}
    if "distilled" in stages and teacher is not None:
        own, test = predictions["distilled"]["test"], stages["distilled"]["test"]
        same = wilson_interval(int((own.predicted == teacher.predicted).sum()), len(own.labels))
        found["agreement"] = list(same)
        divergence = test.get("kl_to_teacher")
        sentences.append(
            f"On {len(own.labels):,} {'labeled test' if labeled else 'held-out'} images the student predicts the "
            f"teacher's class for {same.value:.1%} (95 % interval {same.low:.1%} to {same.high:.1%})"
            + ("" if divergence is None else f"; mean KL divergence from the teacher {divergence:.3f}")
            + "."
        )
        further = [
            float((each["test"].predicted == teacher.predicted).mean())
            for name, each in predictions.items()
            if stage_role(name) == "distilled" and repeat_index(name)
        ]
        if further:
            found["agreement_of_further_seeds"] = further
            sentences.append(f"With further seeds: {', '.join(f'{each:.1%}' for each in further)}.")
        if labeled:
            difference = paired_interval(teacher.correct, own.correct)
            accuracies = {
                name: wilson_interval(int(each.correct.sum()), len(each.labels))
                for name, each in (("teacher", teacher), ("student", own))
            }
            found |= {"accuracy": {name: list(each) for name, each in accuracies.items()}}
            found["difference"] = list(difference)
            listed = ", ".join(
                f"{name} {each.value:.1%} ({each.low:.1%} to {each.high:.1%})" for name, each in accuracies.items()
            )
            sentences.append(
                f"Top-1 on their labels: {listed}; student - teacher {100 * difference.value:+.1f} points "
                f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f})."
            )
    if not labeled:
        sentences.append(
            "Accuracy is unknown: the images have no labels. A small folder of labeled test images gives it: "
            "--labeled-test DIR, or `potstill evaluate RUN --data DIR`."
        )
    sentences.append("There is no baseline, since it learns from labels.")
    return found | {"sentences": sentences}


def describe_unlabeled(recipe: Recipe, data: DataSplits) -> dict[str, Any]:
    """Return number and use of the unlabeled images, for results.json: ``sentence`` describes them."""
    assert data.unlabeled is not None
    settings, share = recipe.stage_training("distilled"), recipe.data.unlabeled_share
    sampler = EpochSampler(
        np.asarray(data.train.labels), settings.batch_size, "shuffled", 0, len(data.unlabeled), share
    )
    labeled, images = min(settings.batch_size, sampler.labeled), len(data.unlabeled)
    facts = {
        "source": recipe.data.unlabeled or data.source,
        "images": images,
        "labeled_images": len(data.train),
        "per_step": int(labeled * share / (1 - share) + 0.5),
        "labeled_per_step": labeled,
        "steps": sampler.steps * settings.epochs,
        "passes": round((sampler.count - sampler.labeled) * settings.epochs / images, 3),
    }
    facts["sentence"] = (
        f"{images:,} unlabeled images beside {len(data.train):,} labeled ones: a step of the distilled student has "
        f"{facts['per_step']:,} and {labeled:,} of them, and it sees each unlabeled image {facts['passes']:.3g} "
        f"time{'s' * (facts['passes'] != 1)}. "
        f"Teacher and baseline learn from the labels alone; the baseline has as many steps ({facts['steps']:,}), the "
        "same views and the same mixing"
    )
    return facts


def _costs(models: dict[str, Classifier]) -> dict[str, dict[str, Any]]:
    networks = {name: (model.module, model.input) for name, model in models.items() if not find_table(model.module)}
    latency = measure_latency(networks, batch=1)
    return {
        name: {
            "latency_ms": latency.get(name),
            "memory": None if find_opaque(model.module) else measure_memory(model.module, model.input),
        }
        for name, model in models.items()
    }


def _predict(
    run: RunFolder,
    name: str,
    model: Classifier,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer,
) -> SplitPredictions:
    """Predict all splits and write the predictions, in the first process; of a large train only if requested."""
    settings = recipe.stage_training(name)
    model.module.to(compute.device).to(memory_format=compute.memory_format)  # as in predict_images
    found: SplitPredictions = {}
    for split in SPLITS:
        images, classes = getattr(data, split), len(model.class_names)
        large = len(images) * classes > MAX_VALUES_IN_MEMORY
        kept = split != "train" or recipe.train_predictions or not large
        path = run.stage(name) / f"log_probabilities_{split}.npy"
        loader = split_loader(data, split, model.input, recipe, settings, compute, network=model.module)
        what = f"the {name} on {split}"
        predictions: Predictions | None = None
        if large:
            predictions = predict_split(
                model.module,
                loader,
                classes=classes,
                device=compute.device,
                processes=compute.processes,
                what=what,
                file=path if kept else None,
                progress=partial(observer.wait, f"predictions of {what}"),
            )
        else:
            cache = open_prediction_cache(
                model, loader, split, stage=name, recipe=recipe, data=data, folder=run.stage(name), compute=compute,
                warn=observer.warn,
            )  # fmt: skip
            if (rows := predict_images(model, loader, compute, what, cache, observer)) is not None:
                predictions = Predictions.of(rows, loader.labels.numpy())
        if predictions is not None:
            found[split] = predictions
            run.write_confusion(name, split, predictions, model.class_names)
            if kept:
                run.write_predictions(name, split, images.names, predictions, model.class_names)
            if kept and large:
                run.add_file(f"{name}/{path.name}")
    return found


def describe_metrics(found: Predictions, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the metrics of a split, for metrics.json."""
    metrics = split_metrics(found, classes)
    return metrics | {"loss": metrics["nll"]}


def describe_groups(
    groups: Mapping[str, SplitPredictions], stages: Collection[str], classes: tuple[str, ...]
) -> dict[str, Any]:
    """Return ``together`` of results.json: the members and metrics of each group of several networks."""
    members = {name: group_members(name, stages) for name in groups}
    return {
        name: {"of": members[name]}
        | {split: without_per_class(describe_metrics(found, classes)) for split, found in own.items()}
        for name, own in groups.items()
        if len(members[name]) > 1
    }


def describe_fidelity(student: Predictions, teacher: Predictions | None) -> dict[str, Any]:
    """Return agreement with the teacher and, if the probabilities of both are known, the divergence."""
    if teacher is None:
        return {"agreement": None, "kl_to_teacher": None}
    if student.probabilities is None or teacher.probabilities is None:
        return {"agreement": float((student.predicted == teacher.predicted).mean()), "kl_to_teacher": None}
    return agreement(student.probabilities, teacher.probabilities)


def _calibration(val: Predictions, test: Predictions, model: Classifier) -> dict[str, Any] | None:
    assert val.probabilities is not None
    assert test.probabilities is not None
    applied = (model.facts.get("temperature_scaling") or {}).get("temperature")
    return calibration_report(val.probabilities, val.labels, test.probabilities, test.labels, applied)


def without_per_class(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics for results.json."""
    return {key: value for key, value in metrics.items() if key not in _PER_CLASS_KEYS}
