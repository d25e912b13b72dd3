"""Federated runs: train a student by each algorithm, with simulated clients in this process or remote ones.

``federated.json`` holds the images of each client, and each algorithm's rounds, metrics and traffic.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.config.recipe import Recipe, dump_recipe
from potstill.console import silence_native_stderr
from potstill.contrib.federated import ALGORITHMS, BASELINES, Algorithm, check_recipe
from potstill.contrib.federated.client import Client, PublicDataset, check_method
from potstill.contrib.federated.partition import Partition, client_image_sources, split_public_images
from potstill.contrib.federated.server import (
    Clients,
    InProcessClients,
    RoundCheckpoint,
    Schedule,
    Server,
    ServerState,
)
from potstill.data.datasets import load_data
from potstill.data.image_sets import short_digests
from potstill.data.splits import DataSplits
from potstill.errors import RESUME, UsageError, advising
from potstill.experiment.builders import build_network, split_loader
from potstill.experiment.plan import derive_seed
from potstill.experiment.preflight import describe_skipped
from potstill.experiment.reproduce import describe_environment
from potstill.experiment.run_folder import RunFolder
from potstill.formatting import format_columns
from potstill.io import read_checksummed_json, sha256_hex, write_checksummed_json
from potstill.models.model_file import Classifier, save_model
from potstill.training.callbacks import Observer, SilentObserver
from potstill.training.devices import Compute, create_compute

RESULTS_FILE = "federated.json"
RESULTS_SCHEMA = 2
_ALONE, _CENTRAL = BASELINES


@dataclass(frozen=True)
class FederationOptions:
    """Options of a federated run, besides its recipe."""

    clients: int | None = 5
    partition: Partition = field(default_factory=lambda: Partition(0.3))
    algorithms: tuple[str, ...] = ("fedavg", "feddf")
    baselines: tuple[str, ...] = ()
    public: float = 0.2  # share of the training images that becomes public if data.unlabeled names none
    schedule: Schedule = field(default_factory=Schedule)

    def as_dict(self) -> dict[str, Any]:
        """Return them for federated.json, the schedule's beside the others."""
        own: dict[str, Any] = {key: each for key, each in asdict(self).items() if key != "schedule"}
        own |= {
            "partition": str(self.partition),
            "algorithms": list(self.algorithms),
            "baselines": list(self.baselines),
        }
        return own | asdict(self.schedule)


class FederatedResults:
    """``federated.json``; written anew after each algorithm."""

    def __init__(self, path: Path, options: dict[str, Any], fingerprint: str, *, resume: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": RESULTS_SCHEMA,
            "options": options,
            "data": fingerprint,
            "trained": {},
        }
        if resume and path.exists():
            self.content = read_checksummed_json(path)
            old = self.content.get("options", {})
            differences = [
                f"{key} was {old.get(key)} and is {new}" for key, new in options.items() if old.get(key) != new
            ]
            if self.content.get("data") != fingerprint:
                differences.append("the images are different")
            if differences:
                raise UsageError(f"--resume needs the same options, but {'; '.join(differences)}: use another --name")

    @property
    def trained(self) -> dict[str, Any]:
        """Algorithm or baseline -> its rounds and metrics."""
        found: dict[str, Any] = self.content["trained"]
        return found

    def update(self, facts: dict[str, Any]) -> None:
        """Add or replace entries, and write the file."""
        self.content |= facts
        write_checksummed_json(self.path, self.content)


def summarize_rounds(progress: ServerState, test: dict[str, float]) -> dict[str, Any]:
    """Return one algorithm's entry: its rounds, the best round's figures, and bytes per round (mean over rounds)."""
    rounds = progress.records
    return {
        "best_round": progress.best,
        "val": rounds[progress.best - 1]["val"],
        "test": test,
        "bytes_per_round": {
            direction: sum(each[f"bytes_{direction}"] for each in rounds) // len(rounds) for direction in ("down", "up")
        },
        "bytes": sum(each["bytes_down"] + each["bytes_up"] for each in rounds),
        "seconds": round(sum(each["seconds"] for each in rounds), 3),
        "rounds": rounds,
    }


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """Return mean, sample standard deviation and number of values.

    Example:
        >>> mean_and_deviation([0.5, 0.7])["mean"]
        0.6
    """
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "n": float(len(values))}


def best_algorithm(found: dict[str, Any], names: Sequence[str]) -> str:
    """Return the algorithm whose student is the best on val: by top-1, then by negative log-likelihood."""
    return max(names, key=lambda name: (found["trained"][name]["val"]["top1"], -found["trained"][name]["val"]["nll"]))


