"""Verify a teacher cache: recompute some of its records with the live teacher, and compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.config.recipe import Recipe, load_recipe
from potstill.config.yaml import parse_yaml
from potstill.data.datasets import load_data
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.teacher_cache.cache import TeacherCache
from potstill.distillation.teacher_cache.record_format import canonical_json
from potstill.distillation.teacher_inference import InferenceSettings
from potstill.distillation.teachers import Teachers
from potstill.errors import ArtifactError, DataError
from potstill.experiment.builders import build_teacher_views, split_loader, train_loader
from potstill.experiment.domain_adaptation import Domains
from potstill.experiment.plan import plan_stages
from potstill.experiment.preflight import create_stage_method
from potstill.experiment.probe import load_fold_heads
from potstill.experiment.teacher_cache import StageTeacher, describe_teacher, module_digest
from potstill.experiment.teacher_inference import convert_as, spread_ids, teacher_images
from potstill.input_spec import InputSpec
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute, create_compute
from potstill.types import InputConverter


@dataclass(frozen=True)
class CacheVerification:
    """The difference between records of a teacher cache and the teacher's present outputs."""

    records: int  # compared
    largest: float  # largest difference of a logit, relative to the image's largest logit
    same_class: float  # share of records with the same top class


def verify_cache(path: Path, samples: int = 256) -> CacheVerification:
    """Recompute some of the records of a teacher cache, evenly spaced."""
    cache = TeacherCache.open_existing(path)
    try:
        facts, identity = cache.facts, cache.identity
        if not cache.record.classes:
            raise ArtifactError(f"{path} has embeddings or final predictions, compared by their checksums only")
        recipe = load_recipe(parse_yaml(facts["recipe"], str(path)).value, recorded=True)
        data = load_data(recipe.data)
        if data.target is not None:
            data = _domain_data(recipe, data, facts, path)
        if data.fingerprint != identity["data"]:
            raise DataError(f"{path}: the images of {data.source} have changed; this cache cannot be used any more")
        network = load_model(Path(facts["folder"]))
        heads = None if data.target is not None else load_fold_heads(Path(facts["folder"]), network.facts, data)
        digest = None if heads is None else module_digest(heads)
        taught = StageTeacher(network, Path(facts["folder"]), module_digest(network.module), None, digest)
        teacher = {**identity["teacher"], "inference": None}
        if canonical_json(describe_teacher(taught)) != canonical_json(teacher):
            raise ArtifactError(f"{path}: the teacher in {facts['folder']} has changed since it was cached")
        chosen = _recorded_ids(cache, samples)
        if not chosen:
            raise ArtifactError(f"{path} has no records yet")
        spec = InputSpec.from_dict(facts["student input"])
        compute = create_compute(recipe.stage_training(facts["stage"]))
        loading = partial(_loader, recipe, facts["stage"], identity["split"], data=data, compute=compute)
        loader, teachers = loading(spec=spec), Teachers([network.module.to(compute.device)], [nn.Identity()])
        if (views := build_teacher_views(spec, [network], loading)) is not None:
            loader = next(each for each in views.loaders if each is not None)
        else:
            teachers.input_converters[0] = InputConverter(spec, network.input)
        if heads is not None:
            teachers.use_fold_heads(0, heads.to(compute.device))
        _convert_as_recorded(teachers, identity["teacher"]["inference"], loader, path)
        second = identity["views"].get("strong", False)
        training = identity["split"] == "train"
        return _compare(cache, chosen, loader, teachers, compute, second=second, training=training)
    finally:
        cache.close()


def _convert_as_recorded(teachers: Teachers, facts: dict[str, Any] | None, loader: Loader, path: Path) -> None:
    if facts is None:
        return
    try:
        how = InferenceSettings.of(facts)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} was written by another version: unknown inference settings {facts!r}") from error
    convert_as(teachers, how, teacher_images(teachers, 0, loader, None, spread_ids(loader.samples)))
    if teachers.inference_settings != [how]:
        raise ArtifactError(f"{path}: its teacher ran in {how}, which is not possible on this machine")


def _recorded_ids(cache: TeacherCache, samples: int) -> dict[int, list[int]]:
    """Return view -> ids of recorded samples, about evenly spaced over all records."""
    every = np.arange(cache.samples, dtype=np.int64)
    present = {view: every[cache.read(view, every)[1]] for view in range(cache.views)}
    total = sum(map(len, present.values()))
    step = max(1, -(-total // samples))
    return {view: ids[view % step :: step].tolist() for view, ids in present.items() if len(ids[view % step :: step])}


def _compare(
    cache: TeacherCache,
    chosen: dict[int, list[int]],
    loader: Loader,
    teachers: Teachers,
    compute: Compute,
    *,
    second: bool,
    training: bool,
) -> CacheVerification:
    differences, same, count = 0.0, 0, 0
    for view, ids in chosen.items():
        for start in range(0, len(ids), 64):
            index = torch.tensor(ids[start : start + 64], dtype=torch.int64)
            images = (loader.second_view if second else loader.view)(index, view)
            with compute.autocast():
                outputs = teachers.run(
                    images.contiguous(memory_format=compute.memory_format),
                    index=index.to(compute.device) if training else None,
                )[0]
            records, _ = cache.read(view, index.numpy())
            cached = torch.from_numpy(cache.record.decode(records, 1.0)[0])
            live = outputs.logits.cpu()
            differences = max(differences, _largest_difference(live, cached))
            same += int((live.argmax(dim=1) == cached.argmax(dim=1)).sum())
            count += len(index)
    return CacheVerification(count, differences, same / count)


def _largest_difference(live: Tensor, cached: Tensor) -> float:
    # The others of a top16 record are filled in; stable, since of equal logits it has the lower class.
    top = live.sort(dim=1, descending=True, stable=True).indices[:, :16]
    live, cached = (each - each.amax(dim=1, keepdim=True) for each in (live, cached))
    return float((live - cached).gather(1, top).abs().max())


def _domain_data(recipe: Recipe, data: DataSplits, facts: Mapping[str, Any], path: Path) -> DataSplits:
    """Return the stage's images of a run with ``data.target``, as its teacher selects them."""
    if len(recipe.teacher_list) > 1 or recipe.assistants or recipe.born_again_generations > 1:
        raise ArtifactError(
            f"{path}: a cache of a run with data.target and several teachers cannot be verified, since they selected "
            "its images together"
        )
    planned = next(each for each in plan_stages(recipe) if each.name == facts["stage"])
    compute = create_compute(recipe.stage_training(planned.name))
    silent = SilentObserver()
    return Domains(recipe, data, compute, silent, silent.warn).stage_data(
        planned, {"teacher": load_model(Path(facts["folder"]))}
    )


def _loader(
    recipe: Recipe,
    stage: str,
    split: str,
    *,
    spec: InputSpec,
    data: DataSplits,
    compute: Compute,
    **teacher: Any,
) -> Loader:
    if split != "train":
        settings = recipe.stage_training(stage)
        return split_loader(data, split, spec, recipe, settings, compute, **teacher)
    planned = next(each for each in plan_stages(recipe) if each.name == stage)
    needs = create_stage_method(recipe).needs
    return train_loader(planned, needs, spec, recipe=recipe, data=data, compute=compute, **teacher)
