"""Domain adaptation: the images of each stage if the student's target domain differs from the teacher's source.

The teacher is trained and selected on the source. The baseline learns from all labels: the source's, and those of the
target that may be used. A distilled student learns from target images only (labeled ones, and those that the teacher
pseudo-labels with enough confidence), in epochs as long as the baseline's. The best epoch of both is selected on the
target's labeled val images, or, if there are none, on the source's val. Final metrics are those on the target.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.config import sort_stages, stage_role
from potstill.config.recipe import Recipe
from potstill.data.datasets import combine_fingerprints
from potstill.data.image_sets import UNLABELED, ImageSet, RelabeledSet, SemiSupervisedSet, Subset
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits, EpochSampling, stratified_subset
from potstill.errors import UsageError
from potstill.evaluation import Array
from potstill.evaluation.final_metrics import final_metrics
from potstill.experiment.builders import split_loader
from potstill.experiment.ensembles import predict_images, predict_together
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.models.model_file import Classifier, save_model
from potstill.training.averaging import adapt_batch_norm, batch_norm_layers
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute

LOWER_THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)  # of domain.confidence, for a message
_MAX_CLASSES = 10  # classes that a message lists

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class PseudoLabels:
    """The target images that the student learns from."""

    index: Ids  # [M], among all target images for training, ascending
    labels: Ids  # [M]: class ids if the label may be used, else -100
    groups: Ids  # [M]: class ids: the label if it may be used, else the teacher's prediction

    def counts(self, class_names: Sequence[str]) -> dict[str, int]:
        """Return the number of images by class of their group."""
        counts = np.bincount(self.groups, minlength=len(class_names))
        return dict(zip(class_names, counts.tolist(), strict=True))

    def sentence(self, class_names: Sequence[str], of: int, confidence: float) -> str:
        """Return a sentence on the number of images by class."""
        counts = self.counts(class_names)
        listed = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:_MAX_CLASSES])
        more = f" and {len(counts) - _MAX_CLASSES} more classes" if len(counts) > _MAX_CLASSES else ""
        known = int((self.labels != UNLABELED).sum())
        labelled = f", {known:,} of them with their label" if known else ""
        return (
            f"{len(self.index):,} of {of:,} target images are used for training{labelled} (teacher's confidence "
            f"at least {confidence:g}); by predicted class: {listed}{more}"
        )


def select_pseudo_labels(probabilities: Array, labels: Ids, confidence: float) -> PseudoLabels:
    """Select the images with a confident prediction, and those whose label may be used (not -100)."""
    top, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1).astype(np.int64)
    known = labels != UNLABELED
    index = np.flatnonzero((top >= confidence) | known)
    if len(index) == 0:
        lower = ", ".join(f"{int((top >= each).sum()):,} at {each:g}" for each in LOWER_THRESHOLDS if each < confidence)
        raise UsageError(
            f"domain.confidence {confidence:g} leaves none of {len(top):,} target images: the teacher's "
            f"confidence is {top.max():.3f} at most.\nImages at lower thresholds: {lower}\n"
            "Lower domain.confidence, set domain.adapt_batch_norm=true, or train the teacher longer"
        )
    return PseudoLabels(index, labels[index], np.where(known, labels, predicted)[index])


@dataclass
class Domains:
    """The images of each stage of a run; without a target, all stages use the source."""

    recipe: Recipe
    data: DataSplits
    compute: Compute
    observer: Observer
    warn: Callable[[str], None]
    trusted: PseudoLabels | None = field(default=None, init=False)  # set for the first student

    def stage_data(self, stage: PlannedStage, models: Mapping[str, Classifier]) -> DataSplits:
        """Return the splits of a stage."""
        source, target = self.data, self.data.target
        if target is None:
            return source
        share, seed = self.recipe.data.target_labels, self.recipe.data.split_seed
        if stage.role == "teacher":
            return self._as("source", target, source.train, source.val)
        known = _labelled(target.train, share, seed)
        val = Subset(target.val, _labelled(target.val, share, seed)) if share else source.val
        if stage.role == "baseline":
            labels = np.concatenate([source.train.labels, target.train.labels[known]])
            both = RelabeledSet(SemiSupervisedSet(source.train, Subset(target.train, known)), labels)
            return self._as("labels", target, both if share else source.train, val)
        if self.trusted is None:
            self.trusted = self._select(known, models)
        groups = self.trusted.groups if self.recipe.domain_settings.class_balance else None
        chosen = RelabeledSet(Subset(self.candidates, self.trusted.index), self.trusted.labels)
        return self._as("target", target, chosen, val, EpochSampling(len(source.train) + len(known), groups))

    def adapt(self, model: Classifier, name: str, folder: Path) -> None:
        """Set a teacher's BatchNorm statistics to the target's and save it, once, if the recipe requests it."""
        if self.data.target is None or not self.recipe.domain_settings.adapt_batch_norm or "batch_norm" in model.facts:
            return
        seen = self.take_statistics(model, name)
        model.facts["batch_norm"] = {"of": self.data.target.source, "images": seen}
        if self.compute.processes.first:
            save_model(model, folder)
        self.observer.note(f"{name}: BatchNorm statistics of {seen:,} target images in place of the source's (AdaBN)")

    def take_statistics(self, model: Classifier, name: str) -> int:
        """Set a network's BatchNorm statistics to the target's, in place; return the number of images."""
        # In one memory layout, whether it was just trained or loaded, so that sums are rounded equally.
        model.module.to(self.compute.device).to(memory_format=self.compute.memory_format)
        loader = self._loader(model, shuffled=derive_seed(self.recipe.seed, f"{name}/batch norm"))
        seen = adapt_batch_norm(model.module, loader.epoch())
        self.compute.processes.share_state(model.module)
        return seen

    def facts(self) -> dict[str, Any]:
        """Return facts on the selected images, for the student's model file; empty if there are none."""
        if self.trusted is None:
            return {}
        return {
            "images": len(self.trusted.index),
            "of": len(self.candidates),
            "labelled": int((self.trusted.labels != UNLABELED).sum()),
            "counts": self.trusted.counts(self.data.class_names),
        }

    @cached_property
    def candidates(self) -> ImageSet:
        """All target images for training, including those of ``data.unlabeled``."""
        target = self.data.measured
        return target.train if target.unlabeled is None else SemiSupervisedSet(target.train, target.unlabeled)

    def _select(self, known: Ids, models: Mapping[str, Classifier]) -> PseudoLabels:
        teachers = {name: models[name] for name in sort_stages(models) if stage_role(name) == "teacher"}
        mean = predict_together(teachers, self._loader, self.recipe.teachers, self.compute, "the target")
        labels = np.full(len(self.candidates), UNLABELED, dtype=np.int64)
        labels[known] = self.candidates.labels[known]
        confidence, names = self.recipe.domain_settings.confidence, self.data.class_names
        found = self.compute.processes.share(None if mean is None else select_pseudo_labels(mean, labels, confidence))
        assert found is not None  # the first process has selected them
        self.observer.note(found.sentence(names, len(self.candidates), confidence))
        if unseen := [name for name, count in found.counts(names).items() if count == 0]:
            self.warn(
                f"the teacher predicts no target image as {', '.join(unseen[:10])} with enough confidence, so the "
                "distilled student sees none:  lower domain.confidence, or try domain.adapt_batch_norm=true"
            )
        return found

    def _loader(self, model: Classifier, shuffled: int | None = None) -> Loader:
        processes, least = self.compute.processes, self.recipe.stage_training("student").batch_size
        return Loader(
            self.candidates,
            model.input,
            # A shuffled loader drops a last batch of one image.
            batch_size=next(size for size in itertools.count(least) if size == 1 or len(self.candidates) % size != 1),
            order="listed" if shuffled is None else "shuffled",
            seed=shuffled or 0,
            workers=self.recipe.data.workers,
            device=self.compute.device,
            cache_fraction=self.recipe.data.cache_fraction,
            local_processes=processes.local_count,
            identity=f"{self.data.measured.fingerprint}/candidates",
            progress=self.observer,
            share=(processes.rank, processes.count) if shuffled is None else (0, 1),
        )

    def _as(
        self, what: str, target: DataSplits, train: ImageSet, val: ImageSet, draws: EpochSampling | None = None
    ) -> DataSplits:
        return replace(
            self.data,
            train=train,
            val=val,
            test=target.test,
            fingerprint=combine_fingerprints(self.data.fingerprint, what),
            target=None,
            draws=draws,
        )


