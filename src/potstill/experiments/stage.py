"""One stage: a network is trained, and its best epoch is written as a model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potstill import __version__
from potstill.data.images import ImageSet
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distiller import Distiller
from potstill.experiments.recipe import Recipe
from potstill.experiments.seeds import derive
from potstill.inputs import InputSpec
from potstill.methods.base import Method
from potstill.models.classifier import Classifier
from potstill.models.model_file import save_model
from potstill.training.devices import Compute
from potstill.training.loop import History, Training
from potstill.training.observer import Observer
from potstill.training.settings import TrainingSettings


def split_loader(
    images: ImageSet, spec: InputSpec, recipe: Recipe, settings: TrainingSettings, compute: Compute
) -> Loader:
    """Every image of a split once, in its listed order, without augmentation."""
    return Loader(
        images,
        spec,
        batch_size=settings.batch_size,
        workers=recipe.data.workers,
        device=compute.device,
        memory_share=recipe.data.memory_share,
    )


def train_stage(
    stage: str,
    student: Classifier,
    method: Method,
    teacher: Classifier | None,
    *,
    recipe: Recipe,
    settings: TrainingSettings,
    data: DataSplits,
    compute: Compute,
    folder: Path,
    observer: Observer,
    resume: bool,
) -> History:
    """Train ``student`` in place by ``method`` and save it to ``folder``.

    Baseline and distilled draw the same order and the same views from the seed, so that only the method differs.
    """
    purpose = "teacher" if stage == "teacher" else "student"
    augment = recipe.data.augment or data.augment
    train = Loader(
        data.train,
        student.input,
        batch_size=settings.batch_size,
        augment=augment,
        order="balanced" if recipe.data.balance == "sampling" else "shuffled",
        seed=derive(recipe.seed, f"{purpose}/views"),
        workers=recipe.data.workers,
        device=compute.device,
        memory_share=recipe.data.memory_share,
    )
    student.module.to(compute.device).to(memory_format=compute.memory_format)
    if teacher is not None:
        teacher.module.to(compute.device).to(memory_format=compute.memory_format)
    size = student.input.size
    distiller = Distiller(
        student.module,
        teacher.module if teacher is not None else None,
        method,
        example=torch.zeros(2, 3, size, size, device=compute.device),
        student_input=student.input if teacher is not None else None,
        teacher_input=teacher.input if teacher is not None else None,
        label_loss=label_loss(recipe, settings, data),
    ).to(compute.device)
    torch.manual_seed(derive(recipe.seed, f"{purpose}/dropout"))
    test = split_loader(data.test, student.input, recipe, settings, compute)
    history = Training(
        distiller,
        train,
        split_loader(data.val, student.input, recipe, settings, compute),
        settings,
        compute,
        folder=folder,
        observer=observer,
        classes=len(data.class_names),
        test=test if settings.evaluate_test_every_epoch else None,
    ).run(resume=resume)
    best = history.records[history.best_epoch - 1]
    student.facts |= {
        "stage": stage,
        "seed": recipe.seed,
        "method": recipe.method if stage == "distilled" else {"name": "supervised"},
        "training": training_facts(history, settings),
        "val": best["val"],
        "data": {"source": data.source, "fingerprint": data.fingerprint},
        "potstill": __version__,
    }
    save_model(student, folder)
    (folder / "checkpoints" / "best.checkpoint").unlink(missing_ok=True)  # model.safetensors holds the same weights
    return history


def training_facts(history: History, settings: TrainingSettings) -> dict[str, Any]:
    """What results.json says of a stage's training."""
    return {
        "epochs": len(history.records),
        "best_epoch": history.best_epoch,
        "seconds": round(history.seconds, 3),
        "images_per_second": history.images_per_second,
        "pick_by": settings.pick_by,
    }


def label_loss(recipe: Recipe, settings: TrainingSettings, data: DataSplits) -> nn.Module:
    """Cross-entropy with the recipe's label smoothing and class weights.

    Class k of n images weighs N / (K n): the mean weight over the training images is 1.
    """
    weight = None
    if recipe.data.balance == "weights":
        counts = np.bincount(np.asarray(data.train.labels), minlength=len(data.class_names))
        weight = torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=settings.label_smoothing)
