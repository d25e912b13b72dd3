"""Faster inference of a stage's teachers (bf16 or fp16, folded BatchNorm, channels_last), if it agrees with float32."""

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
from potstill.distillation.teachers import Teachers, TeacherViews
from potstill.errors import ArtifactError, StorageError
from potstill.evaluation.cost import count_flops
from potstill.experiment.teacher_cache import StageTeacher, cache_key, describe_teacher, is_cacheable, module_digest
from potstill.io import cache_folder, read_checksummed_json, sha256_hex, write_checksummed_json
from potstill.models.families.opaque_models import find_opaque
from potstill.models.model_file import Classifier
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute

FORMAT = 2
MAX_COMPARED, MIN_COMPARED = 256, 64  # images that are compared
_MAX_FLOPS = 4e11  # of the comparison in float32 on a CPU: some seconds
_KNOWN_COMPARED = 2  # images, if the result of the comparison is known


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
    """Convert the distiller's teachers as the recipe allows; ``teachers`` themselves are not changed.

    The compared images depend on data and network only, so a resumed run decides in the same way.  Nothing is converted
    if the method reads feature maps or the hardware is not fast in bf16.  Empty if outputs cannot be cached.
    """
    live = distiller.teacher
    assert live is not None
    cacheable, converted = is_cacheable(distiller.method), []
    for at, (teacher, folder, name) in enumerate(zip(teachers, folders, names, strict=True)):
        digest = module_digest(live.fold_heads[str(at)]) if str(at) in live.fold_heads else None
        described = StageTeacher(teacher, folder, module_digest(teacher.module), None, digest) if cacheable else None
        hidden = find_opaque(teacher.module) is not None
        exact = hidden or recipe.network(name).head == "none" or recipe.network(name).precision == "float32"
        if exact or (cacheable and compute.teacher_dtype == torch.float32):
            live.use_float32(at, compute.memory_format)
        elif described is not None:
            own = None if views is None else views.loaders[at]
            observer.note(f"{name} {_convert_teacher(live, at, described, train, own, data, compute)}")
        if described is not None:
            converted.append(dataclasses.replace(described, inference_settings=live.inference_settings[at]))
    return converted


def convert_as(teachers: Teachers, settings: InferenceSettings, images: Tensor) -> None:
    """Convert a single teacher to given inference settings, without comparing its outputs on ``images``."""
    if settings.dtype == torch.float32:
        teachers.use_float32(0, settings.memory_format)
    else:
        teachers.optimize_one_for_inference(
            0, settings.dtype, settings.memory_format, images, fidelity=Fidelity(1.0, 0.0, 0)
        )


def teacher_images(teachers: Teachers, at: int, loader: Loader, own: Loader | None, index: Tensor) -> Tensor:
    """Return samples ``index`` in view 0, preprocessed for one of the teachers, from ``own`` if its size is another."""
    if own is not None:
        return own.view(index, 0)
    images: Tensor = teachers.input_converters[at](loader.view(index, 0))
    return images


def spread_ids(samples: int, count: int = _KNOWN_COMPARED) -> Tensor:
    """Return up to ``count`` evenly spaced sample ids, int64; the first and the last sample come first.

    Example:
        >>> spread_ids(101, 5), spread_ids(101)
        (tensor([  0, 100,  25,  50,  75]), tensor([  0, 100]))
    """
    ids = np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)
    return torch.from_numpy(np.concatenate([ids[:1], ids[1:][-1:], ids[1:-1]]))


def _convert_teacher(
    teachers: Teachers,
    at: int,
    teacher: StageTeacher,
    train: Loader,
    own: Loader | None,
    data: DataSplits,
    compute: Compute,
) -> str:
    cache = _FidelityCache(teacher, train, data, compute)
    found = cache.read()
    count = (
        _KNOWN_COMPARED if found is not None else _count_compared(teacher.classifier, train.samples, compute)
    )  # which takes a second
    images = teacher_images(teachers, at, train, own, spread_ids(train.samples, count))
    done = teachers.optimize_one_for_inference(
        at, compute.teacher_dtype, compute.memory_format, images, min_agreement=MIN_AGREEMENT, fidelity=found
    )
    if found is None and done.fidelity is not None:
        cache.write(done.fidelity)
    return done.note


def _count_compared(teacher: Classifier, samples: int, compute: Compute) -> int:
    """Return how many images are compared: a quarter, within limits that depend on no time measurement."""
    most = (
        MAX_COMPARED if compute.device.type != "cpu" else int(_MAX_FLOPS / count_flops(teacher.module, teacher.input))
    )
    return max(MIN_COMPARED, min(MAX_COMPARED, most, samples // 4))


class _FidelityCache:
    """The result of an earlier comparison on disk; raise ``FORMAT`` with the rule for the number of images."""

    def __init__(self, teacher: StageTeacher, train: Loader, data: DataSplits, compute: Compute) -> None:
        settings = InferenceSettings(compute.teacher_dtype, compute.memory_format)
        tried = dataclasses.replace(teacher, inference_settings=settings)
        subject = {
            "format": FORMAT,
            "answers": cache_key(describe_teacher(tried), train, "train", data, second=False),
            "device": compute.device.type,
            "torch": torch.__version__,
        }
        key = sha256_hex(json.dumps(subject, sort_keys=True).encode())[:16]
        self.path = cache_folder("fidelity", f"{key}.json")

    def read(self) -> Fidelity | None:
        with contextlib.suppress(ArtifactError, TypeError):
            return Fidelity(**read_checksummed_json(self.path))
        return None

    def write(self, found: Fidelity) -> None:
        if math.isfinite(found.largest):  # JSON has no infinity or NaN
            with contextlib.suppress(StorageError):
                write_checksummed_json(self.path, dataclasses.asdict(found))
