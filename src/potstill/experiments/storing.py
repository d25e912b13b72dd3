"""The stores of one stage: keyed by all that decides the teacher's answers, opened, and checked against the teacher."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distiller import Distiller
from potstill.errors import ArtifactError, StorageError
from potstill.experiments.recipe import Recipe, dump_recipe
from potstill.experiments.view_plan import record_kind, root_folder
from potstill.inputs import InputSpec
from potstill.joining.hastened import Asking
from potstill.models.classifier import Classifier
from potstill.processes.group import ALONE, Processes
from potstill.store.recorded import Recorded, Shelf, Unkept
from potstill.store.records import Record
from potstill.store.shelf import Store
from potstill.training.devices import Compute
from potstill.training.observer import Observer


@dataclass
class Stored:
    """A stage's answers by split, as records; nothing where the method trains on the live answers."""

    by_split: dict[str, Recorded] = field(default_factory=dict)
    kept: bool = False  # on disk

    def close(self) -> None:
        """Make everything last; other processes may write then."""
        for recorded in self.by_split.values():
            recorded.close()

    def counts(self, processes: Processes = ALONE) -> dict[str, int]:
        """Training images of which the teacher was asked, and whose answers were read, by all processes."""
        if not self.kept:
            return {}
        every = [dataclasses.asdict(counts) for counts in processes.gather(self.by_split["train"].counts)]
        return {name: sum(counts[name] for counts in every) for name in every[0]}


@dataclass(frozen=True)
class Taught:
    """A teacher, where its model stands, and how it is asked."""

    classifier: Classifier  # as trained, in float32
    folder: Path | None  # None where nothing is stored
    weights: str  # digest of the classifier's
    how: Asking | None = None  # decides how its answers are rounded; None: under autocast


def open_stores(
    distiller: Distiller,
    loaders: dict[str, Loader],
    teachers: Sequence[Taught],
    *,
    stage: str,
    student: InputSpec,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer,
    keeps: bool = True,
) -> Stored:
    """Stores for the teachers' answers to the images of each split.

    Args:
        distiller: joined, with the teachers as they will be asked.
        loaders: by split; "train" with its views.
        teachers: in the distiller's order.
        stage: whose views they are.
        student: how the images are prepared.
        recipe: says where and how.
        data: whose fingerprint is part of the keys.
        compute: where the teachers are asked.
        observer: is warned once where a store cannot be used; training then goes on with the live teacher, whose
            answers are rounded as their records would be, so that the weights are the same.
        keeps: False: no store is opened at all, with the same effect.
    """
    method, classes = distiller.method, len(data.class_names)
    kind = record_kind(recipe, method, classes)
    failed: StorageError | ArtifactError | None = None
    described = [describe_teacher(teacher) for teacher in teachers]
    widths = embedding_widths(distiller) if method.needs.embedding else [0] * len(teachers)
    opened: list[Store] = []

    def shelves_of(split: str, loader: Loader, kept: bool) -> dict[bool, list[Shelf]]:
        shelves: dict[bool, list[Shelf]] = {False: [], True: []}
        for second in (False, True) if split == "train" and method.needs.second == "strong" else (False,):
            for teacher, description, width in zip(teachers, described, widths, strict=True):
                record = Record(kind, classes, width)
                if kept:
                    facts = {
                        "teacher": teacher.classifier.architecture,
                        "folder": str((teacher.folder or Path()).resolve()),
                        "data": data.source,
                        "stage": stage,
                        "student input": dataclasses.asdict(student),
                        "recipe": dump_recipe(recipe),
                    }
                    key = identity(description, loader, split, data, second=second)
                    opened.append(Store.open(root_folder(recipe), key, record, loader.samples, facts))
                    shelves[second].append(opened[-1])
                else:
                    shelves[second].append(Unkept(record))
        return shelves

    # Where the method asks the teacher in training only, val has no answers.
    answered = {split: each for split, each in loaders.items() if split == "train" or not method.needs.training_only}
    try:
        shelves = {split: shelves_of(split, loader, keeps) for split, loader in answered.items()}
    except (StorageError, ArtifactError) as error:
        failed = error
        observer.warn(f"teacher outputs are not stored, so the teacher is asked in every step: {error}")
    kept = keeps and not any(compute.processes.highest(int(failed is not None)))  # all processes record, or none
    if not kept:
        for store in opened:
            store.close()
        shelves = {split: shelves_of(split, loader, False) for split, loader in answered.items()}
    return Stored(
        {
            split: Recorded(
                distiller,
                loader,
                shelves[split][False],
                shelves[split][True],
                autocast=compute.autocast,
                warn=observer.warn,
                processes=compute.processes,
            )
            for split, loader in answered.items()
        },
        kept,
    )


def describe_teacher(teacher: Taught) -> dict[str, Any]:
    """All that decides what a teacher says of an image."""
    network = teacher.classifier
    return {
        "architecture": network.architecture,
        "weights": teacher.weights,
        "remodelled": network.remodelled,
        "input": dataclasses.asdict(network.input),
        "asked in": None if teacher.how is None else teacher.how.facts(),
    }


def identity(teacher: dict[str, Any], loader: Loader, split: str, data: DataSplits, *, second: bool) -> dict[str, Any]:
    """All that decides a store's records; any change of it is another key."""
    names = "\n".join(data.split(split).names)  # the fingerprint does not depend on their order, but sample ids do
    return {
        "teacher": teacher,
        "classes": list(data.class_names),
        "data": data.fingerprint,
        "split": split,
        "names": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
        "views": loader.describe_views(second=second),
    }


def embedding_widths(distiller: Distiller) -> list[int]:
    """D of each teacher: what its last linear layer reads."""
    assert distiller.teacher is not None
    found = []
    for network, reader in zip(distiller.teacher.networks, distiller.teacher.readers, strict=True):
        assert reader.wanted.embedding is not None  # the method needs it
        layer = network.get_submodule(reader.wanted.embedding)
        assert isinstance(layer, nn.Linear)
        found.append(layer.in_features)
    return found


def digest_of(module: nn.Module) -> str:
    """SHA-256 over names, kinds, shapes and bytes of a network's tensors."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
