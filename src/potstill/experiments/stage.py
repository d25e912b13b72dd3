"""One stage: a network is trained, and its best epoch is written as a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from potstill import __version__
from potstill.artifacts import write_text
from potstill.data.images import ImageSet
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.experiments.joining import join, layers_text, settle, teaching_cost
from potstill.experiments.plan import Planned
from potstill.experiments.recipe import Recipe
from potstill.experiments.seeds import derive
from potstill.inputs import InputSpec
from potstill.methods.base import Method
from potstill.models.classifier import Classifier
from potstill.models.model_file import save_model
from potstill.training.devices import Compute
from potstill.training.history import History
from potstill.training.loop import Training
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
    planned: Planned,
    student: Classifier,
    method: Method,
    teachers: Sequence[Classifier],
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    folder: Path,
    observer: Observer,
    resume: bool,
) -> History:
    """Train ``student`` in place by ``method`` and save it to ``folder``.

    Baseline and distilled draw the same order and the same views from the seed, so that only the method differs (one
    that needs batches of a fixed size leaves out the last, smaller one; unlabeled images are for who has a teacher).
    """
    settings = recipe.stage_training(planned.name)
    augment = recipe.data.augment or data.augment
    train = Loader(
        data.train,
        student.input,
        batch_size=settings.batch_size,
        augment=augment,
        order="balanced" if recipe.data.balance == "sampling" else "shuffled",
        seed=derive(recipe.seed, f"{planned.seed}/order"),
        view_seed=derive(recipe.data.view_seed, f"{planned.seed}/views"),
        workers=recipe.data.workers,
        device=compute.device,
        memory_share=recipe.data.memory_share,
        second=method.needs.second,
        classes=len(data.class_names),
        unlabeled=data.unlabeled if method.needs.teacher or method.needs.peers else None,
        unlabeled_share=recipe.data.unlabeled_share,
        whole_batches=method.needs.batch_size,
    )
    size = student.input.size
    distiller = join(
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
    if text := layers_text(distiller):
        write_text(folder / "layers.txt", text)
    cost = teaching_cost(distiller, settings.batch_size, size, compute)
    torch.manual_seed(derive(recipe.seed, f"{planned.seed}/dropout"))
    if method.needs.prepare:
        # On resuming too: what the checkpoint holds is then loaded over it.
        distiller.prepare(split_loader(data.train, student.input, recipe, settings, compute).epoch)
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
    settle(student, distiller)
    best = history.records[history.best_epoch - 1]
    student.facts |= {
        "stage": planned.name,
        "seed": recipe.seed,
        "method": recipe.method if planned.distils else {"name": "supervised"},
        "training": training_facts(history, settings),
        **({} if cost is None else {"teaching": {"by": list(planned.teachers), **cost}}),
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
