"""Domain adaptation: the images that each stage of a run sees if the student is to work in another domain than its
teacher, and the domain part of results.json.

The teacher is trained and selected in the source. The baseline learns from every label there is: the source's, and
those of the target that may be used. A distilled student learns from target images alone (those with a label, and
those that the teacher pseudo-labels with enough confidence), in epochs as long as the baseline's. Both are selected
by the labels of the target's val that may be used, or, if there are none, in the source. Figures are measured in the
target.
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

from potstill.config.recipe import Recipe
from potstill.config.stage_names import sort_stages, stage_role
from potstill.data.datasets import combine_fingerprints
from potstill.data.image_sets import UNLABELED, ImageSet, RelabeledSet, SemiSupervisedSet, Subset
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits, EpochSampling, stratified_subset
from potstill.errors import UsageError
from potstill.evaluation.classification import Array
from potstill.evaluation.final_metrics import final_metrics
from potstill.evaluation.predictions import predict_probabilities
from potstill.experiment.builders import split_loader
from potstill.experiment.ensembles import average_probabilities
from potstill.experiment.plan import PlannedStage, derive_seed
from potstill.models.model_file import Classifier, save_model
from potstill.training.averaging import adapt_batch_norm, batch_norm_layers
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute

LOWER_THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)  # thresholds that a message looks at
_MAX_CLASSES = 10  # classes that a sentence names

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class PseudoLabels:
    """Images of the target that the student learns from."""

    index: Ids  # [M], of all target images for training, rising
    labels: Ids  # [M]: class ids where the label may be used, else -100
    groups: Ids  # [M]: class ids; the label where it may be used, else what the teacher says

    def counts(self, class_names: Sequence[str]) -> dict[str, int]:
        """Images by the class of their group."""
        found = np.bincount(self.groups, minlength=len(class_names))
        return dict(zip(class_names, found.tolist(), strict=True))

    def sentence(self, class_names: Sequence[str], of: int, confidence: float) -> str:
        """For people: how many, and of which classes."""
        counts = self.counts(class_names)
        said = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:_MAX_CLASSES])
        more = f" and {len(counts) - _MAX_CLASSES} more classes" if len(counts) > _MAX_CLASSES else ""
        known = int((self.labels != UNLABELED).sum())
        labelled = f", {known:,} of them with their label" if known else ""
        return (
            f"{len(self.index):,} of {of:,} target images teach the student{labelled} (teacher's confidence "
            f"at least {confidence:g}); by class as the teacher sees it: {said}{more}"
        )


def select_pseudo_labels(probabilities: Array, labels: Ids, confidence: float) -> PseudoLabels:
    """The images of which the teacher is sure enough, and those whose label may be used.

    Args:
        probabilities: [N, K], the teacher's; of equal ones the lower class comes first.
        labels: [N] class ids where they may be used, else -100.
        confidence: least probability of the first class, from 0 to 1.

    Raises:
        UsageError: nothing is left; says how many would be at lower thresholds.
    """
    sure, said = probabilities.max(axis=1), probabilities.argmax(axis=1).astype(np.int64)
    known = labels != UNLABELED
    index = np.flatnonzero((sure >= confidence) | known)
    if len(index) == 0:
        lower = ", ".join(
            f"{int((sure >= each).sum()):,} at {each:g}" for each in LOWER_THRESHOLDS if each < confidence
        )
        raise UsageError(
            f"domain.confidence {confidence:g} leaves none of {len(sure):,} target images to learn from: the teacher's "
            f"confidence is {sure.max():.3f} at most.\nAt lower thresholds there would be: {lower}\n"
            "Lower domain.confidence, set domain.adapt_batch_norm=true, or train the teacher longer"
        )
    return PseudoLabels(index, labels[index], np.where(known, labels, said)[index])


@dataclass
class Domains:
    """The domains of one run; with a source alone, every stage sees all of it.

    Args:
        recipe: says what is learned from.
        data: the source's, with the target beside.
        compute: where the teachers are asked.
        observer: is told which images are learned from.
        warn: is told of classes that the student will not see.
    """

    recipe: Recipe
    data: DataSplits
    compute: Compute
    observer: Observer
    warn: Callable[[str], None]
    trusted: PseudoLabels | None = field(default=None, init=False)  # once a student is to be taught

    def stage_data(self, stage: PlannedStage, models: Mapping[str, Classifier]) -> DataSplits:
        """The images of a stage about to be trained.

        Args:
            stage: which.
            models: that have been trained; whoever distils needs the teachers.

        Raises:
            UsageError: the teacher is sure of no image.
        """
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
            self.trusted = self._choose(known, models)
        groups = self.trusted.groups if self.recipe.domain_settings.class_balance else None
        chosen = RelabeledSet(Subset(self.candidates, self.trusted.index), self.trusted.labels)
        return self._as("target", target, chosen, val, EpochSampling(len(source.train) + len(known), groups))

    def adapt(self, model: Classifier, name: str, folder: Path) -> None:
        """Give a teacher the target's BatchNorm statistics and save it; nothing where that is done, or not wanted.

        A run that was stopped between the teacher's training and this does it when it goes on.
        """
        if self.data.target is None or not self.recipe.domain_settings.adapt_batch_norm or "batch_norm" in model.facts:
            return
        seen = self.take_statistics(model, name)
        model.facts["batch_norm"] = {"of": self.data.target.source, "images": seen}
        if self.compute.processes.first:
            save_model(model, folder)
        self.observer.note(f"{name}: BatchNorm statistics of {seen:,} target images in place of the source's (AdaBN)")

    def take_statistics(self, model: Classifier, name: str) -> int:
        """Give a network the target's BatchNorm statistics, in place; how many images they are of."""
        # In one layout, whether it was just trained or read from its file: sums are rounded alike.
        model.module.to(self.compute.device).to(memory_format=self.compute.memory_format)
        loader = self._loader(model, shuffled=derive_seed(self.recipe.seed, f"{name}/batch norm"))
        seen = adapt_batch_norm(model.module, loader.epoch())
        self.compute.processes.share_state(model.module)
        return seen

    def facts(self) -> dict[str, Any]:
        """Of the images that teach a student, for its model file; empty where nothing was chosen."""
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
        """All target images for training, those of ``data.unlabeled`` among them."""
        target = self.data.measured
        return target.train if target.unlabeled is None else SemiSupervisedSet(target.train, target.unlabeled)

    def _choose(self, known: Ids, models: Mapping[str, Classifier]) -> PseudoLabels:
        said = [self._answers(models[name], name) for name in sort_stages(models) if stage_role(name) == "teacher"]
        labels = np.full(len(self.candidates), UNLABELED, dtype=np.int64)
        labels[known] = self.candidates.labels[known]
        confidence, names = self.recipe.domain_settings.confidence, self.data.class_names
        found = select_pseudo_labels(average_probabilities(said, self.recipe.teachers), labels, confidence)
        self.observer.note(found.sentence(names, len(self.candidates), confidence))
        if unseen := [name for name, count in found.counts(names).items() if count == 0]:
            self.warn(
                f"the teacher is sure of no target image of {', '.join(unseen[:10])}, so the distilled student sees no "
                "such image: lower domain.confidence, or try domain.adapt_batch_norm=true"
            )
        return found

    def _answers(self, model: Classifier, name: str) -> "np.ndarray[Any, Any]":
        model.module.to(self.compute.device)
        probabilities, _, _ = predict_probabilities(
            model.module,
            self._loader(model),
            classes=len(model.class_names),
            processes=self.compute.processes,
            names=[f"the {name} on the target, {image}," for image in self.candidates.names],
        )
        return probabilities

    def _loader(self, model: Classifier, shuffled: int | None = None) -> Loader:
        """Every candidate as it is, in listed order; or, with the seed ``shuffled``, mixed and for each process."""
        processes, least = self.compute.processes, self.recipe.stage_training("student").batch_size
        return Loader(
            self.candidates,
            model.input,
            # A last batch of one image would be left out where they are mixed.
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
    """Positions of the images whose labels may be used: of each class its share, but one at least."""
    if share == 0:
        return np.zeros(0, dtype=np.int64)
    return stratified_subset(images.names, images.labels, round(share * len(images)), seed)


def evaluate_on_source(
    models: Mapping[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, dict[str, Any]]:
    """Figures of every network on the source's test images; nothing where there is no target.  All processes ask.

    Args:
        models: by stage.
        recipe: how the images are prepared.
        data: the source's, with the target beside.
        compute: where.
    """
    if data.target is None:
        return {}
    return {name: _evaluate_test(name, model, recipe, data, compute) for name, model in models.items()}


def evaluate_adapted_baselines(
    models: Mapping[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> dict[str, float]:
    """Top-1 on the target's test of every baseline that is given the target's BatchNorm statistics, as its teacher was:
    what the statistics alone would have brought.  Nothing where no teacher was.  All processes ask.

    Args:
        models: by stage; they stay as they are.
        recipe: whether statistics were adapted.
        data: the source's, with the target beside.
        compute: where.
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
    """``domain`` of the comparison; None where there is no target.

    Args:
        recipe: says what was learned from.
        data: the source's, with the target beside.
        models: by stage.
        figures: of ``evaluate_on_source``.
        adapted: of ``evaluate_adapted_baselines``.
    """
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
        "source_top1": {stage: float(np.mean(found)) for stage, found in by_stage.items()},  # of several seeds the mean
        **({"adapted_baseline_top1": float(np.mean(list(adapted.values())))} if adapted else {}),
    }


def _evaluate_test(name: str, model: Classifier, recipe: Recipe, data: DataSplits, compute: Compute) -> dict[str, Any]:
    settings = recipe.stage_training("student")
    probabilities, labels, _ = predict_probabilities(
        model.module.to(compute.device),
        split_loader(data, "test", model.input, recipe, settings, compute),
        classes=len(model.class_names),
        processes=compute.processes,
        names=[f"the {name} on {data.source}, {image}," for image in data.test.names],
    )
    return final_metrics(probabilities, labels, data.class_names)
