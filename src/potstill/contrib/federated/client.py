"""A client: its images stay here; it replies to messages with weights, logits and counts.

Its few epochs are the steps of the training loop, without its checkpoints and its choice of the best epoch by val: a
client in a round has no val and returns its weights after the last epoch.  Step by step both do the same, which a test
compares bit for bit.

Public images: the clients' averaged logits on them train a student.
Lin and others, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020 (FedDF: the server
runs the clients' networks).  https://arxiv.org/abs/2006.07242
Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019 (clients run their own, and send
logits).  https://arxiv.org/abs/1910.03581
Unlike FedDF's code, which distils for up to ten thousand steps with early stopping, this makes a few passes over the
public images, each in one fixed view, so that the same logits serve both ways.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from potstill.config.method_settings import describe_method
from potstill.config.recipe import Recipe
from potstill.contrib.federated.messages import (
    LOGITS,
    STATE_PREFIX,
    TEACHER_PREFIX,
    Arrays,
    Message,
    arrays_to_state_dict,
    check_reply,
    decode_classes,
    decode_network,
    decode_recipe,
    state_dict_to_arrays,
)
from potstill.data.image_sets import ImageSet
from potstill.data.loader import Loader
from potstill.distillation.distiller import Distiller
from potstill.errors import ArtifactError, NonFiniteError, UsageError
from potstill.evaluation.predictions import evaluation_mode
from potstill.experiment.plan import derive_seed
from potstill.experiment.preflight import create_stage_method
from potstill.functional import kd_loss
from potstill.input_spec import InputSpec
from potstill.methods import create_method
from potstill.models.model_file import Classifier
from potstill.training.devices import Compute, create_compute
from potstill.training.optim import GradientAccumulator, create_optimizer, lr_factor
from potstill.training.settings import TrainingSettings


class PublicDataset:
    """Images that nobody labels, of which server and clients have the same copy.

    Args:
        images: P of them; their labels are never looked at.
        spec: how the networks want them.
        settings: of the batches.
        compute: where they are wanted.
        seed: of the order in which a student sees them.
    """

    def __init__(
        self, images: ImageSet, spec: InputSpec, settings: TrainingSettings, compute: Compute, seed: int
    ) -> None:
        self.compute, self.settings = compute, settings
        size = min(settings.batch_size, len(images))
        self.listed = Loader(images, spec, batch_size=settings.batch_size, device=compute.device)
        self.shuffled = Loader(images, spec, batch_size=size, order="shuffled", seed=seed, device=compute.device)

    def __len__(self) -> int:
        return self.listed.count

    def ask(self, network: Classifier) -> NDArray[np.float32]:
        """What a network says of every image: logits [P, K]."""
        module = network.module.to(self.compute.device)
        with evaluation_mode(module):
            logits = torch.cat([module(self._laid_out(batch.images)).float() for batch in self.listed.epoch()])
        found: NDArray[np.float32] = logits.cpu().numpy()
        return found

    def train_student(
        self, student: Classifier, logits: NDArray[np.float32], *, temperature: float, epochs: int, first: int
    ) -> float:
        """Train ``student`` in place towards ``logits`` [P, K], by KL divergence alone: no label is used.

        Args:
            student: of the classes of the logits.
            logits: the average.
            temperature: T of both sides.
            epochs: passes over the images.
            first: number of the first pass; decides the order.

        Returns:
            The mean loss of the last pass.

        Raises:
            NonFiniteError: it is NaN or infinite.
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
                    answers = module(self._laid_out(batch.images))
                loss = kd_loss(answers, targets[batch.index], temperature=temperature)
                loss.backward()  # type: ignore[no-untyped-call]
                if self.settings.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), self.settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total, images = total + loss.detach() * len(batch), images + len(batch)
        if not torch.isfinite(total):
            raise NonFiniteError("the loss on the public images became NaN or infinite; lower training.lr")
        return float(total) / max(images, 1)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.compute.memory_format)


def create_local_distiller(
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
    """Whether clients could be guided with the recipe's method; the networks are left as they are.

    Raises:
        UsageError: they could not; says why.
    """
    create_local_distiller(copy.deepcopy(student), copy.deepcopy(teacher), recipe, compute, 0.0)


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
    gradients = GradientAccumulator(optimizer, [parameter for _, parameter in named])
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
        f"method {describe_method(recipe.method)} trains or remembers more than the student, which a client "
        "would begin anew "
        "in each round; guide clients with kd, dkd, dist or another method of logits"
    )


_OWN_PREFIX = "own/"  # in memory: the network of a client that never sends it


@dataclass
class _ClientContext:
    """What a client has made of the server's recipe."""

    recipe: Recipe
    settings: TrainingSettings
    compute: Compute
    loader: Loader
    public: PublicDataset | None


