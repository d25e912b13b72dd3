"""One stage: a network is trained, and its best epoch is written as a model."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potstill import __version__
from potstill.config.recipe import Recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.cross_fitting import FoldHeads
from potstill.errors import StorageError
from potstill.evaluation.cost import count_parameters
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
from potstill.experiment.estimate import estimate_cache
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.probe import ProbedTeacher
from potstill.experiment.teacher_cache import StageCaches, StageTeacher, open_caches
from potstill.experiment.teacher_inference import convert_teachers
from potstill.formatting import format_percent
from potstill.io import write_text
from potstill.methods.base import Method
from potstill.models.model_file import Classifier, save_model
from potstill.training.callbacks import Observer, SignalHandler
from potstill.training.checkpointing import finish_checkpoints
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.state import EpochRecord, History
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
    keeps: bool = True,
    extended_from: Sequence[int] = (),
    stopping: SignalHandler | None = None,
) -> History:
    """Train ``student`` in place by ``method`` on the images of ``train`` and save it to ``folder``.

    ``teacher_folders``: where the teachers' models stand; given where the student is to learn from records of their
    answers, which are kept on disk if ``keeps``.
    ``fold_heads``: of each teacher, for the images of ``train``.  ``probed``: what ``student`` starts from; it stays
    so where no epoch is better on val.  ``extended_from``: numbers of epochs with which it was done before.
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
    shown = partial(
        build_teacher_views,
        student.input,
        [teacher.input for teacher in teachers] if distiller.teacher is not None else (),
        memory_format=compute.memory_format,
    )
    from_train = partial(
        train_loader, planned, method.needs, recipe=recipe, data=data, compute=compute, observer=observer
    )
    views = {"train": shown(from_train)}
    if processes.first and (text := describe_layers(distiller)):
        write_text(folder / "layers.txt", text)
    taught: list[StageTeacher] = []
    if distiller.teacher is not None:
        for at, heads in enumerate(fold_heads):
            if heads is not None:
                distiller.teacher.use_fold_heads(at, heads.to(compute.device))
        taught = convert_teachers(
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
    cost = measure_teacher_cost(distiller, settings.batch_size, size, compute)
    if cost is not None:  # their own parameters, whatever was folded
        cost |= {"parameters": sum(count_parameters(teacher.module) for teacher in teachers)}
    torch.manual_seed(
        derive_seed(recipe.seed, f"{planned.seed}/dropout{f' {processes.rank}' if processes.rank else ''}")
    )
    if method.needs.prepare:
        # On resuming too: what the checkpoint holds is then loaded over it.
        passes = partial(split_loader, data, "train", recipe=recipe, settings=settings, compute=compute, shared=False)
        distiller.prepare(passes(spec=student.input).epoch, shown(passes))
    others = {split: split_loader(data, split, student.input, recipe, settings, compute) for split in ("val", "test")}
    if not settings.evaluate_test_every_epoch:
        del others["test"]
    for split in others:
        views[split] = shown(partial(split_loader, data, split, recipe=recipe, settings=settings, compute=compute))
    own_size = {split: each for split, each in views.items() if each is not None}
    stored = StageCaches()
    if teacher_folders is not None and distiller.teacher is not None:
        stored = open_caches(
            distiller,
            {"train": train, **others},
            taught,
            stage=planned.name,
            student=student.input,
            recipe=recipe,
            data=data,
            compute=compute,
            observer=observer,
            keeps=keeps,
            views=own_size,
        )
    if stored.kept and cost is not None:
        with contextlib.suppress(StorageError):  # of reading the store; training meets it again, and says so
            observer.note(
                str(
                    estimate_cache(
                        stored.by_split["train"],
                        train,
                        student,
                        teacher=cost["ms_per_step"] / 1000 / settings.batch_size,
                        batch=settings.batch_size,
                        epochs=settings.epochs,
                        compute=compute,
                    )
                )
            )
    try:
        history = Trainer(
            distiller,
            train,
            others["val"],
            settings,
            compute,
            folder=folder,
            observer=observer,
            classes=len(data.class_names),
            test=others.get("test"),
            teacher_outputs=stored.by_split,
            teacher_views=own_size,
            signals=stopping,
        ).run(resume=resume)
    finally:
        stored.close()
    processes.share_state(student.module)  # as it goes into the model file; its digest is part of a store's key
    take_deployed_network(student, distiller)
    best = history.records[history.best_epoch - 1]
    val = best["val"] if probed is None else _better_of_both(student, probed, best, settings, observer, planned.name)
    student.facts |= {
        "stage": planned.name,
        "seed": recipe.seed,
        "method": recipe.method if planned.distils else {"name": "supervised"},
        "training": training_facts(history, settings, extended_from),
        **({} if cost is None else {"teaching": {"by": list(planned.teachers), **cost, **stored.counts(processes)}}),
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


def _better_of_both(
    student: Classifier,
    probed: ProbedTeacher,
    best: EpochRecord,
    settings: TrainingSettings,
    observer: Observer,
    name: str,
) -> EpochRecord:
    """Put the probe back where the best epoch is not better on val; return the figures of what is taken."""
    metric, head = settings.selection_metric, student.facts["head"]
    keeps_probe = selection_value(metric, probed.val) >= selection_value(metric, best["val"])
    head |= {"kind": "finetune", "taken": "probe" if keeps_probe else "finetuned"}
    head["finetuned_val_top1"] = best["val"]["top1"]
    observer.note(
        f"{name}: val top-1 {format_percent(probed.val['top1'])} as a probe, {format_percent(best['val']['top1'])} "
        f"fine-tuned (epoch {best['epoch']}): {'the probe' if keeps_probe else 'the fine-tuned network'} is taken"
        + ("" if metric == "top1" else f", by {metric}")
    )
    if not keeps_probe:
        head.pop("fold_heads")  # they read the embeddings of the frozen encoder
        val: EpochRecord = best["val"]
        return val
    student.module.load_state_dict(probed.state)
    return probed.val


def training_facts(history: History, settings: TrainingSettings, extended_from: Sequence[int] = ()) -> dict[str, Any]:
    """What results.json says of a stage's training."""
    return {
        "epochs": len(history.records),
        "planned_epochs": settings.epochs,
        **({"extended_from": list(extended_from)} if extended_from else {}),
        "best_epoch": history.best_epoch,
        "seconds": round(history.seconds, 3),
        "images_per_second": history.images_per_second,
        "selection_metric": settings.selection_metric,
    }


def label_loss(recipe: Recipe, settings: TrainingSettings, data: DataSplits) -> nn.Module:
    """Cross-entropy with the recipe's label smoothing and class weights, over the images that have a label."""
    weight, labels = None, np.asarray(data.train.labels)
    known = labels[labels >= 0]
    if recipe.data.class_balance == "weights" and len(known):
        counts = np.bincount(known, minlength=len(data.class_names))
        weight = balanced_class_weights(torch.as_tensor(counts))
    if weight is None and len(known) == len(labels):
        return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    return LabelLoss(weight, settings.label_smoothing)
