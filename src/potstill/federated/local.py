"""A client's few epochs: the steps of the training loop, and nothing of what surrounds them.

``training.loop.Training`` keeps checkpoints and picks the best epoch by val; a client in a round has no val and hands
over what it has after its last epoch.  Step by step both do the same, which a test compares bit for bit.
"""

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from potstill.data.loader import Loader
from potstill.distiller import Distiller
from potstill.errors import NonFiniteError, UsageError
from potstill.experiments.method_settings import describe
from potstill.experiments.recipe import Recipe
from potstill.experiments.rehearsal import create_stage_method
from potstill.methods import create_method
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute
from potstill.training.gradients import Gradients
from potstill.training.optimizers import create_optimizer, lr_factor
from potstill.training.settings import TrainingSettings


def local_distiller(
    student: Classifier, teacher: Classifier | None, recipe: Recipe, compute: Compute, smoothing: float
) -> Distiller:
    """The student alone on labels, or guided by ``teacher`` with the recipe's method.

    Raises:
        UsageError: a method that trains or remembers more than the student, which no round would carry on.
    """
    method = create_stage_method(recipe) if teacher is not None else create_method("supervised")
    for network in (student, *([teacher] if teacher is not None else [])):
        network.module.to(compute.device).to(memory_format=compute.memory_format)
    needs = method.needs
    if needs.index or needs.prepare or needs.peers or needs.second != "none":
        raise _unfit(recipe)
    size = student.input.size
    distiller = Distiller(
        student.module,
        None if teacher is None else teacher.module,
        method,
        example=torch.zeros(2, 3, size, size, device=compute.device),
        student_input=None if teacher is None else student.input,
        teacher_input=None if teacher is None else teacher.input,
        label_loss=nn.CrossEntropyLoss(label_smoothing=smoothing),
    ).to(compute.device)
    own = all(name.startswith("student.") for name, _ in distiller.trained_parameters())
    if distiller.student is not student.module or not own:
        raise _unfit(recipe)
    return distiller


def refuse_unfit_method(recipe: Recipe, student: Classifier, teacher: Classifier, compute: Compute) -> None:
    """Whether clients could be guided with the recipe's method; the networks are left as they are.

    Raises:
        UsageError: they could not; says why.
    """
    local_distiller(copy.deepcopy(student), copy.deepcopy(teacher), recipe, compute, 0.0)


def train_locally(
    distiller: Distiller, loader: Loader, settings: TrainingSettings, compute: Compute, *, first: int, epochs: int
) -> float:
    """Train the distiller's student in place; a new optimizer, as in every round of FedAvg.

    Args:
        distiller: on the compute's device.
        loader: of the client's images.
        settings: ``epochs`` are those of all rounds together, over which the learning rate's schedule goes.
        compute: where, and in which precision.
        first: the epoch, from 0, at which this round begins; decides order, views and learning rate.
        epochs: of this round.

    Returns:
        The mean loss of the last epoch.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    named = distiller.trained_parameters()
    optimizer = create_optimizer(named, settings)
    gradients = Gradients(optimizer, [parameter for _, parameter in named])
    factor, before = lr_factor(settings, loader.steps), first * loader.steps
    schedule = LambdaLR(optimizer, lambda step: factor(before + step))
    total = torch.zeros(())
    for epoch in range(first, first + epochs):
        distiller.start_epoch(epoch, settings.epochs)
        distiller.train()
        total, images = torch.zeros((), device=compute.device), 0
        for batch in loader.epoch(epoch):
            shown = replace(batch, images=batch.images.contiguous(memory_format=compute.memory_format))
            with compute.autocast():
                step = distiller(
                    shown.images, shown.labels, index=shown.index, view=shown.view, soft_labels=shown.soft_labels
                )
            gradients.add(step)
            if settings.clip_norm is not None:
                gradients.clip(settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            total, images = total + step.loss.detach() * len(batch), images + len(batch)
        total = total / max(images, 1)
    if not torch.isfinite(total):
        raise NonFiniteError(
            "the loss of a client became NaN or infinite; lower training.lr, or set training.clip_norm"
        )
    return float(total)


def _unfit(recipe: Recipe) -> UsageError:
    return UsageError(
        f"method {describe(recipe.method)} trains or remembers more than the student, which a client would begin anew "
        "in each round; guide clients with kd, dkd, dist or another method of logits"
    )
