"""From a recipe to a folder of students, rounds and traffic: one machine plays server and clients."""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.data.datasets import load_data
from potstill.data.images import ImageSet
from potstill.data.native_noise import silenced
from potstill.data.splits import DataSplits
from potstill.errors import UsageError
from potstill.experiments.environment import describe_environment
from potstill.experiments.loaders import split_loader
from potstill.experiments.preflight import skipped_text
from potstill.experiments.recipe import Recipe, dump_recipe
from potstill.experiments.run_folder import RunFolder
from potstill.experiments.seeds import derive
from potstill.experiments.start import start_network
from potstill.federated.algorithms import ALGORITHMS, Algorithm
from potstill.federated.baselines import BASELINES
from potstill.federated.client import Client
from potstill.federated.distilling import Public
from potstill.federated.fitness import refuse_unfit
from potstill.federated.kept import Kept
from potstill.federated.local import refuse_unfit_method
from potstill.federated.partition import Partition
from potstill.federated.places import sources_of, with_public
from potstill.federated.record import FILE, Federated, described, mean_of
from potstill.federated.rounds import Schedule, Server
from potstill.federated.simulated import Engine, refuse_without_flower, simulate
from potstill.federated.transport import Clients, InProcess
from potstill.models.classifier import Classifier
from potstill.models.model_file import save_model
from potstill.training.devices import Compute, choose
from potstill.training.observer import Observer, Silent

ALONE, CENTRAL = BASELINES


@dataclass(frozen=True)
class Wishes:
    """What a federated run is asked for besides its recipe."""

    clients: int | None = 5
    partition: Partition = field(default_factory=lambda: Partition(0.3))
    algorithms: tuple[str, ...] = ("fedavg", "feddf")
    baselines: tuple[str, ...] = ()
    public: float = 0.2  # share of the training images that become public; where data.unlabeled names none
    schedule: Schedule = field(default_factory=Schedule)

    def as_dict(self) -> dict[str, Any]:
        """For federated.json."""
        lists = {"algorithms": list(self.algorithms), "baselines": list(self.baselines)}
        return asdict(self) | lists | {"partition": str(self.partition)}


def federate(
    recipe: Recipe,
    wishes: Wishes,
    *,
    root: Path = Path("runs"),
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data: DataSplits | None = None,
    observer: Observer | None = None,
    clients: Clients | None = None,
    engine: Engine = "process",
) -> Path:
    """Train by every algorithm that is wished for, on the same clients; returns the folder.

    Args:
        recipe: checked settings; its epochs are not looked at.
        wishes: clients, algorithms and rounds.
        root: where run folders stand.
        name: of this one; the recipe's with ``-federated`` where None.
        resume: go on after the last round that was finished.
        overwrite: delete an existing folder of this name first.
        data: in place of ``recipe.data.source``.
        observer: is told what happens.
        clients: that are elsewhere, with images of their own; None: this machine plays them as ``wishes`` says.
        engine: who plays them: "process", this process, one after the other; "flower", Flower's simulation.

    Raises:
        PotstillError: anything that a user can mend.
    """
    refuse_unfit(recipe, wishes.algorithms)
    if engine == "flower":
        refuse_without_flower()
        if resume:
            raise UsageError(
                "--resume goes on with --engine process only: Flower forgets what clients keep for themselves"
            )
    observer = observer or Silent()
    name = f"{recipe.name[:54]}-federated" if name is None else name
    with RunFolder.create(root, name, resume=resume, overwrite=overwrite) as folder:
        with silenced():
            data = load_data(recipe.data, data, progress=observer)
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"augment": recipe.data.augment or data.augment})}
        )
        compute = choose(recipe.stage_training("student"))
        told = wishes.as_dict() | {"seed": recipe.seed}
        record = Federated.opened(folder.path / FILE, told, data.fingerprint, resume=resume)
        whole = _Federation(recipe, wishes, data, compute, observer, clients)
        if overwrite:
            folder.clear()
        text = dump_recipe(recipe)
        if resume and folder.read_recipe() != text:
            raise UsageError(
                f"--resume goes on with the same recipe, and {folder.recipe} is another: use another --name"
            )
        folder.write_recipe(text)
        folder.write_environment(describe_environment(recipe, text, data.fingerprint, compute))
        folder.write_splits(whole.data.as_rows())
        folder.write_skipped((each.path, each.kind, each.reason) for each in data.all_skipped)
        if data.all_skipped:
            observer.warn(skipped_text(data.all_skipped))
        record.found |= whole.facts()
        record.write()
        whole.carry_out(folder, record, engine)
    return folder.path


