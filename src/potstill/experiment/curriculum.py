"""Curriculum of a distilled student: its images in the order of their difficulty for its teachers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.config import stage_role
from potstill.config.recipe import CurriculumSettings, Recipe
from potstill.data.samplers import Curriculum, curriculum_order, curriculum_share, uniform
from potstill.data.splits import DataSplits, EpochSampling
from potstill.distillation.teacher_inference import InferenceSettings
from potstill.distillation.teachers import FoldHeads
from potstill.experiment.builders import split_loader
from potstill.experiment.ensembles import average_probabilities, predict_images
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.experiment.probe import embed_images
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute

Array = NDArray[np.float64]
_BLOCK = 4096  # images


def apply_curriculum(
    data: DataSplits,
    stage: PlannedStage,
    models: Mapping[str, Classifier],
    recipe: Recipe,
    compute: Compute,
    observer: Observer,
    fold_heads: Mapping[str, FoldHeads | None] = MappingProxyType({}),
) -> DataSplits:
    """Return the data with the sampling of a stage's curriculum; unchanged without curriculum or distillation.

    The teachers run once on each image, without augmentation.  The order depends on their outputs only (for "random":
    on the seed), so a resumed run has the same; an epoch has as many steps as without curriculum.  ``fold_heads``: of
    probed teachers, which have seen the labels: an image is judged by the head that has not seen its own, as it is
    taught.
    """
    settings = recipe.curriculum
    if settings is None or not stage.distils:
        return data
    labels = np.asarray(data.train.labels)
    teachers = {name: models[name] for name in stage.teachers if stage_role(name) != "previous"}
    difficulty = _predict_difficulty(data, teachers, fold_heads, recipe, compute)
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
    data: DataSplits,
    teachers: Mapping[str, Classifier],
    fold_heads: Mapping[str, FoldHeads | None],
    recipe: Recipe,
    compute: Compute,
) -> Array:
    settings, found = recipe.stage_training("student"), list[Array]()
    for name, teacher in teachers.items():
        loader = split_loader(data, "train", teacher.input, recipe, settings, compute, network=teacher.module)
        what, heads = f"the {name} on train", fold_heads.get(name)
        if heads is None:
            rows = predict_images(teacher, loader, compute, what)
        else:
            module, how = teacher.module.to(compute.device), InferenceSettings(memory_format=compute.memory_format)
            module.to(memory_format=compute.memory_format)
            embeddings = embed_images(module, how, heads.layer, loader, what, SilentObserver(), compute)
            rows = None if embeddings is None else _probabilities(heads, embeddings)
        found += [] if rows is None else [rows]
    difficulty = None
    if found:
        difficulty = image_difficulty(average_probabilities(found, recipe.teachers), np.asarray(data.train.labels))
    difficulty = compute.processes.share(difficulty)
    assert difficulty is not None  # the first process has computed it
    return difficulty


def _probabilities(heads: FoldHeads, embeddings: Tensor) -> Array:
    """Return the probabilities [N, K] of training images, in blocks: the logits of all heads may not fit."""
    heads, parts = copy.deepcopy(heads).cpu(), torch.arange(len(embeddings)).split(_BLOCK)  # type: ignore[no-untyped-call]
    return torch.cat([heads(embeddings[ids], ids).softmax(dim=1) for ids in parts]).numpy()


def _describe_curriculum(settings: CurriculumSettings, counts: Sequence[int], difficulty: Array) -> str:
    full = next(epoch for epoch, count in enumerate(counts, start=1) if count == counts[-1])
    first = {"easy": "the easiest", "hard": "the hardest", "random": "at random"}[settings.order]
    by = "" if settings.order == "random" else f" by the teacher's loss, median {np.median(difficulty):.3g}"
    return (
        f"curriculum: {first}{by}: {counts[0]:,} images in the first epoch, {counts[-1]:,} from epoch {full} on; "
        "the number of steps per epoch does not change"
    )
