"""A client: it keeps its images, and replies to the server's requests with weights and counts.

A round's few epochs take the same steps as the trainer, without checkpoints and without a choice of the best epoch: a
client has no val split, and returns its weights after the last epoch.  A test compares both bit for bit.

Public images: the averaged logits of them by the clients' networks train a student, on the server.
Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020 (FedDF).
https://arxiv.org/abs/2006.07242
FedDF's code distils for up to ten thousand steps with early stopping; this makes a few passes over the public images,
each in one fixed view.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from potstill.config.recipe import Recipe
from potstill.contrib.federated.messages import (
    TEACHER_PREFIX,
    Arrays,
    ArraySpecs,
    Message,
    array_specs,
    arrays_to_state_dict,
    decode_classes,
    decode_network,
    decode_recipe,
    find_reply_problem,
    state_dict_to_arrays,
)
from potstill.data.image_sets import ImageSet
from potstill.data.loader import Loader
from potstill.distillation.distiller import Distiller
from potstill.distillation.teachers import TeacherViews
from potstill.errors import ArtifactError, NonFiniteError, UsageError
from potstill.evaluation.predictions import evaluation_mode
from potstill.experiment.builders import build_teacher_views
from potstill.experiment.plan import derive_seed
from potstill.experiment.preflight import create_stage_method
from potstill.input_spec import InputSpec
from potstill.methods import create_method, describe_method
from potstill.methods.kd import kd_loss
from potstill.models.model_file import Classifier
from potstill.training.devices import Compute, create_compute
from potstill.training.optim import GradientAccumulator, create_optimizer, lr_factor
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import LiveTeacher

ImageSource = Callable[[tuple[str, ...]], ImageSet]  # the server's classes -> a client's training images


class PublicDataset:
    """P unlabeled images of the server; ``seed``: of the order in which a student sees them."""

    def __init__(
        self, images: ImageSet, spec: InputSpec, settings: TrainingSettings, compute: Compute, seed: int
    ) -> None:
        self.compute, self.settings = compute, settings
        size = min(settings.batch_size, len(images))
        self.listed = Loader(images, spec, batch_size=settings.batch_size, device=compute.device)
        self.shuffled = Loader(images, spec, batch_size=size, order="shuffled", seed=seed, device=compute.device)

    def __len__(self) -> int:
        return self.listed.count

    def predict_logits(self, network: Classifier) -> NDArray[np.float32]:
        """Return the network's logits of every image, float32 ``[P, K]``."""
        module = network.module.to(self.compute.device)
        with evaluation_mode(module):
            logits = torch.cat([module(self._convert(batch.images)).float() for batch in self.listed.epoch()])
        found: NDArray[np.float32] = logits.cpu().numpy()
        return found

    def train_student(
        self, student: Classifier, logits: NDArray[np.float32], *, temperature: float, epochs: int, first: int
    ) -> float:
        """Train ``student`` in place towards ``logits`` by KL divergence alone, without labels.

        ``logits`` are [P, K], ``temperature`` of both sides is > 0; ``first`` is the number of the first pass.  Return
        the mean loss of the last pass; NonFiniteError: it is NaN or infinite.
        """
        module = student.module.to(self.compute.device).train()
        targets = torch.from_numpy(logits).to(self.compute.device)
        named = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        optimizer = create_optimizer(named, self.settings)
        total, images = torch.zeros((), device=self.compute.device), 1
        for epoch in range(first, first + epochs):
            total, images = torch.zeros((), device=self.compute.device), 0
            for batch in self.shuffled.epoch(epoch):
                assert batch.index is not None
                with self.compute.autocast():
                    outputs = module(self._convert(batch.images))
                loss = kd_loss(outputs, targets[batch.index], temperature=temperature)
                loss.backward()  # type: ignore[no-untyped-call]
                if self.settings.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), self.settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total, images = total + loss.detach() * len(batch), images + len(batch)
        if not torch.isfinite(total):
            raise NonFiniteError("the loss on the public images became NaN or infinite; lower training.lr")
        return float(total) / max(images, 1)

    def _convert(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.compute.memory_format)