class _Federation:
    """The server; and the clients, where they are in this process."""

    def __init__(
        self,
        recipe: Recipe,
        wishes: Wishes,
        data: DataSplits,
        compute: Compute,
        observer: Observer,
        elsewhere: Clients | None,
    ) -> None:
        self.recipe, self.wishes, self.compute, self.observer = recipe, wishes, compute, observer
        self.settings, self.elsewhere = recipe.stage_training("student"), elsewhere
        needed = any(ALGORITHMS[each].public for each in wishes.algorithms)
        if wishes.partition.folders is not None and CENTRAL in wishes.baselines:
            raise UsageError("--baselines central: the images of --partition folders:DIR stand in different places")
        self.data, self.public_images = with_public(data, wishes.public if needed else 0.0, recipe.seed)
        self.clients: dict[int, Client] = {}
        if elsewhere is None:
            images = self.public_images
            public = None if images is None else partial(_given, images)
            self.clients = {
                each: Client(own, public)
                for each, own in enumerate(sources_of(self.data.train, wishes.partition, wishes.clients, recipe.seed))
            }

    def facts(self) -> dict[str, Any]:
        """Who has how many images; of clients in this process, of which class."""
        everybody = self.elsewhere or InProcess(self.clients)
        # All are put together, so that what the last one lacks is said before the first one trains.
        servers = {name: self._server(ALGORITHMS[name], everybody) for name in self.wishes.algorithms}
        wanted = [name for name in servers if ALGORITHMS[name].sends == "logits"]
        counts, failed = servers[(wanted or self.wishes.algorithms)[0]].greet()
        for number, why in failed.items():
            self.observer.warn(f"client {number} cannot take part ({why}); its own log says why")
        classes, found = self.data.class_names, []
        for number, count in counts.items():
            facts: dict[str, Any] = {"client": number, "images": count}
            if number in self.clients:
                by_class = np.bincount(self.clients[number].images(classes).labels, minlength=len(classes)).tolist()
                facts["classes"] = dict(zip(classes, by_class, strict=True))
            found.append(facts)
        public = 0 if self.public_images is None else len(self.public_images)
        return {"recipe": self.recipe.name, "clients": found, "public": public, "test": len(self.data.test)}

    def carry_out(self, folder: RunFolder, record: Federated, engine: Engine) -> None:
        """Every algorithm, then every baseline."""

        def algorithms(clients: Clients | None) -> None:
            for name in self.wishes.algorithms:
                # Clients of this process forget what they keep for themselves from algorithm to algorithm.
                self._one(name, ALGORITHMS[name], clients or InProcess(self.clients), folder.path / name, record)

        if engine == "flower":
            simulate(self.clients, algorithms)
        else:
            algorithms(self.elsewhere)
        if CENTRAL in self.wishes.baselines:
            one = InProcess({0: Client(lambda classes: self.data.train)})
            self._one(CENTRAL, ALGORITHMS["fedavg"], one, folder.path / CENTRAL, record)
        if ALONE in self.wishes.baselines:
            for number, client in self.clients.items():
                where = f"{ALONE}-{number}"
                self._one(where, ALGORITHMS["fedavg"], InProcess({number: client}), folder.path / where, record)
            alone = [record.trained[f"{ALONE}-{number}"] for number in self.clients]
            record.found[ALONE] = mean_of([each["test"]["top1"] for each in alone])
            record.write()

    def _one(self, name: str, algorithm: Algorithm, clients: Clients, folder: Path, record: Federated) -> None:
        if name in record.trained:
            self.observer.note(f"{name}: already trained")
            return
        started = time.monotonic()
        self.observer.stage(name, algorithm.summary if name in ALGORITHMS else BASELINES[name.partition("-")[0]])
        server = self._server(algorithm, clients)
        memories = clients.memories if isinstance(clients, InProcess) else {}
        kept = Kept(folder / "rounds.checkpoint", memories)
        progress = server.carry_out(self.observer, kept.read(), kept.write)
        best = progress.records[progress.best - 1]
        student = server.student
        student.facts |= {
            "stage": name,
            "federated": self.wishes.as_dict(),
            "seed": self.recipe.seed,
            "val": best["val"],
        }
        save_model(student, folder)
        test = server.evaluate(split_loader(self.data, "test", student.input, self.recipe, self.settings, self.compute))
        record.add(name, described(progress, test))
        kept.remove()
        self.observer.stage_end(name, time.monotonic() - started)

    def _server(self, algorithm: Algorithm, clients: Clients) -> Server:
        recipe, classes = self.recipe, self.data.class_names
        torch.manual_seed(derive(recipe.seed, "student"))  # as the student of `potstill run` begins
        start = start_network(recipe, recipe.student, classes, self.data.range)
        student = Classifier(start.module, start.architecture, classes, start.input)
        teacher = public = None
        if algorithm.guide == "teacher":
            teacher = ready_teacher(recipe, classes)
        if algorithm.guide != "none":
            refuse_unfit_method(recipe, student, teacher or student, self.compute)
        if algorithm.public and self.public_images is not None:
            seed = derive(recipe.seed, "public/order")
            public = Public(self.public_images, student.input, self.settings, self.compute, seed)
        val = split_loader(self.data, "val", student.input, recipe, self.settings, self.compute)
        return Server(
            algorithm, student, recipe, self.wishes.schedule, clients, val, self.compute, public=public, teacher=teacher
        )


def ready_teacher(recipe: Recipe, classes: tuple[str, ...]) -> Classifier:
    """The recipe's teacher, with the weights that it comes with.

    Raises:
        UsageError: it has not been trained for these classes.
        ArtifactError: it knows other ones.
    """
    network = recipe.each_teacher[0]
    start = start_network(recipe, network, classes)
    if not start.ready:
        raise UsageError("guided: the server's teacher must know these classes already: --teacher RUN")
    return Classifier(start.module, start.architecture, classes, start.input)


def _given(images: ImageSet) -> ImageSet:
    return images