def format_table(found: dict[str, Any]) -> list[str]:
    """Return the lines of the results table, one for each algorithm and baseline."""
    rows = [("", "val top-1", "test top-1", "best round", "down/round", "up/round", "total")]
    for name, entry in found["trained"].items():
        if name.startswith(f"{_ALONE}-"):
            continue
        traffic = entry["bytes_per_round"]
        sizes = [f"{each / 1e6:.2f} MB" for each in (traffic["down"], traffic["up"], entry["bytes"])]
        shares = [f"{entry[split]['top1']:.1%}" for split in ("val", "test")]
        rows.append((name, *shares, str(entry["best_round"]), *(["-"] * 3 if name == _CENTRAL else sizes)))
    if _ALONE in found:
        alone = found[_ALONE]
        rows.append((_ALONE, "-", f"{alone['mean']:.1%}", f"mean of {alone['n']:.0f}", "-", "-", "-"))
    return format_columns(rows)


def federate(
    recipe: Recipe,
    options: FederationOptions,
    *,
    output_dir: Path = Path("runs"),
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data: DataSplits | None = None,
    observer: Observer | None = None,
    clients: Clients | None = None,
) -> Path:
    """Train with every algorithm of ``options`` on the same clients; return the run folder.

    ``recipe``: its epochs are not used.  ``name`` is by default the recipe's with ``-federated``.  ``clients``: remote
    ones with images of their own; None: simulate them in this process.
    """
    check_recipe(recipe, options.algorithms)
    observer = observer or SilentObserver()
    name = f"{recipe.name[:54]}-federated" if name is None else name
    with (
        RunFolder.create(output_dir, name, resume=resume, overwrite=overwrite) as folder,
        advising(RESUME, lambda: folder.known),
    ):
        with silence_native_stderr():
            data = load_data(recipe.data, data, progress=observer)
        augment = recipe.data.augment or data.augment
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"augment": augment})})
        recipe = recipe.with_chosen_method(len(data.class_names))
        compute = create_compute(recipe.stage_training("student"))
        described = options.as_dict() | {"seed": recipe.seed}
        results = FederatedResults(folder.path / RESULTS_FILE, described, data.fingerprint, resume=resume)
        run = _FederatedRun(recipe, options, data, compute, observer, clients)
        if overwrite:
            folder.clear()
        text = dump_recipe(recipe)
        if resume and folder.read_recipe() != text:
            raise UsageError(f"--resume needs the same recipe, and {folder.recipe} differs: use another --name")
        folder.write_recipe(text)
        folder.write_environment(describe_environment(recipe, text, data.fingerprint, compute))
        folder.write_splits(run.data.as_rows())
        folder.write_skipped(data.all_skipped)
        if data.all_skipped:
            observer.warn(describe_skipped(data.all_skipped))
        described = run.describe()
        before, now = (
            {each["client"]: each.get("sha256") for each in found.get("clients", ())}
            for found in (results.content, described)
        )
        if changed := [number for number in before | now if before and before.get(number) != now.get(number)]:
            raise UsageError(
                f"--resume needs the same images, and those of client {', '.join(map(str, changed))} are different: "
                "use another --name"
            )
        results.update(described)
        run.train(folder.path, results)
    return folder.path


