"""Which images each stage of a run sees, where the student is to work in another domain than its teacher knows.

The teacher learns and is picked in the source.  The baseline learns from every label there is: the source's, and those
of the target that may be used.  Whoever distils learns from target images alone, in epochs as long as the baseline's.
Both are picked by the labels of the target's val that may be used, or, where there are none, in the source.  Figures
are measured in the target.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from potstill.data.images import ImageSet, Subset
from potstill.data.loader import Loader
from potstill.data.relabelled import Relabelled
from potstill.data.splits import DataSplits, Draws, stratified_subset
from potstill.data.target import joint_fingerprint
from potstill.data.unlabeled import NO_LABEL, Joined
from potstill.evaluation.evaluate import collect
from potstill.experiments.domain.trusted import Ids, Trusted, choose
from potstill.experiments.groups import as_one
from potstill.experiments.plan import Planned
from potstill.experiments.recipe import Recipe
from potstill.experiments.seeds import derive
from potstill.experiments.stage_names import in_order, role
from potstill.models.classifier import Classifier
from potstill.models.model_file import save_model
from potstill.training.batch_norm import adapt_batch_norm
from potstill.training.devices import Compute
from potstill.training.observer import Observer


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
    trusted: Trusted | None = field(default=None, init=False)  # once a student is to be taught

    def seen_by(self, stage: Planned, models: Mapping[str, Classifier]) -> DataSplits:
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
            both = Relabelled(Joined(source.train, Subset(target.train, known)), labels)
            return self._as("labels", target, both if share else source.train, val)
        if self.trusted is None:
            self.trusted = self._choose(known, models)
        groups = self.trusted.groups if self.recipe.domains.balance else None
        chosen = Relabelled(Subset(self.candidates, self.trusted.index), self.trusted.labels)
        return self._as("target", target, chosen, val, Draws(len(source.train) + len(known), groups))

    def adapt(self, model: Classifier, name: str, folder: Path) -> None:
        """Give a teacher the target's BatchNorm statistics and save it; nothing where that is done, or not wanted.

        A run that was stopped between the teacher's training and this does it when it goes on.
        """
        if self.data.target is None or not self.recipe.domains.adapt_batch_norm or "batch_norm" in model.facts:
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
        loader = self._loader(model, shuffled=derive(self.recipe.seed, f"{name}/batch norm"))
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
            "labelled": int((self.trusted.labels != NO_LABEL).sum()),
            "counts": self.trusted.counts(self.data.class_names),
        }

    @cached_property
    def candidates(self) -> ImageSet:
        """All target images for training, those of ``data.unlabeled`` among them."""
        target = self.data.measured
        return target.train if target.unlabeled is None else Joined(target.train, target.unlabeled)

    def _choose(self, known: Ids, models: Mapping[str, Classifier]) -> Trusted:
        said = [self._answers(models[name], name) for name in in_order(models) if role(name) == "teacher"]
        labels = np.full(len(self.candidates), NO_LABEL, dtype=np.int64)
        labels[known] = self.candidates.labels[known]
        confidence, names = self.recipe.domains.confidence, self.data.class_names
        found = choose(as_one(said, self.recipe.teachers), labels, confidence)
        self.observer.note(found.sentence(names, len(self.candidates), confidence))
        if unseen := [name for name, count in found.counts(names).items() if count == 0]:
            self.warn(
                f"the teacher is sure of no target image of {', '.join(unseen[:10])}, so the distilled student sees no "
                "such image: lower domain.confidence, or try domain.adapt_batch_norm=true"
            )
        return found

    def _answers(self, model: Classifier, name: str) -> "np.ndarray[Any, Any]":
        model.module.to(self.compute.device)
        probabilities, _, _ = collect(
            model.module,
            self._loader(model),
            classes=len(model.class_names),
            device=self.compute.device,
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
            memory_share=self.recipe.data.memory_share,
            local_processes=processes.local_count,
            identity=f"{self.data.measured.fingerprint}/candidates",
            progress=self.observer,
            share=(processes.rank, processes.count) if shuffled is None else (0, 1),
        )

    def _as(
        self, what: str, target: DataSplits, train: ImageSet, val: ImageSet, draws: Draws | None = None
    ) -> DataSplits:
        return replace(
            self.data,
            train=train,
            val=val,
            test=target.test,
            fingerprint=joint_fingerprint(self.data.fingerprint, what),
            target=None,
            draws=draws,
        )


def _labelled(images: ImageSet, share: float, seed: int) -> Ids:
    """Positions of the images whose labels may be used: of each class its share, but one at least."""
    if share == 0:
        return np.zeros(0, dtype=np.int64)
    return stratified_subset(images.names, images.labels, round(share * len(images)), seed)
