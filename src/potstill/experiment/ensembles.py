"""Ensembles: combined predictions of a run's teachers, and of the generations of its student."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from potstill.config import sort_stages, stage_role
from potstill.config.recipe import TeachersSettings
from potstill.data.loader import Loader
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.evaluation import Array
from potstill.evaluation.cascade import Cascade
from potstill.evaluation.predictions import (
    MAX_VALUES_IN_MEMORY,
    ArrayProbabilities,
    Predictions,
    Probabilities,
    iterate_blocks,
    predict_probabilities,
)
from potstill.experiment.run_folder import SPLITS
from potstill.experiment.teacher_cache import read_or_run
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute

SplitPredictions = dict[str, Predictions]  # by split

_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)  # in place of a probability that has become 0


def group_members(group: str, stages: Iterable[str]) -> list[str]:
    """Return the stages of a group: all ``teachers``; or the ``generations``, of which distilled is the last."""
    roles = ("teacher",) if group == "teachers" else ("generation", "distilled")
    return sort_stages(name for name in stages if stage_role(name) in roles)


@dataclass(frozen=True)
class MeanPredictions:
    """Mean probabilities of several networks, computed block by block."""

    each: tuple[Probabilities, ...]
    shares: Array  # [M, 1, 1]
    by_logits: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.each[0].shape

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield (rows, mean probabilities) of each block."""
        for rows, blocks in iterate_blocks(*self.each):
            yield rows, _mean(np.stack(blocks), self.shares, self.by_logits)


def ensemble_predictions(
    stages: Mapping[str, Mapping[str, Predictions]], settings: TeachersSettings
) -> dict[str, SplitPredictions]:
    """Return combined predictions: of the teachers, as the recipe sets, and of the generations, by their mean.

    A single teacher is returned unchanged; a single generation is left out, as are splits without probabilities.
    Averaged logits are, after softmax, the weighted geometric mean of the probabilities.
    """
    groups: dict[str, SplitPredictions] = {}
    for group in ("teachers", "generations"):
        names = group_members(group, stages)
        if not names or (group == "generations" and len(names) < 2):
            continue
        if len(names) == 1:
            groups[group] = dict(stages[names[0]])
            continue
        by_logits = group == "teachers" and settings.combine == "logits"
        given = settings.weights if group == "teachers" and settings.weights is not None else [1.0] * len(names)
        shares = np.asarray(given, dtype=np.float64)[:, None, None] / sum(given)
        groups[group] = {}
        for split in SPLITS:
            found = [stages[name][split] for name in names if split in stages[name]]
            rows = [each.probabilities for each in found if each.probabilities is not None]
            if len(rows) == len(names):
                groups[group][split] = Predictions.of(
                    _in_memory(MeanPredictions(tuple(rows), shares, by_logits)), found[0].labels
                )
    return groups


def _in_memory(rows: MeanPredictions) -> Probabilities:
    """Return the probabilities as an array, if it is small."""
    if rows.shape[0] * rows.shape[1] > MAX_VALUES_IN_MEMORY:
        return rows
    blocks = [block for _, block in rows.blocks()]
    return ArrayProbabilities(np.concatenate(blocks)) if blocks else ArrayProbabilities(np.zeros(rows.shape))


def average_probabilities(each: Sequence[Array], settings: TeachersSettings) -> Array:
    """Return the combined probabilities [N, K] of teachers on the same images; those of a single teacher unchanged."""
    given = settings.weights if settings.weights is not None else [1.0] * len(each)
    shares = np.asarray(given, dtype=np.float64)[:, None, None] / sum(given)
    return each[0] if len(each) == 1 else _mean(np.stack(each), shares, settings.combine == "logits")


def cascade_average(cascade: Cascade) -> Callable[[Sequence[Array]], Array]:
    """Return the function that combines the probabilities [N, K] of a cascade's teachers."""
    settings = TeachersSettings.model_validate({"combine": cascade.combine, "weights": cascade.weights})
    return lambda each: average_probabilities(each, settings)


def predict_images(
    model: Classifier,
    loader: Loader,
    compute: Compute,
    what: str,
    cache: TeacherCache | None = None,
    observer: Observer | None = None,
) -> Array | None:
    """Return a network's probabilities [N, K] for the images of ``loader``, read from the cache if they are there; None
    but in the first process.
    """
    # Trained networks have this memory layout, loaded ones have not, and convolutions round differently in each.
    module = model.module.to(compute.device).to(memory_format=compute.memory_format)
    classes, seen = len(model.class_names), observer or SilentObserver()

    def run() -> Tensor | None:
        progress = partial(seen.wait, f"predictions of {what}")
        found = predict_probabilities(
            module, loader, classes=classes, processes=compute.processes, what=what, progress=progress
        )
        return None if found is None else torch.from_numpy(found[0])

    rows, _ = read_or_run(cache, run, seen.warn, compute)
    return None if rows is None else rows.numpy()


def predict_together(
    models: Mapping[str, Classifier],
    loader: Callable[[Classifier], Loader],
    settings: TeachersSettings,
    compute: Compute,
    what: str,
) -> Array | None:
    """Return the combined probabilities [N, K] of teachers, by name, on images; None but in the first process."""
    each = [predict_images(model, loader(model), compute, f"the {name} on {what}") for name, model in models.items()]
    return average_probabilities([rows for rows in each if rows is not None], settings) if each[0] is not None else None


def _mean(stacked: Array, shares: Array, by_logits: bool) -> Array:
    """Return the weighted mean, [M, N, K] -> [N, K]."""
    stacked = stacked.astype(np.float64)
    mean: Array = (shares * stacked).sum(axis=0)
    if len(stacked) == 1 or not by_logits:
        return mean
    logs = (shares * np.log(np.maximum(stacked, _SMALLEST))).sum(axis=0)
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    combined: Array = raised / raised.sum(axis=1, keepdims=True)
    return combined
