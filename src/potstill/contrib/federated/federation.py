"""From a recipe to a folder of students, rounds and traffic: one machine plays server and clients.

With the engine "flower", Flower's own simulation runs every client in a worker process of Ray (needs the extra
``federated``).  The weights are those of ``InProcessClients``; what is gained is that clients work at the same time,
and that messages take the way they take between machines.

``federated.json`` holds the images of each client, and each algorithm's rounds, metrics and traffic.
"""

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from potstill.config.recipe import Recipe, dump_recipe
from potstill.contrib.federated.algorithms import ALGORITHMS, BASELINES, Algorithm, check_recipe
from potstill.contrib.federated.client import Client, PublicDataset, check_method
from potstill.contrib.federated.partition import Partition, client_image_sources, split_public_images
from potstill.contrib.federated.server import (
    Clients,
    InProcessClients,
    RoundCheckpoint,
    Schedule,
    Server,
    ServerState,
    wait_for_clients,
)
from potstill.data.datasets import load_data
from potstill.data.image_sets import ImageSet
from potstill.data.library_warnings import silence_native_stderr
from potstill.data.splits import DataSplits
from potstill.errors import UsageError, WorkerError, did_you_mean
from potstill.experiment.builders import build_network, split_loader
from potstill.experiment.environment import describe_environment
from potstill.experiment.plan import derive_seed
from potstill.experiment.preflight import describe_skipped
from potstill.experiment.run_folder import RunFolder
from potstill.io import read_checksummed_json, write_checksummed_json
from potstill.models.model_file import Classifier, save_model
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute, create_compute

Engine = Literal["process", "flower"]
ENGINES: tuple[Engine, ...] = ("process", "flower")
INSTALL_COMMAND = "pip install 'potstill[federated]'"


def parse_engine(text: str) -> Engine:
    """``process`` or ``flower``.

    Raises:
        UsageError: anything else; names what is near.
    """
    for known in ENGINES:
        if text == known:
            return known
    raise UsageError(f"--engine is {' or '.join(ENGINES)}, got {text!r}{did_you_mean(text, ENGINES)}")


def check_flower_installed() -> None:
    """Whether the simulation can be started at all.

    Raises:
        UsageError: Flower or Ray is not installed; says how to install them.
    """
    missing = [name for name in ("flwr", "ray") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--engine flower needs Flower and Ray, and there is no {' and no '.join(missing)}: {INSTALL_COMMAND}"
        )


def simulate(clients: Mapping[int, Client], work: Callable[[Clients], None], timeout: float = 3600.0) -> None:
    """Do ``work`` with clients that live in Flower's simulation; returns when it is done.

    Args:
        clients: by number from 0; copied to the workers.
        work: receives the same clients, behind Flower's messages.
        timeout: seconds to wait for the answers of a round.

    Raises:
        WorkerError: the simulation has ended before the work.
        PotstillError: whatever ``work`` raises.
    """
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")  # nothing is sent anywhere unless somebody wants it; and Ray warns less

    from flwr.app import Context
    from flwr.app import Message as Envelope
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from potstill.contrib.federated.flower_clients import GridClients, handle_message

    server, client = ServerApp(), ClientApp()
    failed: list[BaseException] = []
    done: list[bool] = []

    def serve(grid: Grid, context: Context) -> None:
        try:
            here = GridClients(grid, timeout)
            wait_for_clients(here, len(clients), timeout)
            work(here)
            done.append(True)
        except BaseException as error:
            failed.append(error)  # Flower would print a traceback

    def respond(envelope: Envelope, context: Context) -> Envelope:
        # Flower numbers its nodes at random; who a message is for stands in it.
        return handle_message(envelope, context, lambda message: clients[int(message.numbers["client"])])

    server.main()(serve)
    client.train()(respond)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=len(clients),
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR},
            },
        )
    except RuntimeError as error:
        if not failed:
            raise WorkerError(f"Flower's simulation has ended early: {error}") from error
    if failed:
        raise failed[0]
    if not done:
        raise WorkerError("Flower's simulation has ended before the rounds were done; its log says why")


RESULTS_FILE = "federated.json"
RESULTS_SCHEMA = 1


