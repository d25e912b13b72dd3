"""One step of every stage that a method trains, on made-up images, before the hours of training begin."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from potstill.data.settings import AugmentSettings
from potstill.data.splits import DataSplits
from potstill.distiller import Distiller
from potstill.errors import UsageError
from potstill.experiments.joining import join, layers_text, settle
from potstill.experiments.method_settings import describe
from potstill.experiments.plan import Planned
from potstill.experiments.recipe import Recipe
from potstill.experiments.stage_names import role
from potstill.experiments.start import start_network
from potstill.methods import create_method
from potstill.methods.base import Method
from potstill.models.classifier import Classifier
from potstill.training.batch_norm import refuse_without_batch_norm
from potstill.training.devices import Compute, choose
from potstill.training.label_loss import LabelLoss
from potstill.training.settings import TrainingSettings
from potstill.types import UNLABELED, Batch

MOST_ROWS = 12  # of adapters that are shown; layers.txt in the run folder lists all
IMAGES = 4  # of a batch: enough for what compares images with each other


def rehearse(recipe: Recipe, planned: Sequence[Planned], data: DataSplits) -> dict[str, str]:
    """Whatever a method refuses, it refuses here: networks, class counts, batch sizes, images without labels.

    Every network is made for this alone, and torch's random state is put back.

    Returns:
        For each stage that a method trains: the table of joined layers and adapters, "" where there are none.

    Raises:
        UsageError: a stage that cannot be trained so.
        ArtifactError: weights that do not fit.
    """
    texts, networks = {}, dict[str, Classifier]()
    computes = [choose(recipe.stage_training(stage.name)) for stage in planned]
    devices = {compute.device for compute in computes if compute.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        for stage, compute in zip(planned, computes, strict=True):
            if stage.distils:
                texts[stage.name] = _rehearse(stage, networks, recipe, data, compute)
    return texts


def create_stage_method(recipe: Recipe) -> Method:
    """The recipe's method, new."""
    options = dict(recipe.method)
    return create_method(options.pop("name"), **options)


def _rehearse(
    stage: Planned, networks: dict[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> str:
    settings = recipe.stage_training(stage.name)
    for name in (*stage.teachers, stage.name):
        if name not in networks:
            start = start_network(recipe, recipe.network(name), data.class_names, data.range)
            networks[name] = Classifier(start.module, start.architecture, data.class_names, start.input)
    if data.target is not None and recipe.domains.adapt_batch_norm:
        for name in (name for name in stage.teachers if role(name) == "teacher"):
            refuse_without_batch_norm(networks[name].module, f"{name} {networks[name].architecture}")
    student, method = networks[stage.name], create_stage_method(recipe)
    if method.needs.several and settings.batch_size < 2:
        raise UsageError(
            f"method {describe(recipe.method)} compares images with each other, and {stage.name} would see one at a "
            "time: set training.batch_size to 2 or more, or use kd"
        )
    images = _Images(data, student.input.size, settings, recipe.data.augment or data.augment, method, compute)
    distiller = join(
        stage,
        student,
        method,
        [networks[name] for name in stage.teachers],
        recipe=recipe,
        data=data,
        compute=compute,
        example=images.batch().images,
        label_loss=torch.nn.CrossEntropyLoss() if data.target is None else LabelLoss(),
    )
    try:
        _step(distiller, images, settings, compute)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):  # what torch's BatchNorm says
            raise UsageError(
                f"{stage.name} cannot learn from one image at a time: its BatchNorm needs several; "
                "set training.batch_size to 2 or more"
            ) from error
        raise
    text = layers_text(distiller, most=MOST_ROWS)
    settle(student, distiller)
    return text


def _step(distiller: Distiller, images: "_Images", settings: TrainingSettings, compute: Compute) -> None:
    """Forward in train mode and as on val; no gradient is taken.  A method that trains in stages is tried in both."""
    if distiller.method.needs.prepare:
        distiller.prepare(images.passes)
    batch, staged = images.batch(), distiller.method.staged
    with torch.no_grad(), compute.autocast():
        for epoch, training in ((0, True), *([(settings.epochs - 1, True)] if staged else []), (0, False)):
            distiller.start_epoch(epoch, settings.epochs)
            distiller.train(training)
            distiller(
                batch.images,
                batch.labels,
                index=batch.index,
                view=batch.view,
                second=batch.second if training else None,
                soft_labels=batch.soft_labels if training else None,
            )
            if not training or not staged:
                batch.labels = batch.labels.clamp(min=0)  # on val every image has a label
    distiller.method.refuse_idle_schedules()


class _Images:
    """Noise with the labels and ids of real training images."""

    def __init__(
        self,
        data: DataSplits,
        size: int,
        settings: TrainingSettings,
        augment: AugmentSettings,
        method: Method,
        compute: Compute,
    ) -> None:
        self.data, self.size, self.augment, self.needs, self.compute = data, size, augment, method.needs, compute
        self.count = settings.batch_size if self.needs.batch_size else min(settings.batch_size, IMAGES)

    def batch(self) -> Batch:
        """What the loader would give, as far as shapes and kinds go."""
        device, classes = self.compute.device, len(self.data.class_names)
        labels = np.asarray(self.data.train.labels)
        index = np.linspace(0, len(labels) - 1, self.count).astype(np.int64)  # of various classes
        chosen = torch.as_tensor(labels[index], dtype=torch.int64, device=device)
        shares = torch.nn.functional.one_hot(chosen, classes).float()
        if self.data.target is not None:
            chosen[:] = UNLABELED
        elif self.data.unlabeled is not None and (self.needs.teacher or self.needs.peers):
            chosen[-1] = UNLABELED
        return Batch(
            self._noise(),
            chosen,
            index=torch.as_tensor(index, device=device),
            view=torch.zeros(self.count, dtype=torch.int64, device=device),
            second=self._noise() if self.needs.second != "none" else None,
            soft_labels=0.7 * shares + 0.3 * shares.roll(1, dims=0) if self.augment.mixes else None,
        )

    def passes(self) -> Iterator[Batch]:
        """One pass over the training images, as a method with a preparation asks for."""
        batch = self.batch()
        batch.labels = batch.labels.clamp(min=0)
        yield batch

    def _noise(self) -> torch.Tensor:
        images = torch.randn(self.count, 3, self.size, self.size)
        return images.to(self.compute.device).to(memory_format=self.compute.memory_format)