class _FederatedRun:
    def __init__(
        self,
        recipe: Recipe,
        options: FederationOptions,
        data: DataSplits,
        compute: Compute,
        observer: Observer,
        remote: Clients | None,
    ) -> None:
        self.recipe, self.options, self.compute, self.observer = recipe, options, compute, observer
        self.settings, self.remote = recipe.stage_training("student"), remote
        needed = any(ALGORITHMS[each].distils for each in options.algorithms)
        if options.partition.folders is not None and _CENTRAL in options.baselines:
            raise UsageError("--baselines central: the images of --partition folders:DIR are in different places")
        self.data, self.public_images = split_public_images(data, options.public if needed else 0.0, recipe.seed)
        self.local: dict[int, Client] = {}
        self.declared: dict[int, int] = {}
        if remote is None:
            sources = client_image_sources(self.data.train, options.partition, options.clients, recipe.seed)
            self.local = {each: Client(own) for each, own in enumerate(sources)}

    def describe(self) -> dict[str, Any]:
        clients = self.remote or InProcessClients(self.local)
        # All servers are built first, so that a missing requirement of the last algorithm is an error before training.
        servers = {name: self._server(ALGORITHMS[name], clients) for name in self.options.algorithms}
        self.declared, failed = servers[self.options.algorithms[0]].describe_clients()
        for number, reason in failed.items():
            self.observer.warn(f"client {number} cannot take part ({reason}); see its own log")
        classes, found = self.data.class_names, []
        held_out = {*short_digests(self.data.val), *short_digests(self.data.test)} - {""}
        for number, count in self.declared.items():
            facts: dict[str, Any] = {"client": number, "images": count}
            if number in self.local:
                images = self.local[number].images(classes)
                by_class = np.bincount(images.labels, minlength=len(classes)).tolist()
                facts["classes"] = dict(zip(classes, by_class, strict=True))
                digests = short_digests(images)
                if self.options.partition.folders is not None:  # else they are of the server's data
                    rows = zip(images.names, images.labels.tolist(), digests, strict=True)
                    facts["sha256"] = sha256_hex(repr(sorted(rows)).encode())
                if seen := sum(digest in held_out for digest in digests):
                    self.observer.warn(
                        f"client {number} trains on {seen:,} images with the content of images of the server's val or "
                        "test: their figures are too high"
                    )
            found.append(facts)
        public = 0 if self.public_images is None else len(self.public_images)
        return {"recipe": self.recipe.name, "clients": found, "public": public, "test": len(self.data.test)}

    def train(self, folder: Path, results: FederatedResults) -> None:
        for name in self.options.algorithms:
            # Clients in this process keep nothing from one algorithm to the next.
            self._train(name, ALGORITHMS[name], self.remote or InProcessClients(self.local), folder, results)
        if _CENTRAL in self.options.baselines:
            central = InProcessClients({0: Client(lambda classes: self.data.train)})
            self._train(_CENTRAL, ALGORITHMS["fedavg"], central, folder, results)
        if _ALONE in self.options.baselines:
            names = {number: f"{_ALONE}-{number}" for number in self.local}
            for number, name in names.items():
                alone = InProcessClients({number: self.local[number]})
                self._train(name, ALGORITHMS["fedavg"], alone, folder, results)
            top1 = [results.trained[name]["test"]["top1"] for name in names.values()]
            results.update({_ALONE: mean_and_deviation(top1)})

    def _train(
        self, name: str, algorithm: Algorithm, clients: Clients, output_dir: Path, results: FederatedResults
    ) -> None:
        if name in results.trained:
            self.observer.note(f"{name}: already trained")
            return
        started, folder = time.monotonic(), output_dir / name
        baseline = name not in ALGORITHMS
        self.observer.stage(name, BASELINES[name.partition("-")[0]] if baseline else algorithm.summary)
        server = self._server(algorithm, clients, None if baseline else self.declared)
        checkpoint = RoundCheckpoint(folder / "rounds.checkpoint")
        progress = server.train(self.observer, checkpoint.read(), checkpoint.write)
        student, val = server.student, progress.records[progress.best - 1]["val"]
        facts = {"stage": name, "federated": self.options.as_dict(), "seed": self.recipe.seed, "val": val}
        student.facts |= facts
        save_model(student, folder)
        test = server.evaluate(split_loader(self.data, "test", student.input, self.recipe, self.settings, self.compute))
        results.update({"trained": results.trained | {name: summarize_rounds(progress, test)}})
        checkpoint.remove()
        self.observer.stage_end(name, time.monotonic() - started)

    def _server(self, algorithm: Algorithm, clients: Clients, declared: dict[int, int] | None = None) -> Server:
        recipe, classes = self.recipe, self.data.class_names
        torch.manual_seed(derive_seed(recipe.seed, "student"))  # the initial weights of `potstill run`'s student
        start = build_network(recipe, recipe.student, classes, self.data.range)
        student = Classifier(start.module, start.architecture, classes, start.input)
        teacher = public = None
        if algorithm.guided:
            teacher = load_teacher(recipe, classes)
            check_method(recipe, student, teacher, self.compute)
        if algorithm.distils and self.public_images is not None:
            seed = derive_seed(recipe.seed, "public/order")
            public = PublicDataset(self.public_images, student.input, self.settings, self.compute, seed)
        return Server(
            algorithm,
            student,
            recipe,
            self.options.schedule,
            clients,
            split_loader(self.data, "val", student.input, recipe, self.settings, self.compute),
            self.compute,
            public=public,
            teacher=teacher,
            declared=declared,
        )


def load_teacher(recipe: Recipe, classes: tuple[str, ...]) -> Classifier:
    """Return the recipe's trained teacher."""
    start = build_network(recipe, recipe.teacher_list[0], classes)
    if not start.ready:
        raise UsageError("guided: the server's teacher must be trained for these classes: --teacher RUN")
    return Classifier(start.module, start.architecture, classes, start.input)
