"""One stage: train a network, and save the weights of its best epoch, calibrated by one temperature."""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill import __version__
from potstill.config.recipe import Recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.teachers import FoldHeads
from potstill.errors import StorageError
from potstill.evaluation.cost import known_parameters
from potstill.evaluation.final_metrics import fit_temperature, temperature_pays
from potstill.evaluation.metrics import StreamingMetrics
from potstill.evaluation.predictions import evaluation_mode
from potstill.experiment.builders import (
    build_distiller,
    build_teacher_views,
    describe_layers,
    describe_training_views,
    measure_teacher_cost,
    split_loader,
    take_deployed_network,
    train_loader,
)
from potstill.experiment.estimate import describe_cache
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.probe import ProbedTeacher
from potstill.experiment.teacher_cache import StageCaches, StageTeacher, open_caches
from potstill.experiment.teacher_inference import convert_teachers
from potstill.features.hooks import capture_outputs
from potstill.features.stages import find_stages
from potstill.features.student_surgery import DualHead
from potstill.formatting import format_percent
from potstill.io import write_text
from potstill.methods.base import Method
from potstill.models.families.opaque_models import find_table
from potstill.models.model_file import Classifier, save_model
from potstill.training.callbacks import Observer, SignalHandler
from potstill.training.checkpointing import EpochRecord, History, finish_checkpoints
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import LabelLoss, Trainer, balanced_class_weights, selection_value