class Client:
    """``client.answer(message, memory)``; between two messages it may be another process, but for ``memory``.

    Args:
        images: the server's classes -> this client's training images.
        public: the unlabeled images of which everybody has a copy; None: there are none here.
    """

    def __init__(
        self, images: Callable[[tuple[str, ...]], ImageSet], public: Callable[[], ImageSet] | None = None
    ) -> None:
        self.images, self.public = images, public
        self._work: tuple[dict[str, str], float, _ClientContext] | None = None

    def answer(self, message: Message, memory: Arrays) -> Message:
        """Do what the message asks for.

        Args:
            message: of the server.
            memory: arrays that this client keeps between messages; changed in place, never sent.

        Raises:
            PotstillError: what a person at this client can mend; the server hears of its kind only.
        """
        if message.task == "teach":
            memory |= {name: each for name, each in message.arrays.items() if name.startswith(TEACHER_PREFIX)}
            return Message("teach")
        work = self._prepare(message)
        if message.task == "hello":
            return Message("hello", numbers=self._counts(work))
        tasks = {"train": self._train, "answer": self._answer}
        if message.task not in tasks:
            raise UsageError(f"the server asks for {message.task!r}, which this potstill does not know")
        # Dropout too is the same for whoever repeats this.
        torch.manual_seed(
            derive_seed(work.recipe.seed, f"client {message.numbers['client']:g} at {message.numbers['first']:g}")
        )
        return tasks[message.task](message, memory, work)

    # what it can be asked for

    def _train(self, message: Message, memory: Arrays, work: _ClientContext) -> Message:
        """Begin with the server's weights, and send back what has become of them."""
        student = decode_network(message, "student")
        student.module.load_state_dict(arrays_to_state_dict(message.arrays))
        loss = self._train_student(student, message, memory, work)
        state = student.module.state_dict()
        reply = Message("train", state_dict_to_arrays(state), {**self._counts(work), "loss": loss})
        return check_reply(reply, state=state)

    def _answer(self, message: Message, memory: Arrays, work: _ClientContext) -> Message:
        """Go on with the own network: learn what all have said, train on labels, and say something of each image."""
        if work.public is None:
            raise UsageError("the server asks for logits of public images, and this client has none: name their folder")
        student = decode_network(message, "student")
        own = arrays_to_state_dict(memory, _OWN_PREFIX)
        # Before the first round, the weights that the server begins with.
        student.module.load_state_dict(own or arrays_to_state_dict(message.arrays))
        first, numbers = int(message.numbers["first"]), message.numbers
        if LOGITS in message.arrays:
            work.public.train_student(
                student,
                message.arrays[LOGITS],
                temperature=numbers["temperature"],
                epochs=int(numbers["public_epochs"]),
                first=first,
            )
        loss = self._train_student(student, message, memory, work)
        memory |= state_dict_to_arrays(student.module.state_dict(), _OWN_PREFIX)
        logits = work.public.ask(student)
        reply = Message("answer", {LOGITS: logits}, {**self._counts(work), "loss": loss})
        return check_reply(reply, state={}, logits=(len(work.public), len(student.class_names)))

    def _train_student(self, student: Classifier, message: Message, memory: Arrays, work: _ClientContext) -> float:
        distiller = create_local_distiller(
            student, _load_guide(message, memory), work.recipe, work.compute, work.settings.label_smoothing
        )
        first, epochs = int(message.numbers["first"]), int(message.numbers["epochs"])
        return train_locally(distiller, work.loader, work.settings, work.compute, first=first, epochs=epochs)

    # what it works with

    def _prepare(self, message: Message) -> _ClientContext:
        """The loaders, made once for as long as this process lives."""
        number = message.numbers["client"]
        if self._work is None or self._work[:2] != (message.texts, number):
            self._work = (message.texts, number, self._made(message, int(number)))
        return self._work[2]

    def _made(self, message: Message, number: int) -> _ClientContext:
        recipe, student = decode_recipe(message), decode_network(message, "student")
        settings = recipe.stage_training("student")
        compute = create_compute(settings)
        images = self.images(decode_classes(message))
        loader = client_loader(images, student, recipe, settings, compute, number)
        public = None
        if self.public is not None:
            seed = derive_seed(recipe.seed, "public/order")
            public = PublicDataset(self.public(), student.input, settings, compute, seed)
        return _ClientContext(recipe, settings, compute, loader, public)

    def _counts(self, work: _ClientContext) -> dict[str, float]:
        public = {} if work.public is None else {"public": float(len(work.public))}
        return {"images": float(len(work.loader.labels)), **public}


def client_loader(
    images: ImageSet, student: Classifier, recipe: Recipe, settings: TrainingSettings, compute: Compute, number: int
) -> Loader:
    """A client's augmented training images; each client has its own order and its own views."""
    return Loader(
        images,
        student.input,
        batch_size=settings.batch_size,
        augment=recipe.data.augment,
        order="shuffled",
        seed=derive_seed(recipe.seed, f"client {number}/order"),
        workers=recipe.data.workers,
        device=compute.device,
        cache_fraction=recipe.data.cache_fraction,
        classes=len(student.class_names),
        view_seed=derive_seed(recipe.augmentation_seed, f"client {number}/views"),
    )


def _load_guide(message: Message, memory: Arrays) -> Classifier | None:
    guide = message.texts.get("guide", "none")
    if guide == "none":
        return None
    network = decode_network(message, "teacher" if guide == "teacher" else "student")
    arrays = memory if guide == "teacher" else message.arrays
    state = arrays_to_state_dict(arrays, TEACHER_PREFIX if guide == "teacher" else STATE_PREFIX)
    if not state:
        raise ArtifactError("this client has not got the teacher: it joined after the teacher was sent")
    network.module.load_state_dict(state)
    return network


def reply_logits(reply: Message) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """The logits [P, K] of a reply."""
    return np.asarray(reply.arrays[LOGITS], dtype=np.float32)
