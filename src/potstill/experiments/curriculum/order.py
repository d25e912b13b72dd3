"""A distilled student's curriculum: its images in the order that its teachers find them easy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from potstill.data.draws import uniform
from potstill.data.pacing import Admitted, in_turn, share_admitted
from potstill.data.splits import DataSplits, Draws
from potstill.evaluation.evaluate import collect
from potstill.experiments.curriculum.settings import CurriculumSettings
from potstill.experiments.groups import as_one
from potstill.experiments.loaders import split_loader
from potstill.experiments.plan import Planned
from potstill.experiments.recipe import Recipe
from potstill.experiments.seeds import derive
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute
from potstill.training.observer import Observer

Array = NDArray[np.float64]


def in_order(
    data: DataSplits,
    stage: Planned,
    models: Mapping[str, Classifier],
    recipe: Recipe,
    compute: Compute,
    observer: Observer,
) -> DataSplits:
    """The data with the draws of a stage's curriculum; as it is where the recipe has none, or the stage distils not.

    The teachers are asked once for every training image, without augmentation.  The order follows from their answers
    alone (of "random": from the seed), so a run that goes on finds the same one.  An epoch has as many images as
    without, so there are as many steps.
    """
    settings = recipe.curriculum
    if settings is None or not stage.distils:
        return data
    difficulty = _difficulty(data, [models[name] for name in stage.teachers], settings, recipe, compute)
    labels = np.asarray(data.train.labels)
    if settings.order == "random":
        seed = derive(recipe.seed, f"{stage.seed}/curriculum")
        difficulty = uniform(seed, "curriculum", np.arange(len(labels), dtype=np.int64), 0)
    order = in_turn(-difficulty if settings.order == "hard" else difficulty, labels)
    epochs = recipe.stage_training(stage.name).epochs
    counts = admitted(settings, len(labels), len(data.class_names), epochs)
    observer.note(_sentence(settings, counts, difficulty))
    return replace(data, draws=Draws(len(labels), curriculum=Admitted(order, counts)))


def admitted(settings: CurriculumSettings, images: int, classes: int, epochs: int) -> tuple[int, ...]:
    """How many images each epoch draws from; never fewer than there are classes, or than there are images."""
    shares = (
        share_admitted(settings.pacing, epoch, epochs, start=settings.start, until=settings.until)
        for epoch in range(epochs)
    )
    return tuple(min(images, max(classes, round(share * images))) for share in shares)


def difficulty_of(probabilities: Array, labels: NDArray[np.int64], score: str) -> Array:
    """How hard each image is.

    Args:
        probabilities: [N, K], the teachers' as one.
        labels: [N].
        score: "loss": -log p of the label; "confidence": 1 - the largest p.

    Returns:
        [N], at least 0.
    """
    if score == "confidence":
        return np.asarray(1.0 - probabilities.max(axis=1), dtype=np.float64)
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    loss: Array = -np.log(np.maximum(own, np.finfo(np.float32).tiny))
    return loss


def _difficulty(
    data: DataSplits,
    teachers: Sequence[Classifier],
    settings: CurriculumSettings,
    recipe: Recipe,
    compute: Compute,
) -> Array:
    said = []
    for teacher in teachers:
        teacher.module.to(compute.device)
        loader = split_loader(data, "train", teacher.input, recipe, recipe.stage_training("student"), compute)
        found, _, _ = collect(
            teacher.module,
            loader,
            classes=len(data.class_names),
            device=compute.device,
            processes=compute.processes,
            names=[f"the teacher on train, {name}," for name in data.train.names],
        )
        said.append(found)
    together = said[0] if len(said) == 1 else as_one(said, recipe.teachers)
    return difficulty_of(np.asarray(together), np.asarray(data.train.labels), settings.score)


def _sentence(settings: CurriculumSettings, counts: Sequence[int], difficulty: Array) -> str:
    full = next(epoch for epoch, count in enumerate(counts, start=1) if count == counts[-1])
    first = {"easy": "the easiest", "hard": "the hardest", "random": "at random"}[settings.order]
    by = "" if settings.order == "random" else f" by the teacher's {settings.score}, median {np.median(difficulty):.3g}"
    return (
        f"curriculum: {first}{by}: {counts[0]:,} images in the first epoch, {counts[-1]:,} from epoch {full} on; "
        "as many steps in each"
    )