def train_stage(
    planned: PlannedStage,
    student: Classifier,
    method: Method,
    teachers: Sequence[Classifier],
    train: Loader,
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    folder: Path,
    observer: Observer,
    resume: bool,
    teacher_folders: Sequence[Path] | None = None,
    fold_heads: Sequence[FoldHeads | None] = (),
    probed: ProbedTeacher | None = None,
    use_cache: bool = True,
    extended_from: Sequence[int] = (),
    stopping: SignalHandler | None = None,
) -> History:
    """Train ``student`` in place by ``method`` on the images of ``train`` and save it to ``folder``.

    ``teacher_folders``: model folders of the teachers, if the student learns from rounded outputs, as in a cache;
    ``use_cache``: keep these on disk.  ``fold_heads``: cross-fitted heads of each teacher, for the images of ``train``.
    ``probed``: the linear probe that ``student`` starts from; it stays if no epoch is better on val.
    ``extended_from``: numbers of epochs after which the stage was finished before.
    """
    settings = recipe.stage_training(planned.name)
    size = student.input.size
    distiller = build_distiller(
        planned,
        student,
        method,
        teachers,
        recipe=recipe,
        data=data,
        compute=compute,
        example=torch.zeros(2, 3, size, size, device=compute.device),
        label_loss=label_loss(recipe, settings, data),
    )
    processes = compute.processes
    teacher_views = partial(
        build_teacher_views,
        student.input,
        teachers if distiller.teacher is not None else (),
        memory_format=compute.memory_format,
    )
    train_views = partial(
        train_loader, planned, method.needs, recipe=recipe, data=data, compute=compute, observer=observer
    )
    views = {"train": teacher_views(train_views)}
    if epochs_in_use := method.adapted_epochs(settings.epochs):
        values = ", ".join(f"{key} {value:.3g}" for key, value in epochs_in_use.items())
        observer.note(f"{planned.name}: {values}, as a share of the training's {settings.epochs} epochs")
    if processes.first and (text := describe_layers(distiller)):
        write_text(folder / "layers.txt", text)
    converted: list[StageTeacher] = []
    if distiller.teacher is not None:
        for at, heads in enumerate(fold_heads):
            if heads is not None:
                distiller.teacher.use_fold_heads(at, heads.to(compute.device))
        converted = convert_teachers(
            distiller,
            teachers,
            teacher_folders or [None] * len(teachers),
            planned.teachers,
            train,
            recipe=recipe,
            data=data,
            compute=compute,
            observer=observer,
            views=views["train"],
        )
    if settings.compile_teacher and distiller.teacher is not None:
        count = max(1, settings.batch_size // processes.count)
        images = torch.zeros(count, 3, size, size, device=compute.device)
        with compute.autocast():
            notes = distiller.teacher.compile(images)
        for name, note in zip(planned.teachers, notes, strict=True):
            observer.note(f"{name}: {note}")
    cost = measure_teacher_cost(distiller, max(1, settings.batch_size // processes.count), size, compute)
    if cost is not None:  # the parameters before BatchNorm was folded
        cost |= {"parameters": known_parameters(*(teacher.module for teacher in teachers))}
    torch.manual_seed(
        derive_seed(recipe.seed, f"{planned.seed}/dropout{f' {processes.rank}' if processes.rank else ''}")
    )
    if method.needs.prepare:
        # Also when resuming: the checkpoint's state is loaded afterwards.
        passes = partial(split_loader, data, "train", recipe=recipe, settings=settings, compute=compute, shared=False)
        distiller.prepare(passes(spec=student.input).epoch, teacher_views(passes))
    others = {split: split_loader(data, split, student.input, recipe, settings, compute) for split in ("val", "test")}
    if not settings.evaluate_test_every_epoch:
        del others["test"]
    for split in others:
        split_views = partial(split_loader, data, split, recipe=recipe, settings=settings, compute=compute)
        views[split] = teacher_views(split_views)
    used_views = {split: each for split, each in views.items() if each is not None}
    caches = StageCaches()
    if teacher_folders is not None and distiller.teacher is not None:
        caches = open_caches(
            distiller,
            {"train": train, **others},
            converted,
            stage=planned.name,
            student=student.input,
            recipe=recipe,
            data=data,
            compute=compute,
            observer=observer,
            use_cache=use_cache and not all(find_table(each.module) for each in teachers),  # which are on disk already
            views=used_views,
        )
    if caches.kept and cost is not None:
        with contextlib.suppress(StorageError):  # training raises it again
            observer.note(describe_cache(caches.by_split["train"], train, settings.epochs))
    try:
        history = Trainer(
            distiller,
            train,
            others["val"],
            settings,
            compute.for_training(student.module),  # of the student alone: the layout of teachers is in the cache's key
            folder=folder,
            observer=observer,
            classes=len(data.class_names),
            test=others.get("test"),
            teacher_outputs=caches.by_split,
            teacher_views=used_views,
            signals=stopping,
        ).run(resume=resume)
    finally:
        caches.close()
    processes.share_state(student.module)  # the model file, whose digest is part of the cache key, holds this state
    take_deployed_network(student, distiller)
    labeled_val = partial(split_loader, data, "val", student.input, recipe, settings, compute, shared=False)
    val = history.records[history.best_epoch - 1]["val"]
    if isinstance(student.module, DualHead):
        val = val | _select_heads(student.module, student.facts, labeled_val(), observer, planned.name)
    if probed is not None:
        val = _select_probe_or_finetuned(student, probed, val, history.best_epoch, settings, observer, planned.name)
    scaled: dict[str, Any] = {}
    if settings.temperature_scaling and planned.role in ("baseline", "distilled") and not data.teacher_labels:
        scaled, metrics = scale_logits(student, labeled_val(), compute, observer, planned.name)
        val = val | metrics
    student.facts |= {
        "stage": planned.name,
        "seed": recipe.seed,
        "method": recipe.method if planned.distils else {"name": "supervised"},
        "training": training_facts(history, settings, extended_from)
        | ({"method_epochs": epochs_in_use} if epochs_in_use else {}),
        **({"temperature_scaling": scaled} if scaled else {}),
        **({} if cost is None else {"teaching": {"by": list(planned.teachers), **cost, **caches.counts(processes)}}),
        "views": describe_training_views(train, recipe, data, settings.epochs),
        "val": val,
        "lines": history.lines,  # of metrics.jsonl
        "data": {"source": data.source, "fingerprint": data.fingerprint},
        "potstill": __version__,
    }
    if processes.first:
        save_model(student, folder)
        finish_checkpoints(folder, history, keep=settings.keep_checkpoint)
    return history


@torch.no_grad()
def _select_heads(network: DualHead, facts: dict[str, Any], val: Loader, observer: Observer, name: str) -> EpochRecord:
    """Choose how two heads are averaged; return the val metrics; ``facts`` receives the number of ways tried."""
    if max(map(len, network.candidates)) == 1:
        return {}
    facts["head_candidates"] = math.prod(map(len, network.candidates))
    parts = []
    with evaluation_mode(network), capture_outputs(network, network.taps) as heads:
        for batch in val.epoch():
            network(batch.images)
            parts.append((*(heads[path].float() for path in network.taps), batch.labels))
    first, second, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    metrics = StreamingMetrics(first.shape[1], device=first.device)
    metrics.update(network.select(first, second, labels), labels)
    found = metrics.compute()
    observer.note(
        f"{name}: the label head counts {network.heads.alpha:g} in the prediction, and the teacher's head has the "
        f"temperature {network.heads.beta:g}, chosen on val (top-1 {format_percent(found['top1'])})"
    )
    return found


def _select_probe_or_finetuned(
    student: Classifier,
    probed: ProbedTeacher,
    val: EpochRecord,
    epoch: int,
    settings: TrainingSettings,
    observer: Observer,
    name: str,
) -> EpochRecord:
    """Restore the probe if the best epoch, whose val metrics these are, is not better; return those of the better."""
    metric, head = settings.selection_metric, student.facts["head"]
    keep_probe = selection_value(metric, probed.val) >= selection_value(metric, val)
    keep_probe = keep_probe and student.remodelled is None  # a method that rebuilt the student has other layers
    head |= {"kind": "finetune", "taken": "probe" if keep_probe else "finetuned"}
    head["finetuned_val_top1"] = val["top1"]
    observer.note(
        f"{name}: val top-1 {format_percent(probed.val['top1'])} as a probe, {format_percent(val['top1'])} "
        f"fine-tuned (epoch {epoch}): {'the probe' if keep_probe else 'the fine-tuned network'} is used"
        + ("" if metric == "top1" else f", by {metric}")
    )
    if not keep_probe:
        head.pop("fold_heads")  # they read the embeddings of the frozen encoder
        return val
    student.module.load_state_dict(probed.state)
    return probed.val


def training_facts(history: History, settings: TrainingSettings, extended_from: Sequence[int] = ()) -> dict[str, Any]:
    """Return the entry ``training`` of a stage in results.json."""
    return {
        "epochs": len(history.records),
        "planned_epochs": settings.epochs,
        **({"extended_from": list(extended_from)} if extended_from else {}),
        "best_epoch": history.best_epoch,
        "seconds": round(history.seconds, 3),
        "images_per_second": history.images_per_second,
        "selection_metric": settings.selection_metric if history.records[-1]["val"]["count"] else "loss",
        **({"term_factors": factors} if (factors := history.records[history.best_epoch - 1].get("scaling")) else {}),
    }


def label_loss(recipe: Recipe, settings: TrainingSettings, data: DataSplits) -> nn.Module:
    """Return cross-entropy with the recipe's label smoothing and class weights; unlabeled images are ignored."""
    weight, labels = None, np.asarray(data.train.labels)
    labeled = labels[labels >= 0]
    if recipe.data.class_balance == "weights" and len(labeled):
        counts = np.bincount(labeled, minlength=len(data.class_names))
        weight = balanced_class_weights(torch.as_tensor(counts))
    mixes_unlabeled = data.unlabeled is not None and (recipe.data.augment or data.augment).mixes
    if weight is None and len(labeled) == len(labels) and not mixes_unlabeled:
        return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    return LabelLoss(weight, settings.label_smoothing)


@torch.no_grad()
def scale_logits(
    student: Classifier, val: Loader, compute: Compute, observer: Observer, name: str
) -> tuple[dict[str, Any], EpochRecord]:
    """Divide the student's last layer by the temperature fitted on val, if that lowers the NLL there beyond doubt.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.  In the weights, it holds for every use of the
    model. Return ``temperature``, ``images``, ``before`` and ``after``, and all val metrics; both empty if nothing was
    changed.
    """
    network, size = student.module, student.input.size
    logits, labels = _logits_of(network, val)
    if not len(labels):
        return {}, {}
    temperature = fit_temperature(logits.double().softmax(dim=1).numpy(), labels.numpy())
    nll, scaled_nll = (F.cross_entropy(each, labels).item() for each in (logits, logits / temperature))
    pays = temperature_pays(nll - scaled_nll, len(labels), temperature)
    temperature, pays = compute.processes.share((temperature, pays))
    if not pays:
        return {}, {}
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(compute.device)
    with evaluation_mode(network):
        path = find_stages(network, example).head
    if path is None:
        observer.note(f"{name}: not divided by the temperature {temperature:.3g}: no linear layer puts out the logits")
        return {}, {}
    head = network.get_submodule(path)
    saved = {key: each.detach().clone() for key, each in head.named_parameters()}
    for parameter in head.parameters():
        parameter.div_(temperature)
    scaled, _ = _logits_of(network, val)
    # Otherwise: parameters that serve in another place too, or two classes that are equal up to rounding.
    alike = torch.allclose(scaled * temperature, logits, rtol=1e-3, atol=1e-3)
    if not (alike and torch.equal(scaled.argmax(dim=1), logits.argmax(dim=1))):
        for key, parameter in head.named_parameters():
            parameter.copy_(saved[key])
        return {}, {}
    before, after = (_metrics_of(each, labels) for each in (logits, scaled))
    observer.note(
        f"{name}: logits divided by the temperature {temperature:.3g}, fitted on val: NLL {before['nll']:.3f} before, "
        f"{after['nll']:.3f} after; ECE {format_percent(before['ece'])} before, {format_percent(after['ece'])} after"
    )
    kept = [{metric: each[metric] for metric in ("nll", "ece")} for each in (before, after)]
    return {"temperature": temperature, "images": len(labels), "before": kept[0], "after": kept[1]}, after


def _metrics_of(logits: Tensor, labels: Tensor) -> EpochRecord:
    metrics = StreamingMetrics(logits.shape[1])
    metrics.update(logits, labels)
    return metrics.compute()


def _logits_of(network: nn.Module, val: Loader) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the labelled images, on the CPU."""
    with evaluation_mode(network):
        parts = [(network(batch.images).float().cpu(), batch.labels.cpu()) for batch in val.epoch()]
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits[labels >= 0], labels[labels >= 0]
