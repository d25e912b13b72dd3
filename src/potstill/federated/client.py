"""A client: its images stay here; it answers messages with weights, logits and counts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from potstill.data.images import ImageSet
from potstill.data.loader import Loader
from potstill.errors import ArtifactError, UsageError
from potstill.experiments.recipe import Recipe
from potstill.experiments.seeds import derive
from potstill.federated.distilling import Public
from potstill.federated.local import local_distiller, train_locally
from potstill.federated.messages import LOGITS, STATE, TEACHER, Arrays, Message, as_arrays, as_state, check_reply
from potstill.federated.orders import classes_of, network_of, recipe_of
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute, choose
from potstill.training.settings import TrainingSettings

_OWN = "own/"  # in memory: the network of a client that never sends it


@dataclass
class _Work:
    """What a client has made of the server's recipe."""

    recipe: Recipe
    settings: TrainingSettings
    compute: Compute
    loader: Loader
    public: Public | None


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
        self._work: tuple[dict[str, str], float, _Work] | None = None

    def answer(self, message: Message, memory: Arrays) -> Message:
        """Do what the message asks for.

        Args:
            message: of the server.
            memory: arrays that this client keeps between messages; changed in place, never sent.

        Raises:
            PotstillError: what a person at this client can mend; the server hears of its kind only.
        """
        if message.task == "teach":
            memory |= {name: each for name, each in message.arrays.items() if name.startswith(TEACHER)}
            return Message("teach")
        work = self._prepare(message)
        if message.task == "hello":
            return Message("hello", numbers=self._counts(work))
        tasks = {"train": self._train, "answer": self._answer}
        if message.task not in tasks:
            raise UsageError(f"the server asks for {message.task!r}, which this potstill does not know")
        # Dropout too is the same for whoever repeats this.
        torch.manual_seed(
            derive(work.recipe.seed, f"client {message.numbers['client']:g} at {message.numbers['first']:g}")
        )
        return tasks[message.task](message, memory, work)

    # what it can be asked for

    def _train(self, message: Message, memory: Arrays, work: _Work) -> Message:
        """Begin with the server's weights, and send back what has become of them."""
        student = network_of(message, "student")
        student.module.load_state_dict(as_state(message.arrays))
        loss = self._train_student(student, message, memory, work)
        state = student.module.state_dict()
        reply = Message("train", as_arrays(state), {**self._counts(work), "loss": loss})
        return check_reply(reply, state=state)

    def _answer(self, message: Message, memory: Arrays, work: _Work) -> Message:
        """Go on with the own network: learn what all have said, train on labels, and say something of each image."""
        if work.public is None:
            raise UsageError("the server asks for logits of public images, and this client has none: name their folder")
        student = network_of(message, "student")
        own = as_state(memory, _OWN)
        # Before the first round, the weights that the server begins with.
        student.module.load_state_dict(own or as_state(message.arrays))
        first, numbers = int(message.numbers["first"]), message.numbers
        if LOGITS in message.arrays:
            work.public.teach(
                student,
                message.arrays[LOGITS],
                temperature=numbers["temperature"],
                epochs=int(numbers["public_epochs"]),
                first=first,
            )
        loss = self._train_student(student, message, memory, work)
        memory |= as_arrays(student.module.state_dict(), _OWN)
        logits = work.public.ask(student)
        reply = Message("answer", {LOGITS: logits}, {**self._counts(work), "loss": loss})
        return check_reply(reply, state={}, logits=(len(work.public), len(student.class_names)))

    def _train_student(self, student: Classifier, message: Message, memory: Arrays, work: _Work) -> float:
        distiller = local_distiller(
            student, _guide(message, memory), work.recipe, work.compute, work.settings.label_smoothing
        )
        first, epochs = int(message.numbers["first"]), int(message.numbers["epochs"])
        return train_locally(distiller, work.loader, work.settings, work.compute, first=first, epochs=epochs)

    # what it works with

    def _prepare(self, message: Message) -> _Work:
        """The loaders, made once for as long as this process lives."""
        number = message.numbers["client"]
        if self._work is None or self._work[:2] != (message.texts, number):
            self._work = (message.texts, number, self._made(message, int(number)))
        return self._work[2]

    def _made(self, message: Message, number: int) -> _Work:
        recipe, student = recipe_of(message), network_of(message, "student")
        settings = recipe.stage_training("student")
        compute = choose(settings)
        images = self.images(classes_of(message))
        loader = client_loader(images, student, recipe, settings, compute, number)
        public = None
        if self.public is not None:
            seed = derive(recipe.seed, "public/order")
            public = Public(self.public(), student.input, settings, compute, seed)
        return _Work(recipe, settings, compute, loader, public)

    def _counts(self, work: _Work) -> dict[str, float]:
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
        seed=derive(recipe.seed, f"client {number}/order"),
        workers=recipe.data.workers,
        device=compute.device,
        memory_share=recipe.data.memory_share,
        classes=len(student.class_names),
        view_seed=derive(recipe.augmentation_seed, f"client {number}/views"),
    )


def _guide(message: Message, memory: Arrays) -> Classifier | None:
    guide = message.texts.get("guide", "none")
    if guide == "none":
        return None
    network = network_of(message, "teacher" if guide == "teacher" else "student")
    arrays = memory if guide == "teacher" else message.arrays
    state = as_state(arrays, TEACHER if guide == "teacher" else STATE)
    if not state:
        raise ArtifactError("this client has not got the teacher: it joined after the teacher was sent")
    network.module.load_state_dict(state)
    return network


def known_logits(reply: Message) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """The logits [P, K] of a reply."""
    return np.asarray(reply.arrays[LOGITS], dtype=np.float32)