def _labelled(images: ImageSet, share: float, seed: int) -> Ids:
    """Return the positions of images whose labels may be used: a share of each class, at least one image."""
    if share == 0:
        return np.zeros(0, dtype=np.int64)
    return stratified_subset(images.names, images.labels, round(share * len(images)), seed)


def evaluate_on_source(
    models: Mapping[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, dict[str, Any]]:
    """Return the metrics of every network on the source's test split; empty without a target.  Call it in all."""
    if data.target is None:
        return {}
    return {name: _evaluate_test(name, model, recipe, data, compute) for name, model in models.items()}


def evaluate_adapted_baselines(
    models: Mapping[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, float]:
    """Return top-1 of each baseline on the target with the target's BatchNorm statistics: the effect of AdaBN alone.

    Empty if the teachers were not adapted.  Call in all processes; the models are not changed.
    """
    found: dict[str, float] = {}
    if data.target is None or not recipe.domain_settings.adapt_batch_norm:
        return found
    silent = SilentObserver()
    domains = Domains(recipe, data, compute, silent, silent.warn)
    for name, model in models.items():
        if stage_role(name) == "baseline" and batch_norm_layers(model.module):
            adapted = replace(model, module=copy.deepcopy(model.module))
            domains.take_statistics(adapted, name)
            found[name] = _evaluate_test(f"adapted {name}", adapted, recipe, data.target, compute)["top1"]
    return found


def describe_domains(
    recipe: Recipe,
    data: DataSplits,
    models: Mapping[str, Classifier],
    figures: Mapping[str, Mapping[str, Any]],
    adapted: Mapping[str, float],
) -> dict[str, Any] | None:
    """Return ``domain`` of the comparison; None without a target."""
    if data.target is None:
        return None
    share, settings = recipe.data.target_labels, recipe.domain_settings
    chosen: dict[str, Any] = next((model.facts["domain"] for model in models.values() if "domain" in model.facts), {})
    by_stage: dict[str, list[float]] = {}
    for name in sort_stages(figures):
        of_seeds = stage_role(name) in ("baseline", "distilled")
        by_stage.setdefault(stage_role(name) if of_seeds else name, []).append(figures[name]["top1"])
    return {
        "source": data.source,
        "target": data.target.source,
        "target_labels": share,
        "confidence": settings.confidence,
        "class_balance": settings.class_balance,
        "adapted": any("batch_norm" in model.facts for model in models.values()),
        **chosen,
        "picked_by": "the target's labelled val" if share else "the source's val",
        "source_images": len(data.test),
        "source_top1": {stage: float(np.mean(found)) for stage, found in by_stage.items()},  # mean over the seeds
        **({"adapted_baseline_top1": float(np.mean(list(adapted.values())))} if adapted else {}),
    }


def _evaluate_test(name: str, model: Classifier, recipe: Recipe, data: DataSplits, compute: Compute) -> dict[str, Any]:
    loader = split_loader(data, "test", model.input, recipe, recipe.stage_training("student"), compute)
    predicted = predict_images(model, loader, compute, f"the {name} on {data.source}")
    metrics = compute.processes.share(
        None if predicted is None else final_metrics(predicted, np.asarray(data.test.labels), data.class_names)
    )
    assert metrics is not None  # the first process has computed them
    return metrics
