"""Curriculum of a distilled student: its images in the order of their difficulty for its teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from potstill.config import stage_role
from potstill.config.recipe import CurriculumSettings, Recipe
from potstill.data.loader import Loader
from potstill.data.samplers import Curriculum, curriculum_order, curriculum_share, uniform
from potstill.data.splits import DataSplits, EpochSampling
from potstill.experiment.builders import split_loader
from potstill.experiment.ensembles import predict_together
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
    labels = np.asarray(data.train.labels)
    teachers = {name: models[name] for name in stage.teachers if stage_role(name) != "previous"}
    difficulty = _predict_difficulty(data, teachers, recipe, compute)
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
    shares = (curriculum_share(epoch, epochs, start=settings.start, until=settings.until) for epoch in range(epochs))
    return tuple(min(images, max(classes, round(share * images))) for share in shares)


def image_difficulty(probabilities: Array, labels: NDArray[np.int64]) -> Array:
    """Return the difficulty [N] of images, -log p of the label."""
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    loss: Array = -np.log(np.maximum(own, np.finfo(np.float32).tiny))
    return loss


def _predict_difficulty(
    data: DataSplits, teachers: Mapping[str, Classifier], recipe: Recipe, compute: Compute
) -> Array:
    settings = recipe.stage_training("student")

    def loader(teacher: Classifier) -> Loader:
        return split_loader(data, "train", teacher.input, recipe, settings, compute, network=teacher.module)

    mean = predict_together(teachers, loader, recipe.teachers, compute, "train")
    difficulty = None if mean is None else image_difficulty(mean, np.asarray(data.train.labels))
    found: Array | None = compute.processes.share(difficulty)
    assert found is not None  # the first process has computed it
    return found


def _describe_curriculum(settings: CurriculumSettings, counts: Sequence[int], difficulty: Array) -> str:
    full = next(epoch for epoch, count in enumerate(counts, start=1) if count == counts[-1])
    first = {"easy": "the easiest", "hard": "the hardest", "random": "at random"}[settings.order]
    by = "" if settings.order == "random" else f" by the teacher's loss, median {np.median(difficulty):.3g}"
    return (
        f"curriculum: {first}{by}: {counts[0]:,} images in the first epoch, {counts[-1]:,} from epoch {full} on; "
        "the number of steps per epoch does not change"
    )