@dataclass
class FederatedResults:
    """What stands in the file; it is written anew after each algorithm."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path, wishes: dict[str, Any], fingerprint: str, *, resume: bool) -> "FederatedResults":
        """A new record, or with ``resume`` the one that is there.

        Raises:
            UsageError: the run that is to be gone on with was asked for something else.
            ArtifactError: it is damaged.
        """
        asked = {"schema": RESULTS_SCHEMA, "wishes": wishes, "data": fingerprint}
        if not (resume and path.exists()):
            return cls(path, {**asked, "trained": {}})
        record = cls(path, read_checksummed_json(path))
        old, wishes = _flatten_options(record.found.get("wishes", {})), _flatten_options(wishes)
        differ = [f"{key} was {old.get(key)} and is {new}" for key, new in wishes.items() if old.get(key) != new]
        if record.found.get("data") != fingerprint:
            differ.append("the images are others")
        if differ:
            raise UsageError(f"--resume goes on with the same run, but {'; '.join(differ)}: use another --name")
        return record

    @property
    def trained(self) -> dict[str, Any]:
        """Algorithm or baseline -> what came of it."""
        found: dict[str, Any] = self.found["trained"]
        return found

    def add(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what came of one algorithm."""
        self.trained[name] = facts
        self.write()

    def write(self) -> None:
        """Put it on disk.

        Raises:
            StorageError: it could not be written.
        """
        write_checksummed_json(self.path, self.found)


def _flatten_options(wishes: dict[str, Any]) -> dict[str, Any]:
    """The schedule's entries beside the others, so that a difference is named by itself."""
    return {key: each for key, each in wishes.items() if key != "schedule"} | dict(wishes.get("schedule", {}))


