"""Verify a teacher cache: recompute some of its records with the live teacher, and compare."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from potstill.config.recipe import Recipe, load_recipe
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
from potstill.inputs import InputConverter
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import Compute, create_compute


@dataclass(frozen=True)
class CacheVerification:
    """How far a store's records are from what the teacher says now."""

    records: int  # compared
    largest: float  # of all differences of two logits, each less its image's largest
    same_class: float  # share of records with the same top class


def verify_cache(path: Path, samples: int = 256) -> CacheVerification:
    """Recompute records of a store, spread evenly over those that it holds.

    Args:
        path: the store's folder.
        samples: how many records at most.

    Raises:
        ArtifactError: no store, a damaged one, or one whose teacher is gone or has changed.
        DataError: images that are gone or have changed.
    """
    store = TeacherCache.open_existing(path)
    try:
        facts, identity = store.facts, store.identity
        recipe = load_recipe(yaml.safe_load(facts["recipe"]), recorded=True)
        data = load_data(recipe.data)
        if data.target is not None:
            data = _domain_data(recipe, data, facts, path)
        if data.fingerprint != identity["data"]:
            raise DataError(f"{path}: the images of {data.source} have changed since; the store is of no use any more")
        network = load_model(Path(facts["folder"]))
        heads = None if data.target is not None else load_fold_heads(Path(facts["folder"]), network.facts, data)
        digest = None if heads is None else module_digest(heads)
        taught = StageTeacher(network, Path(facts["folder"]), module_digest(network.module), None, digest)
        teacher = {**identity["teacher"], "asked in": None}
        if canonical_json(describe_teacher(taught)) != canonical_json(teacher):
            raise ArtifactError(f"{path}: the teacher in {facts['folder']} has changed since and has another store now")
        chosen = _recorded_ids(store, samples)
        if not chosen:
            raise ArtifactError(f"{path} holds no records yet")
        spec = _spec(facts["student input"])
        compute = create_compute(recipe.stage_training(facts["stage"]))
        loading = partial(_loader, recipe, facts["stage"], identity["split"], data=data, compute=compute)
        loader, teachers = loading(spec=spec), Teachers([network.module.to(compute.device)], [nn.Identity()])
        if (views := build_teacher_views(spec, [network.input], loading)) is not None:
            loader = next(each for each in views.loaders if each is not None)
        else:
            teachers.input_converters[0] = InputConverter(spec, network.input)
        if heads is not None:
            teachers.use_fold_heads(0, heads.to(compute.device))
        _convert_as_recorded(teachers, identity["teacher"]["asked in"], loader, path)
        second = identity["views"].get("strong", False)
        training = identity["split"] == "train"
        return _compare(store, chosen, loader, teachers, compute, second=second, training=training)
    finally:
        store.close()


def _convert_as_recorded(teachers: Teachers, facts: dict[str, Any] | None, loader: Loader, path: Path) -> None:
    if facts is None:
        return
    try:
        how = InferenceSettings.of(facts)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} was written by another version: its teacher ran in {facts!r}") from error
    convert_as(teachers, how, teacher_images(teachers, 0, loader, None, spread_ids(loader.samples)))
    if teachers.inference_settings != [how]:
        raise ArtifactError(f"{path}: its teacher ran in {how}, which is not possible here")


def _recorded_ids(store: TeacherCache, samples: int) -> dict[int, list[int]]:
    """View -> sample ids that are recorded, about evenly spread over all."""
    every = np.arange(store.samples, dtype=np.int64)
    present = {view: every[store.read(view, every)[1]] for view in range(store.views)}
    total = sum(map(len, present.values()))
    step = max(1, -(-total // samples))
    return {view: ids[view % step :: step].tolist() for view, ids in present.items() if len(ids[view % step :: step])}


def _compare(
    store: TeacherCache,
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
                said = teachers.run(
                    images.contiguous(memory_format=compute.memory_format),
                    index=index.to(compute.device) if training else None,
                )[0]
            records, _ = store.read(view, index.numpy())
            kept = torch.from_numpy(store.record.decode(records, 1.0)[0])
            now = said.logits.cpu()
            differences = max(differences, _largest_difference(now, kept))
            same += int((now.argmax(dim=1) == kept.argmax(dim=1)).sum())
            count += len(index)
    return CacheVerification(count, differences, same / count)


def _largest_difference(ours: Tensor, theirs: Tensor) -> float:
    top = ours.topk(min(16, ours.shape[1]), dim=1).indices  # of a record that keeps no more, the others are made up
    ours, theirs = (each - each.amax(dim=1, keepdim=True) for each in (ours, theirs))
    return float((ours - theirs).gather(1, top).abs().max())


def _domain_data(recipe: Recipe, data: DataSplits, facts: Mapping[str, Any], path: Path) -> DataSplits:
    """What the stage saw of two domains: its teacher says it again."""
    if len(recipe.each_teacher) > 1 or recipe.assistants or recipe.born_again_generations > 1:
        raise ArtifactError(
            f"{path}: of a run with data.target and several teachers, which chose its images together: it cannot be "
            "verified from one of them"
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
    drawn_for: InputSpec | None = None,
) -> Loader:
    if split != "train":
        settings = recipe.stage_training(stage)
        return split_loader(data, split, spec, recipe, settings, compute, drawn_for=drawn_for)
    planned = next(each for each in plan_stages(recipe) if each.name == stage)
    needs = create_stage_method(recipe).needs
    return train_loader(planned, needs, spec, recipe=recipe, data=data, compute=compute, drawn_for=drawn_for)


def _spec(facts: dict[str, Any]) -> InputSpec:
    return InputSpec.from_dict(facts)
