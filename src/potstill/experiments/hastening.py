"""A stage's teachers made faster, where the faster ones agree with them on its own images."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from potstill.artifacts import digest
from potstill.cache import cache_folder
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distiller import Distiller
from potstill.errors import ArtifactError, StorageError
from potstill.evaluation.cost import flops
from potstill.experiments.recipe import Recipe
from potstill.experiments.storing import Taught, describe_teacher, digest_of, identity
from potstill.experiments.view_plan import can_store
from potstill.joining.hastened import LEAST_AGREEMENT, Asking, Fidelity
from potstill.joining.teachers import Teachers
from potstill.models.classifier import Classifier
from potstill.sealed import read_sealed_json, write_sealed_json
from potstill.training.devices import Compute
from potstill.training.observer import Observer

FORMAT = 2
MOST, FEWEST = 256, 64  # images that are compared
_FLOPS = 4e11  # that float32 may take for it on a CPU: some seconds
_FEW = 2  # images, where it is known how the comparison ends


def hasten(
    distiller: Distiller,
    teachers: Sequence[Classifier],
    folders: Sequence[Path | None],
    names: Sequence[str],
    train: Loader,
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer,
) -> list[Taught]:
    """Convert the distiller's teachers as the recipe allows; those that were given to it stay as they are.

    Which images are compared depends on nothing but the data and the network, so a run that goes on decides as it did
    when it began.  Where a method reads feature maps, or the hardware is not fast in bf16, nothing is converted.

    Args:
        distiller: joined.
        teachers: in its order.
        folders: where their models stand; None where nothing is stored.
        names: of their stages.
        train: some of its images are looked at, in their first view.
        recipe: says in which precision each may answer.
        data: what ``train`` shows.
        compute: whose precision and layout the faster ones have.
        observer: is told of each what was done, or why not.

    Returns:
        How each is asked from now on; empty where the method asks for what cannot be stored.
    """
    asked = distiller.teacher
    assert asked is not None  # they were given
    convertible, taught = can_store(distiller.method), []
    for at, (teacher, folder, name) in enumerate(zip(teachers, folders, names, strict=True)):
        one = Taught(teacher, folder, digest_of(teacher.module)) if convertible else None
        if recipe.network(name).precision == "float32" or (convertible and not compute.teachers_in_bf16):
            asked.in_float32(at, compute.memory_format)
        elif one is not None:
            observer.note(f"{name} {_hasten_one(asked, at, one, train, data, compute)}")
        if one is not None:
            taught.append(dataclasses.replace(one, how=asked.asking[at]))
    return taught


def ask_as(teachers: Teachers, how: Asking, images: Tensor) -> None:
    """Ask a single teacher just so, whatever it may cost in agreement.

    Args:
        teachers: of one.
        how: ``teachers.asking`` says afterwards what came of it.
        images: a few, prepared for the student.
    """
    if how.dtype == torch.float32:
        teachers.in_float32(0, how.memory_format)
    else:
        teachers.hasten_one(0, how.dtype, how.memory_format, images, known=Fidelity(1.0, 0.0, 0))


def spread(samples: int, count: int = _FEW) -> Tensor:
    """``count`` sample ids at most, evenly spread, int64; the first and the last one come first, whatever the count.

    Example:
        >>> spread(101, 5), spread(101)
        (tensor([  0, 100,  25,  50,  75]), tensor([  0, 100]))
    """
    ids = np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)
    return torch.from_numpy(np.concatenate([ids[:1], ids[1:][-1:], ids[1:-1]]))


def _hasten_one(asked: Teachers, at: int, teacher: Taught, train: Loader, data: DataSplits, compute: Compute) -> str:
    known = _Known(teacher, train, data, compute)
    found = known.read()
    count = _FEW if found is not None else _count(teacher.classifier, train.samples, compute)  # which takes a second
    images = train.view(spread(train.samples, count), 0)
    done = asked.hasten_one(at, torch.bfloat16, compute.memory_format, images, least=LEAST_AGREEMENT, known=found)
    if found is None and done.fidelity is not None:
        known.write(done.fidelity)
    return done.note


def _count(teacher: Classifier, samples: int, compute: Compute) -> int:
    """How many images are compared: a quarter of them, within what is worth its time.

    Never by the clock: it must be the same when the run goes on.
    """
    most = MOST if compute.device.type != "cpu" else int(_FLOPS / flops(teacher.module, teacher.input))
    return max(FEWEST, min(MOST, most, samples // 4))


class _Known:
    """What an earlier comparison of the same networks on the same images gave; the next run need not wait for it.

    How many images are compared follows from these and from ``FORMAT``, which goes up with the rule.
    """

    def __init__(self, teacher: Taught, train: Loader, data: DataSplits, compute: Compute) -> None:
        tried = dataclasses.replace(teacher, how=Asking(torch.bfloat16, compute.memory_format))
        subject = {
            "format": FORMAT,
            "answers": identity(describe_teacher(tried), train, "train", data, second=False),
            "device": compute.device.type,
            "torch": torch.__version__,
        }
        key = digest(json.dumps(subject, sort_keys=True).encode())[:16]
        self.path = cache_folder("fidelity", f"{key}.json")

    def read(self) -> Fidelity | None:
        """None where there is nothing, or nothing intact."""
        with contextlib.suppress(ArtifactError, TypeError):
            return Fidelity(**read_sealed_json(self.path))
        return None

    def write(self, found: Fidelity) -> None:
        """Where that is not possible, it is done again the next time."""
        if math.isfinite(found.largest):  # JSON has no word for what is not
            with contextlib.suppress(StorageError):
                write_sealed_json(self.path, dataclasses.asdict(found))