def summarize_rounds(progress: ServerState, test: dict[str, float]) -> dict[str, Any]:
    """One algorithm's entry: its rounds, the best one's figures, and bytes per round (mean of all rounds)."""
    rounds = progress.records
    return {
        "best_round": progress.best,
        "val": rounds[progress.best - 1]["val"],
        "test": test,
        "bytes_per_round": {way: sum(each[f"bytes_{way}"] for each in rounds) // len(rounds) for way in ("down", "up")},
        "bytes": sum(each["bytes_down"] + each["bytes_up"] for each in rounds),
        "seconds": round(sum(each["seconds"] for each in rounds), 3),
        "rounds": rounds,
    }


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample deviation and number of test top-1 figures.

    Example:
        >>> mean_and_deviation([0.5, 0.7])["mean"]
        0.6
    """
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": spread, "n": float(len(values))}


def format_table(found: dict[str, Any]) -> list[str]:
    """For people: one line for each algorithm and baseline."""
    rows = [("", "test top-1", "best round", "down/round", "up/round", "in all")]
    for name, entry in found["trained"].items():
        if name.startswith("alone-"):
            continue
        traffic = entry["bytes_per_round"]
        sizes = [_megabytes(each) for each in (traffic["down"], traffic["up"], entry["bytes"])]
        rows.append(
            (
                name,
                f"{entry['test']['top1']:.1%}",
                str(entry["best_round"]),
                *(["-"] * 3 if name == "central" else sizes),
            )
        )
    if "alone" in found:
        alone = found["alone"]
        rows.append(("alone", f"{alone['mean']:.1%}", f"mean of {alone['n']:.0f}", "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


ALONE_BASELINE, CENTRAL_BASELINE = BASELINES


@dataclass(frozen=True)
class FederationOptions:
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
    wishes: FederationOptions,
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
    check_recipe(recipe, wishes.algorithms)
    if engine == "flower":
        check_flower_installed()
        if resume:
            raise UsageError(
                "--resume goes on with --engine process only: Flower forgets what clients keep for themselves"
            )
    observer = observer or SilentObserver()
    name = f"{recipe.name[:54]}-federated" if name is None else name
    with RunFolder.create(root, name, resume=resume, overwrite=overwrite) as folder:
        with silence_native_stderr():
            data = load_data(recipe.data, data, progress=observer)
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"augment": recipe.data.augment or data.augment})}
        )
        compute = create_compute(recipe.stage_training("student"))
        told = wishes.as_dict() | {"seed": recipe.seed}
        record = FederatedResults.opened(folder.path / RESULTS_FILE, told, data.fingerprint, resume=resume)
        whole = _FederatedRun(recipe, wishes, data, compute, observer, clients)
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
            observer.warn(describe_skipped(data.all_skipped))
        record.found |= whole.facts()
        record.write()
        whole.carry_out(folder, record, engine)
    return folder.path


class _FederatedRun:
    """The server; and the clients, where they are in this process."""

    def __init__(
        self,
        recipe: Recipe,
        wishes: FederationOptions,
        data: DataSplits,
        compute: Compute,
        observer: Observer,
        elsewhere: Clients | None,
    ) -> None:
        self.recipe, self.wishes, self.compute, self.observer = recipe, wishes, compute, observer
        self.settings, self.elsewhere = recipe.stage_training("student"), elsewhere
        needed = any(ALGORITHMS[each].public for each in wishes.algorithms)
        if wishes.partition.folders is not None and CENTRAL_BASELINE in wishes.baselines:
            raise UsageError("--baselines central: the images of --partition folders:DIR stand in different places")
        self.data, self.public_images = split_public_images(data, wishes.public if needed else 0.0, recipe.seed)
        self.clients: dict[int, Client] = {}
        if elsewhere is None:
            images = self.public_images
            public = None if images is None else partial(_return_images, images)
            self.clients = {
                each: Client(own, public)
                for each, own in enumerate(
                    client_image_sources(self.data.train, wishes.partition, wishes.clients, recipe.seed)
                )
            }

    def facts(self) -> dict[str, Any]:
        """Who has how many images; of clients in this process, of which class."""
        everybody = self.elsewhere or InProcessClients(self.clients)
        # All are put together, so that what the last one lacks is said before the first one trains.
        servers = {name: self._server(ALGORITHMS[name], everybody) for name in self.wishes.algorithms}
        wanted = [name for name in servers if ALGORITHMS[name].sends == "logits"]
        counts, failed = servers[(wanted or self.wishes.algorithms)[0]].handshake()
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

    def carry_out(self, folder: RunFolder, record: FederatedResults, engine: Engine) -> None:
        """Every algorithm, then every baseline."""

        def algorithms(clients: Clients | None) -> None:
            for name in self.wishes.algorithms:
                # Clients of this process forget what they keep for themselves from algorithm to algorithm.
                self._one(name, ALGORITHMS[name], clients or InProcessClients(self.clients), folder.path / name, record)

        if engine == "flower":
            simulate(self.clients, algorithms)
        else:
            algorithms(self.elsewhere)
        if CENTRAL_BASELINE in self.wishes.baselines:
            one = InProcessClients({0: Client(lambda classes: self.data.train)})
            self._one(CENTRAL_BASELINE, ALGORITHMS["fedavg"], one, folder.path / CENTRAL_BASELINE, record)
        if ALONE_BASELINE in self.wishes.baselines:
            for number, client in self.clients.items():
                where = f"{ALONE_BASELINE}-{number}"
                self._one(where, ALGORITHMS["fedavg"], InProcessClients({number: client}), folder.path / where, record)
            alone = [record.trained[f"{ALONE_BASELINE}-{number}"] for number in self.clients]
            record.found[ALONE_BASELINE] = mean_and_deviation([each["test"]["top1"] for each in alone])
            record.write()

    def _one(self, name: str, algorithm: Algorithm, clients: Clients, folder: Path, record: FederatedResults) -> None:
        if name in record.trained:
            self.observer.note(f"{name}: already trained")
            return
        started = time.monotonic()
        self.observer.stage(name, algorithm.summary if name in ALGORITHMS else BASELINES[name.partition("-")[0]])
        server = self._server(algorithm, clients)
        memories = clients.memories if isinstance(clients, InProcessClients) else {}
        kept = RoundCheckpoint(folder / "rounds.checkpoint", memories)
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
        record.add(name, summarize_rounds(progress, test))
        kept.remove()
        self.observer.stage_end(name, time.monotonic() - started)

    def _server(self, algorithm: Algorithm, clients: Clients) -> Server:
        recipe, classes = self.recipe, self.data.class_names
        torch.manual_seed(derive_seed(recipe.seed, "student"))  # as the student of `potstill run` begins
        start = build_network(recipe, recipe.student, classes, self.data.range)
        student = Classifier(start.module, start.architecture, classes, start.input)
        teacher = public = None
        if algorithm.guide == "teacher":
            teacher = load_teacher(recipe, classes)
        if algorithm.guide != "none":
            check_method(recipe, student, teacher or student, self.compute)
        if algorithm.public and self.public_images is not None:
            seed = derive_seed(recipe.seed, "public/order")
            public = PublicDataset(self.public_images, student.input, self.settings, self.compute, seed)
        val = split_loader(self.data, "val", student.input, recipe, self.settings, self.compute)
        return Server(
            algorithm, student, recipe, self.wishes.schedule, clients, val, self.compute, public=public, teacher=teacher
        )


def load_teacher(recipe: Recipe, classes: tuple[str, ...]) -> Classifier:
    """The recipe's teacher, with the weights that it comes with.

    Raises:
        UsageError: it has not been trained for these classes.
        ArtifactError: it knows other ones.
    """
    network = recipe.each_teacher[0]
    start = build_network(recipe, network, classes)
    if not start.ready:
        raise UsageError("guided: the server's teacher must know these classes already: --teacher RUN")
    return Classifier(start.module, start.architecture, classes, start.input)


def _return_images(images: ImageSet) -> ImageSet:
    return images