def create_local_distiller(
    student: Classifier, teacher: Classifier | None, recipe: Recipe, compute: Compute, smoothing: float
) -> Distiller:
    """Return the student on labels alone, or guided by ``teacher`` with the recipe's method, if that trains no more."""
    method = create_stage_method(recipe) if teacher is not None else create_method("supervised")
    for network in (student, *([teacher] if teacher is not None else [])):
        network.module.to(compute.device).to(memory_format=compute.memory_format)
    needs = method.needs
    if needs.index or needs.prepare or needs.peers or needs.second != "none":
        raise _unsupported_method(recipe)
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
        raise _unsupported_method(recipe)
    return distiller


def check_method(recipe: Recipe, student: Classifier, teacher: Classifier, compute: Compute) -> None:
    """Check that the recipe's method can be used on clients; the networks are not changed."""
    create_local_distiller(copy.deepcopy(student), copy.deepcopy(teacher), recipe, compute, 0.0)


def train_locally(
    distiller: Distiller,
    loader: Loader,
    settings: TrainingSettings,
    compute: Compute,
    *,
    first: int,
    epochs: int,
    views: TeacherViews | None = None,
) -> float:
    """Train the distiller's student in place, with a new optimizer as in every round of FedAvg.

    ``settings.epochs`` are those of all rounds, the length of the schedule; ``epochs`` those of this round, which
    begins at epoch ``first``, from 0.  Return the mean loss of the last epoch; NonFiniteError: it is NaN or infinite.
    """
    named = distiller.trained_parameters()
    optimizer = create_optimizer(named, settings)
    gradients = GradientAccumulator(optimizer, [parameter for _, parameter in named])
    factor, before = lr_factor(settings, loader.steps), first * loader.steps
    schedule = LambdaLR(optimizer, lambda step: factor(before + step))
    total, teacher = torch.zeros(()), LiveTeacher(distiller, views, compute.autocast)
    for epoch in range(first, first + epochs):
        distiller.start_epoch(epoch, settings.epochs)
        teacher.start_epoch(epoch)
        distiller.train()
        total, images = torch.zeros((), device=compute.device), 0
        for batch in loader.epoch(epoch):
            prepared = replace(batch, images=batch.images.contiguous(memory_format=compute.memory_format))
            outputs = teacher(prepared)
            with compute.autocast():
                step = distiller(**vars(prepared), teacher=outputs)
            gradients.add(step)
            if settings.max_grad_norm is not None:
                gradients.clip(settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            total, images = total + step.loss.detach() * len(batch), images + len(batch)
        total = total / max(images, 1)
    if not torch.isfinite(total):
        raise NonFiniteError(
            "the loss of a client became NaN or infinite; lower training.lr, or set training.max_grad_norm"
        )
    return float(total)


def _unsupported_method(recipe: Recipe) -> UsageError:
    return UsageError(
        f"method {describe_method(recipe.method)} trains or keeps more than the student, which a client would lose "
        "after each round; guide clients with kd, dkd, dist or another method on logits"
    )


@dataclass
class _Work:
    recipe: Recipe
    settings: TrainingSettings
    compute: Compute
    loader: Loader
    teacher_loader: Callable[..., Loader]  # of the same views at a teacher's size

    @property
    def images(self) -> float:
        return float(len(self.loader.labels))


class Client:
    """Replies to requests; between two of them only ``memory`` must be kept, so each may run in its own process."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images
        self._work: tuple[dict[str, str], float, _Work] | None = None

    def reply(self, request: Message, memory: Arrays) -> Message:
        """Return the reply to a request; ``memory`` is kept between requests, changed in place, and never sent."""
        if request.task == "teacher":
            memory |= {name: each for name, each in request.arrays.items() if name.startswith(TEACHER_PREFIX)}
            return Message("teacher")
        tasks = {"describe": self._describe, "weights": self._train}
        if request.task not in tasks:
            raise UsageError(f"the server requests {request.task!r}, which this version of potstill does not know")
        work = self._prepare(request)
        # Seeds dropout, so that a repeated or resumed round gives the same weights.
        purpose = f"client {request.numbers['client']:g} at {request.numbers.get('first', 0):g}"
        torch.manual_seed(derive_seed(work.recipe.seed, purpose))
        return tasks[request.task](request, memory, work)

    # tasks

    def _describe(self, request: Message, memory: Arrays, work: _Work) -> Message:
        return Message(request.task, numbers={"images": work.images})

    def _train(self, request: Message, memory: Arrays, work: _Work) -> Message:
        student = decode_network(request, "student")
        student.module.load_state_dict(arrays_to_state_dict(request.arrays))
        loss = self._train_student(student, request, memory, work)
        arrays = state_dict_to_arrays(student.module.state_dict())
        reply = Message(request.task, arrays, {"images": work.images, "loss": loss})
        return _checked(reply, array_specs({name: request.arrays[name] for name in arrays}))

    def _train_student(self, student: Classifier, request: Message, memory: Arrays, work: _Work) -> float:
        guide = None
        if "teacher" in request.texts:
            guide = decode_network(request, "teacher")
            if not (state := arrays_to_state_dict(memory, TEACHER_PREFIX)):
                raise ArtifactError("this client has no teacher: it joined after the teacher was sent")
            guide.module.load_state_dict(state)
        distiller = create_local_distiller(student, guide, work.recipe, work.compute, work.settings.label_smoothing)
        first, epochs = int(request.numbers["first"]), int(request.numbers["epochs"])
        teachers, layout = [] if guide is None else [guide], work.compute.memory_format
        views = build_teacher_views(student.input, teachers, work.teacher_loader, layout)
        return train_locally(
            distiller, work.loader, work.settings, work.compute, first=first, epochs=epochs, views=views
        )

    def _prepare(self, request: Message) -> _Work:
        """Return the loaders, built once in this process for the same recipe."""
        number = request.numbers["client"]
        if self._work is None or self._work[:2] != (request.texts, number):
            recipe, student = decode_recipe(request), decode_network(request, "student")
            settings = recipe.stage_training("student")
            compute = create_compute(settings).for_training(student.module)
            images = self.images(decode_classes(request))
            make = partial(client_loader, images, student, recipe, settings, compute, int(number))
            loader = make()
            self._work = (request.texts, number, _Work(recipe, settings, compute, loader, make))
        return self._work[2]


def _checked(reply: Message, specs: ArraySpecs) -> Message:
    """Return the reply if it holds nothing but what a client may send, all of it finite."""
    problem = find_reply_problem(reply, specs)
    if problem == NonFiniteError.__name__:
        raise NonFiniteError("weights became NaN or infinite; lower training.lr")
    if problem is not None:
        raise UsageError(f"this client does not send its reply: {problem}")
    return reply


def client_loader(
    images: ImageSet,
    student: Classifier,
    recipe: Recipe,
    settings: TrainingSettings,
    compute: Compute,
    number: int,
    *,
    spec: InputSpec | None = None,
    drawn_for: InputSpec | None = None,
) -> Loader:
    """Return a client's augmented training images; order and augmentation differ from client to client."""
    return Loader(
        images,
        spec or student.input,
        batch_size=settings.batch_size,
        augment=recipe.data.augment,
        order="shuffled",
        seed=derive_seed(recipe.seed, f"client {number}/order"),
        workers=recipe.data.workers,
        device=compute.device,
        cache_fraction=recipe.data.cache_fraction,
        jpeg=recipe.data.cache == "jpeg",
        classes=len(student.class_names),
        view_seed=derive_seed(recipe.augmentation_seed, f"client {number}/views"),
        drawn_for=drawn_for,
    )
