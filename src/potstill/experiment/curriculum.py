"""Curriculum of a distilled student: its images in the order of their difficulty for its teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from potstill.config.recipe import CurriculumSettings, Recipe
from potstill.data.samplers import Curriculum, curriculum_order, curriculum_share, uniform
from potstill.data.splits import DataSplits, EpochSampling
from potstill.evaluation.predictions import predict_probabilities
from potstill.experiment.builders import split_loader
from potstill.experiment.ensembles import average_probabilities
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute

Array = NDArray[np.float64]


def apply_curriculum(
    data: DataSplits,
    stage: PlannedStage,
    models: Mapping[str, Classifier],
    recipe: Recipe,
    compute: Compute,
    observer: Observer,
) -> DataSplits:
    """Return the data with the sampling of a stage's curriculum; unchanged without curriculum or distillation.

    The teachers run once on each image, without augmentation.  The order depends on their outputs only (for "random":
    on the seed), so a resumed run has the same; an epoch has as many steps as without curriculum.
    """
    settings = recipe.curriculum
    if settings is None or not stage.distils:
        return data
    difficulty = _predict_difficulty(data, [models[name] for name in stage.teachers], settings, recipe, compute)
    labels = np.asarray(data.train.labels)
    if settings.order == "random":
        seed = derive_seed(recipe.seed, f"{stage.seed}/curriculum")
        difficulty = uniform(seed, "curriculum", np.arange(len(labels), dtype=np.int64), 0)
    order = curriculum_order(-difficulty if settings.order == "hard" else difficulty, labels)
    epochs = recipe.stage_training(stage.name).epochs
    counts = images_per_epoch(settings, len(labels), len(data.class_names), epochs)
    observer.note(_describe_curriculum(settings, counts, difficulty))
    return replace(data, draws=EpochSampling(len(labels), curriculum=Curriculum(order, counts)))


def images_per_epoch(settings: CurriculumSettings, images: int, classes: int, epochs: int) -> tuple[int, ...]:
    """Return how many images each epoch draws from, at least one per class."""
    shares = (
        curriculum_share(settings.pacing, epoch, epochs, start=settings.start, until=settings.until)
        for epoch in range(epochs)
    )
    return tuple(min(images, max(classes, round(share * images))) for share in shares)


def image_difficulty(probabilities: Array, labels: NDArray[np.int64], score: str) -> Array:
    """Return the difficulty [N] of images, at least 0: "loss": -log p of the label; "confidence": 1 - the largest p."""
    if score == "confidence":
        return np.asarray(1.0 - probabilities.max(axis=1), dtype=np.float64)
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    loss: Array = -np.log(np.maximum(own, np.finfo(np.float32).tiny))
    return loss


def _predict_difficulty(
    data: DataSplits,
    teachers: Sequence[Classifier],
    settings: CurriculumSettings,
    recipe: Recipe,
    compute: Compute,
) -> Array:
    probabilities = []
    for teacher in teachers:
        teacher.module.to(compute.device)
        settings_of_student = recipe.stage_training("student")
        loader = split_loader(
            data, "train", teacher.input, recipe, settings_of_student, compute, network=teacher.module
        )
        found = predict_probabilities(
            teacher.module,
            loader,
            classes=len(data.class_names),
            processes=compute.processes,
            names=[f"the teacher on train, {name}," for name in data.train.names],
        )
        probabilities += [] if found is None else [found[0]]
    difficulty: Array | None = None
    if compute.processes.first:
        mean = average_probabilities(probabilities, recipe.teachers)
        difficulty = image_difficulty(np.asarray(mean), np.asarray(data.train.labels), settings.score)
    difficulty = compute.processes.share(difficulty)
    assert difficulty is not None  # the first process has computed it
    return difficulty


def _describe_curriculum(settings: CurriculumSettings, counts: Sequence[int], difficulty: Array) -> str:
    full = next(epoch for epoch, count in enumerate(counts, start=1) if count == counts[-1])
    first = {"easy": "the easiest", "hard": "the hardest", "random": "at random"}[settings.order]
    by = "" if settings.order == "random" else f" by the teacher's {settings.score}, median {np.median(difficulty):.3g}"
    return (
        f"curriculum: {first}{by}: {counts[0]:,} images in the first epoch, {counts[-1]:,} from epoch {full} on; "
        "the number of steps per epoch does not change"
    )
