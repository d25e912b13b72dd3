"""Faster inference of a stage's teachers (bf16, BN folded, channels_last) if it agrees with float32 on the stage's
images.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from potstill.config.recipe import Recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.distiller import Distiller
from potstill.distillation.teacher_inference import MIN_AGREEMENT, Fidelity, InferenceSettings
from potstill.distillation.teacher_views import TeacherViews
from potstill.distillation.teachers import Teachers
from potstill.errors import ArtifactError, StorageError
from potstill.evaluation.cost import count_flops
from potstill.experiment.teacher_cache import StageTeacher, cache_key, describe_teacher, is_cacheable, module_digest
from potstill.io import cache_folder, read_checksummed_json, sha256_hex, write_checksummed_json
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute

FORMAT = 2
MAX_COMPARED, MIN_COMPARED = 256, 64  # images that are compared
_MAX_FLOPS = 4e11  # that float32 may take for it on a CPU: some seconds
_KNOWN_COMPARED = 2  # images, where it is known how the comparison ends


def convert_teachers(
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
    views: TeacherViews | None = None,
) -> list[StageTeacher]:
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
        views: the images of ``train`` for teachers of another size than the student's.

    Returns:
        How each is asked from now on; empty where the method asks for what cannot be stored.
    """
    asked = distiller.teacher
    assert asked is not None  # they were given
    convertible, taught = is_cacheable(distiller.method), []
    for at, (teacher, folder, name) in enumerate(zip(teachers, folders, names, strict=True)):
        digest = module_digest(asked.fold_heads[str(at)]) if str(at) in asked.fold_heads else None
        one = StageTeacher(teacher, folder, module_digest(teacher.module), None, digest) if convertible else None
        if recipe.network(name).precision == "float32" or (convertible and not compute.teacher_in_bf16):
            asked.use_float32(at, compute.memory_format)
        elif one is not None:
            own = None if views is None else views.loaders[at]
            observer.note(f"{name} {_convert_teacher(asked, at, one, train, own, data, compute)}")
        if one is not None:
            taught.append(dataclasses.replace(one, how=asked.inference_settings[at]))
    return taught


def convert_as(teachers: Teachers, how: InferenceSettings, images: Tensor) -> None:
    """Ask a single teacher just so, whatever it may cost in agreement.

    Args:
        teachers: of one.
        how: ``teachers.inference_settings`` says afterwards what came of it.
        images: a few, prepared for this teacher.
    """
    if how.dtype == torch.float32:
        teachers.use_float32(0, how.memory_format)
    else:
        teachers.optimize_one_for_inference(0, how.dtype, how.memory_format, images, fidelity=Fidelity(1.0, 0.0, 0))


def teacher_images(asked: Teachers, at: int, loader: Loader, own: Loader | None, index: Tensor) -> Tensor:
    """These samples in view 0, prepared for one of the teachers, [B, 3, S, S].

    Args:
        asked: the teachers.
        at: which of them.
        loader: prepares images for the student.
        own: the same views at the teacher's size, where that is another one.
        index: int64 [B], sample ids.
    """
    if own is not None:
        return own.view(index, 0)
    found: Tensor = asked.input_converters[at](loader.view(index, 0))
    return found


def spread_ids(samples: int, count: int = _KNOWN_COMPARED) -> Tensor:
    """``count`` sample ids at most, evenly spread, int64; the first and the last one come first, whatever the count.

    Example:
        >>> spread_ids(101, 5), spread_ids(101)
        (tensor([  0, 100,  25,  50,  75]), tensor([  0, 100]))
    """
    ids = np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)
    return torch.from_numpy(np.concatenate([ids[:1], ids[1:][-1:], ids[1:-1]]))


def _convert_teacher(
    asked: Teachers,
    at: int,
    teacher: StageTeacher,
    train: Loader,
    own: Loader | None,
    data: DataSplits,
    compute: Compute,
) -> str:
    known = _FidelityCache(teacher, train, data, compute)
    found = known.read()
    count = (
        _KNOWN_COMPARED if found is not None else _count_compared(teacher.classifier, train.samples, compute)
    )  # which takes a second
    images = teacher_images(asked, at, train, own, spread_ids(train.samples, count))
    done = asked.optimize_one_for_inference(
        at, torch.bfloat16, compute.memory_format, images, min_agreement=MIN_AGREEMENT, fidelity=found
    )
    if found is None and done.fidelity is not None:
        known.write(done.fidelity)
    return done.note


def _count_compared(teacher: Classifier, samples: int, compute: Compute) -> int:
    """How many images are compared: a quarter of them, within what is worth its time.

    Never by the clock: it must be the same when the run goes on.
    """
    most = (
        MAX_COMPARED if compute.device.type != "cpu" else int(_MAX_FLOPS / count_flops(teacher.module, teacher.input))
    )
    return max(MIN_COMPARED, min(MAX_COMPARED, most, samples // 4))


class _FidelityCache:
    """What an earlier comparison of the same networks on the same images gave; the next run need not wait for it.

    How many images are compared follows from these and from ``FORMAT``, which goes up with the rule.
    """

    def __init__(self, teacher: StageTeacher, train: Loader, data: DataSplits, compute: Compute) -> None:
        tried = dataclasses.replace(teacher, how=InferenceSettings(torch.bfloat16, compute.memory_format))
        subject = {
            "format": FORMAT,
            "answers": cache_key(describe_teacher(tried), train, "train", data, second=False),
            "device": compute.device.type,
            "torch": torch.__version__,
        }
        key = sha256_hex(json.dumps(subject, sort_keys=True).encode())[:16]
        self.path = cache_folder("fidelity", f"{key}.json")

    def read(self) -> Fidelity | None:
        """None where there is nothing, or nothing intact."""
        with contextlib.suppress(ArtifactError, TypeError):
            return Fidelity(**read_checksummed_json(self.path))
        return None

    def write(self, found: Fidelity) -> None:
        """Where that is not possible, it is done again the next time."""
        if math.isfinite(found.largest):  # JSON has no word for what is not
            with contextlib.suppress(StorageError):
                write_checksummed_json(self.path, dataclasses.asdict(found))
