"""One stage: a network is trained, and its best epoch is written as a model."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potstill import __version__
from potstill.config.recipe import Recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.errors import StorageError
from potstill.evaluation.cost import count_parameters
from potstill.experiment.builders import (
    build_distiller,
    describe_layers,
    describe_training_views,
    measure_teacher_cost,
    split_loader,
    take_deployed_network,
)
from potstill.experiment.estimate import estimate_cache
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.teacher_cache import StageCaches, StageTeacher, open_caches
from potstill.experiment.teacher_inference import convert_teachers
from potstill.io import write_text
from potstill.methods.base import Method
from potstill.models.model_file import Classifier, save_model
from potstill.training.callbacks import Observer, SignalHandler
from potstill.training.checkpointing import finish_checkpoints
from potstill.training.devices import Compute
from potstill.training.settings import TrainingSettings
from potstill.training.state import History
from potstill.training.trainer import LabelLoss, Trainer, balanced_class_weights


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
    keeps: bool = True,
    extended_from: Sequence[int] = (),
    stopping: SignalHandler | None = None,
) -> History:
    """Train ``student`` in place by ``method`` on the images of ``train`` and save it to ``folder``.

    ``teacher_folders``: where the teachers' models stand; given where the student is to learn from records of their
    answers, which are kept on disk if ``keeps``.  ``extended_from``: numbers of epochs with which it was done before.
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
    if processes.first and (text := describe_layers(distiller)):
        write_text(folder / "layers.txt", text)
    taught: list[StageTeacher] = []
    if distiller.teacher is not None:
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
        )
    cost = measure_teacher_cost(distiller, settings.batch_size, size, compute)
    if cost is not None:  # their own parameters, whatever was folded
        cost |= {"parameters": sum(count_parameters(teacher.module) for teacher in teachers)}
    torch.manual_seed(
        derive_seed(recipe.seed, f"{planned.seed}/dropout{f' {processes.rank}' if processes.rank else ''}")
    )
    if method.needs.prepare:
        # On resuming too: what the checkpoint holds is then loaded over it.
        every = split_loader(data, "train", student.input, recipe, settings, compute, shared=False)
        distiller.prepare(every.epoch)
    others = {split: split_loader(data, split, student.input, recipe, settings, compute) for split in ("val", "test")}
    if not settings.evaluate_test_every_epoch:
        del others["test"]
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
            signals=stopping,
        ).run(resume=resume)
    finally:
        stored.close()
    processes.share_state(student.module)  # as it goes into the model file; its digest is part of a store's key
    take_deployed_network(student, distiller)
    best = history.records[history.best_epoch - 1]
    student.facts |= {
        "stage": planned.name,
        "seed": recipe.seed,
        "method": recipe.method if planned.distils else {"name": "supervised"},
        "training": training_facts(history, settings, extended_from),
        **({} if cost is None else {"teaching": {"by": list(planned.teachers), **cost, **stored.counts(processes)}}),
        "views": describe_training_views(train, recipe, data, settings.epochs),
        "val": best["val"],
        "lines": history.lines,  # of metrics.jsonl
        "data": {"source": data.source, "fingerprint": data.fingerprint},
        "potstill": __version__,
    }
    if processes.first:
        save_model(student, folder)
        finish_checkpoints(folder, history, keep=settings.keep_checkpoint)
    return history


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
