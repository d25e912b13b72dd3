"""From a recipe to a run folder: teacher, baseline, distilled, figures."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from potstill.artifacts import read_json
from potstill.data.splits import DataSplits
from potstill.errors import UsageError
from potstill.evaluation.evaluate import collect
from potstill.experiments.environment import describe_environment
from potstill.experiments.preflight import check_all
from potstill.experiments.recipe import Recipe, StageSettings, dump_recipe
from potstill.experiments.results import describe_run, evaluate_stages
from potstill.experiments.run_folder import STAGES, RunFolder, read_text
from potstill.experiments.seeds import derive
from potstill.experiments.stage import split_loader, train_stage
from potstill.experiments.start import Start, start_network
from potstill.methods import create_method
from potstill.methods.base import Method
from potstill.models.classifier import Classifier
from potstill.models.model_file import load_model, save_model
from potstill.training.devices import Compute, choose
from potstill.training.observer import Observer, Silent

# Settings that do not touch the result, so a resumed run may change them.
_FREE = {"name", "description", "data.workers", "data.memory_share"} | {
    f"{place}training.{key}" for place in ("", "teacher.", "student.") for key in ("checkpoint_seconds",)
}


def run(
    recipe: Recipe,
    *,
    root: Path = Path("runs"),
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stages: tuple[str, ...] = STAGES,
    data: DataSplits | None = None,
    observer: Observer | None = None,
) -> Path:
    """Carry out a recipe; returns the run folder.

    Args:
        recipe: checked settings.
        root: where run folders stand.
        name: the folder's name; the recipe's own where None.
        resume: go on with an existing run of the same recipe.
        overwrite: delete an existing run of this name first.
        stages: which of teacher, baseline, distilled to carry out; distilled needs the teacher.
        data: data sets from Python in place of ``recipe.data.source``.
        observer: is told what happens.

    Raises:
        PotstillError: anything that a user can mend; see ``potstill.errors`` for kinds and exit codes.
    """
    started = time.monotonic()
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages or ("distilled" in stages and "teacher" not in stages):
        raise UsageError(f"stages are some of {', '.join(STAGES)}, and distilled needs teacher; got {list(stages)}")
    with RunFolder.create(root, name or recipe.name, resume=resume, overwrite=overwrite) as folder:
        if resume:
            _refuse_changes(folder, recipe)
        if overwrite:
            _refuse_own_weights(folder, recipe)
        splits, compute = check_all(recipe, data)
        if resume:
            _refuse_other_data(folder, splits)
        if overwrite:
            folder.clear()
        text = dump_recipe(recipe)
        folder.write_recipe(text)
        folder.write_environment(describe_environment(text, splits.fingerprint, compute))
        folder.write_splits(splits.as_rows())
        experiment = _Experiment(folder, recipe, splits, compute, observer or Silent(), resume)
        models = {stage: experiment.carry_out(stage) for stage in STAGES if stage in stages}
        evaluated = evaluate_stages(folder, models, recipe, splits, compute)
        seconds = time.monotonic() - started
        folder.write_results(describe_run(folder.path.name, recipe, splits, evaluated, seconds, experiment.warnings))
    return folder.path


@dataclass
class _Experiment:
    folder: RunFolder
    recipe: Recipe
    data: DataSplits
    compute: Compute
    observer: Observer
    resume: bool
    warnings: list[str] = field(default_factory=list)
    models: dict[str, Classifier] = field(default_factory=dict)

    def carry_out(self, stage: str) -> Classifier:
        """Train a stage, or load it where it is done already."""
        started = time.monotonic()
        if self.resume and self.folder.trained(stage):
            self.observer.note(f"{stage}: already trained")
            model = load_model(self.folder.stage(stage))
            model.module.to(self.compute.device)
        else:
            model = self._teacher() if stage == "teacher" else self._student(stage)
        self.models[stage] = model
        if stage == "teacher":
            self._doubt_teacher()
        elif stage == "baseline" and "teacher" in self.models:
            self._compare_with_baseline()
        self.observer.stage_end(stage, time.monotonic() - started)
        return model

    def _teacher(self) -> Classifier:
        recipe, classes = self.recipe, self.data.class_names
        torch.manual_seed(derive(recipe.seed, "teacher"))
        start = self._start(recipe.teacher)
        model = Classifier(start.module, start.architecture, classes, start.input, dict(start.facts))
        if not start.ready:
            self._train("teacher", model, create_method("supervised"), None)
            return model
        self.observer.stage("teacher", f"{start.architecture}, ready-made: {start.facts['weights']}")
        model.module.to(self.compute.device)
        save_model(model, self.folder.stage("teacher"))
        return model

    def _student(self, stage: str) -> Classifier:
        recipe, classes = self.recipe, self.data.class_names
        torch.manual_seed(derive(recipe.seed, "student"))  # baseline and distilled start from the same weights
        start = self._start(recipe.student)
        model = Classifier(start.module, start.architecture, classes, start.input, dict(start.facts))
        options = {"name": "supervised"} if stage == "baseline" else dict(recipe.method)
        method = create_method(options.pop("name"), **options)
        self._train(stage, model, method, self.models["teacher"] if method.needs_teacher else None)
        return model

    def _start(self, network: StageSettings) -> Start:
        start = start_network(self.recipe, network, self.data.class_names)
        for note in start.notes:
            self.observer.note(note)
        for warning in start.warnings:
            self._warn(warning)
        return start

    def _train(self, stage: str, model: Classifier, method: Method, teacher: Classifier | None) -> None:
        settings = self.recipe.stage_training("teacher" if stage == "teacher" else "student")
        compute = choose(settings)
        learns = f"{model.architecture} learns from {teacher.architecture}" if teacher else model.architecture
        self.observer.stage(stage, f"{learns}, {settings.epochs} epoch{'' if settings.epochs == 1 else 's'}, {compute}")
        train_stage(
            stage,
            model,
            method,
            teacher,
            recipe=self.recipe,
            settings=settings,
            data=self.data,
            compute=compute,
            folder=self.folder.stage(stage),
            observer=self.observer,
            resume=self.resume,
        )

    # a bad teacher is said before the student's training is spent

    def _doubt_teacher(self) -> None:
        labels = np.asarray(self.data.val.labels)
        chance = np.bincount(labels).max() / len(labels)
        if self._val_top1("teacher") <= chance:
            self._warn(
                f"the teacher is no better than chance: top-1 {self._val_top1('teacher'):.1%} on val, "
                f"where always naming the largest class gives {chance:.1%}. Train it longer or with another "
                "learning rate, or give a better one with --teacher"
            )

    def _compare_with_baseline(self) -> None:
        teacher, baseline = self._val_top1("teacher"), self._val_top1("baseline")
        if teacher < baseline:
            self._warn(
                f"the teacher is worse than the baseline: top-1 {teacher:.1%} against {baseline:.1%} on val. "
                "Distilling from it may hurt; interrupt now to train a better one"
            )

    def _val_top1(self, stage: str) -> float:
        model = self.models[stage]
        if "val" not in model.facts:  # ready-made: measured once, here
            settings = self.recipe.stage_training("teacher")
            loader = split_loader(self.data.val, model.input, self.recipe, settings, self.compute)
            found, labels, _ = collect(model.module, loader, classes=len(model.class_names), device=self.compute.device)
            model.facts["val"] = {"top1": float((found.argmax(axis=1) == labels).mean())}
        return float(model.facts["val"]["top1"])

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.observer.warn(message)


def _refuse_changes(folder: RunFolder, recipe: Recipe) -> None:
    """A resumed run must be the same run."""
    before = _flat(yaml.safe_load(read_text(folder.recipe)))
    after = _flat(yaml.safe_load(dump_recipe(recipe)))
    changed = [
        f"  {key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in _FREE
    ]
    if changed:
        raise UsageError(
            f"--resume goes on with the same recipe, but {folder.recipe} has other settings:\n"
            + "\n".join(changed[:8])
            + "\nResume without these changes, or start another run with --name"
        )


def _refuse_other_data(folder: RunFolder, data: DataSplits) -> None:
    before = read_json(folder.path / "environment.json").get("data_fingerprint")
    if before != data.fingerprint:
        raise UsageError(
            f"--resume goes on with the same images, but {data.source} has changed since {folder.path} began.\n"
            "Put the former images back, or start another run with --name"
        )


def _refuse_own_weights(folder: RunFolder, recipe: Recipe) -> None:
    """--overwrite must not delete what the new run is to start from."""
    for name, network in (("teacher", recipe.teacher), ("student", recipe.student)):
        if network.weights and Path(network.weights).resolve().is_relative_to(folder.path.resolve()):
            raise UsageError(
                f"--overwrite would delete the {name}'s own weights, {network.weights}; choose another --name"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}{name}.").items()}
