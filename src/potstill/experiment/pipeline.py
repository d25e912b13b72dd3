"""Runs: train and evaluate the stages of a recipe, in one process or several, of which the first writes."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.config import STAGES, stage_name, stage_number, stage_role
from potstill.config.recipe import Recipe, StageSettings, load_recipe
from potstill.data.file_datasets import check_output_outside
from potstill.data.image_sets import RelabeledSet
from potstill.data.loader import Loader
from potstill.data.splits import SPLITS, DataSplits
from potstill.distillation.teachers import FoldHeads
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import PotstillError, UsageError
from potstill.evaluation.cost import count_parameters
from potstill.evaluation.fidelity import class_order
from potstill.evaluation.significance import mcnemar
from potstill.experiment.builders import (
    InitialNetwork,
    build_network,
    folder_name,
    network_key,
    split_loader,
    train_loader,
)
from potstill.experiment.curriculum import apply_curriculum
from potstill.experiment.domain_adaptation import Domains
from potstill.experiment.ensembles import predict_images, predict_together
from potstill.experiment.estimate import describe_seeds, estimate_stages
from potstill.experiment.folds import run_folds
from potstill.experiment.plan import (
    PlannedStage,
    choose_networks,
    derive_seed,
    lengthen_short_trainings,
    plan_stages,
    restore_choices,
    stage_recipe,
)
from potstill.experiment.preflight import (
    check_all,
    choose_training_cache,
    create_stage_method,
    warn_about_data,
    warn_about_settings,
)
from potstill.experiment.probe import (
    ProbedTeacher,
    check_probe,
    copy_fold_heads,
    fits_head,
    load_fold_heads,
    probe_teacher,
    probes_by_default,
)
from potstill.experiment.reproduce import RunRecord, check_same_images, write_beginning
from potstill.experiment.results import (
    describe_missing_labels,
    describe_run,
    describe_unlabeled,
    evaluate_embeddings,
    evaluate_stages,
)
from potstill.experiment.resume import (
    changed_code,
    check_same_baseline,
    check_same_data,
    check_same_recipe,
    check_weights_outside,
    describe_test_evaluations,
    describe_view_difference,
    extended_stages,
    folder_of_baseline,
    images_used_before,
    record_test_evaluation,
    recorded_test_evaluations,
)
from potstill.experiment.run_folder import RunFolder, find_model, open_run_folder
from potstill.experiment.stage import train_stage
from potstill.experiment.teacher_cache import (
    ViewPlan,
    apply_view_plan,
    open_prediction_cache,
    plan_views,
    restore_view_plan,
)
from potstill.hub import model_path
from potstill.io import read_bytes, write_bytes
from potstill.loggers.observer import logging_observer
from potstill.methods import create_method, describe_method, needs_teacher
from potstill.models.families.opaque_models import TableNetwork, find_table
from potstill.models.model_file import Classifier, load_model, save_model
from potstill.training.autotune import PrecisionSelector, ThreadSelector
from potstill.training.callbacks import Observer, SignalHandler, SilentObserver
from potstill.training.checkpointing import FIGURES, LAST, restore_metrics_file
from potstill.training.devices import Compute, create_compute, idle_gpus, return_freed_memory

_MAX_CLASSES = 10  # classes that a message lists
MANY_WEIGHTS, MANY_IMAGES = 20_000_000, 10_000  # of a network from scratch, and the images that such a one wants
SIGN_TEST_LEVEL = 0.05  # level of the one-sided sign test by which a model is below the baseline on val
_BEYOND_CHANCE = f"more than chance explains (sign test on these images, p < {SIGN_TEST_LEVEL})"


def run(
    recipe: Recipe,
    *,
    output_dir: Path = Path("runs"),
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stages: tuple[str, ...] = STAGES,
    data: DataSplits | None = None,
    observer: Observer | None = None,
    stopping: SignalHandler | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    reproduce: RunRecord | None = None,
    evaluate: bool = True,
    baseline: Path | None = None,
) -> Path:
    """Train and evaluate the stages of a recipe; return the run folder.

    ``stages`` of teacher, baseline, distilled are trained; distilled alone needs a trained teacher if the method has
    one. ``reproduce``: record of a run to repeat on the same images with as many threads.  ``evaluate=False`` stops
    after training: no metrics on test, no results.json; ``resume`` adds them later.  ``baseline``: folder of another
    run, whose baseline is used.  After a signal (``stopping``), training stops at the end of its step and saves a
    checkpoint. The first of ``processes`` writes, into a folder that all see.
    """
    started = time.monotonic()
    stages = _complete_stages(recipe, stages)
    planned, observer = plan_stages(recipe, stages), observer or SilentObserver()
    if not planned and not recipe.data.labeled:
        raise UsageError("there is no baseline: it learns from labels, and with data.labeled: false there are none")
    if not planned:
        raise UsageError(f"there is no teacher to train: method {describe_method(recipe.method)} needs none")
    name = recipe.name if name is None else name
    if data is None:
        check_output_outside(recipe.data, output_dir / name)
    if recipe.data.folds is not None and recipe.data.fold is None:
        if set(stages) != set(STAGES) or not evaluate:
            raise UsageError(
                f"data.folds (--folds) is for a whole run, of {', '.join(STAGES)}, with its test results: name "
                "one fold with data.fold, or leave it out"
            )
        return run_folds(
            partial(run, stopping=stopping, processes=processes),
            recipe,
            output_dir / name,
            data,
            observer,
            processes,
            baseline,
            resume=resume,
            overwrite=overwrite,
        )
    extended: dict[str, list[int]] = {}
    reused = None if baseline is None else folder_of_baseline(baseline, output_dir / name)
    with (
        open_run_folder(output_dir, name, processes, resume=resume, overwrite=overwrite) as folder,
        ExitStack() as stack,
    ):
        if resume:
            recipe = restore_choices(load_recipe(folder.recipe, data_needed=False, recorded=True), recipe)
            recipe = restore_view_plan(folder.recipe, recipe)
            check_same_recipe(folder, recipe)
            extended = extended_stages(folder, recipe, planned)
        if overwrite:
            check_weights_outside(folder, recipe)
        recipe, replaced = processes.share(choose_networks(recipe))
        recorded = folder.read_environment() if resume else reproduce.environment if reproduce is not None else None
        replaced = replaced or (recorded or {}).get("replaced_networks", [])
        record = folder.add_to_environment if processes.first else None
        threads = ThreadSelector(recorded, record, processes=processes)
        precisions = PrecisionSelector(recorded, record, processes=processes)
        first_seed = [stage for stage in planned if not stage.repeat]  # further seeds train the same networks
        before = recipe.method
        recipe, splits, compute, layers = check_all(recipe, data, first_seed, observer, processes)
        if recipe.method != before:
            observer.note(f"method auto: {recipe.method['name']}, as there are {len(splits.class_names)} classes")
        if resume:
            check_same_data(folder, splits)
        if reproduce is not None:
            check_same_images(reproduce, splits.fingerprint, splits.as_rows())
        given = recipe.stage_training("student").epochs
        recipe = lengthen_short_trainings(recipe, len(splits.train))
        if (longer := recipe.stage_training("student")).epochs > given:
            observer.note(
                f"student: {longer.epochs} epochs in place of {given}: {longer.min_steps} steps or more "
                "(training.min_steps)"
            )
        view_plan = processes.share(plan_views(recipe, create_stage_method(recipe), splits))
        recipe = apply_view_plan(recipe, view_plan)
        cache_note = ""
        if not resume and reproduce is None:  # else as when the run began
            whole = plan_stages(recipe)  # a stage that is trained alone sees the pixels of a whole run
            recipe, cache_note = processes.share(choose_training_cache(recipe, whole, splits, compute))
        if reused is not None:
            check_same_baseline(reused, recipe, splits)
        processes.highest(0)  # a barrier: the first process now writes files that the others have read
        if processes.first:
            if overwrite:  # after all checks: a refused run deletes nothing
                folder.clear()
            facts = threads.facts | precisions.facts
            write_beginning(folder, recipe, splits, compute, facts, replaced, resume=resume)
            trackers = stack.enter_context(
                logging_observer(recipe.tracker, folder.path, recipe.model_dump(mode="json"), observer)
            )
            observer = trackers
        if recipe.teacher_list and "distilled" in stages and not needs_teacher(recipe.method):
            observer.note(f"method {describe_method(recipe.method)} needs no teacher: none is trained")
        for stage, table in layers.items():
            if table:
                observer.note(f"{stage}: {table}")
        view_note = view_plan.note if "distilled" in stages else ""
        for text in filter(None, (idle_gpus(compute), cache_note, view_note, describe_seeds(recipe, planned))):
            observer.note(text)
        experiment = _Experiment(
            folder,
            recipe,
            splits,
            compute,
            observer,
            resume,
            view_plan,
            threads,
            precisions,
            stopping,
            planned,
            extended,
            reused,
        )
        experiment.warn_about_start([*replaced, *(changed_code(folder, recipe) if resume else ())])
        with threads:
            left = [
                stage
                for stage in planned
                if not (resume and folder.trained(stage.name))
                and not (reused is not None and stage.role == "baseline" and reused.trained(stage.name))
            ]
            observer.expect(partial(estimate_stages, recipe, left, splits, compute))
            experiment.train()
            if not evaluate:  # a trial of a sweep, which must not see the test split
                return folder.path
            evaluated = experiment.evaluate()
        if not processes.first:
            return folder.path
        seconds = time.monotonic() - started
        predicted, names = experiment.predicted, list(experiment.evaluated_models)
        results = describe_run(folder.path.name, recipe, predicted, names, evaluated, seconds, experiment.warnings)
        for stage, model in experiment.evaluated_models.items():
            folder.check_epochs(stage, model.facts.get("lines"))
        folder.write_results(results)
        trackers.results(results)
    return folder.path


def _complete_stages(recipe: Recipe, stages: tuple[str, ...]) -> tuple[str, ...]:
    """Return the stages to train, with the teacher's before a distilled student that needs its ready teacher."""
    if not stages or any(stage not in STAGES for stage in stages):
        raise UsageError(f"stages must be some of {', '.join(STAGES)}, got {list(stages)}")
    if "distilled" not in stages or "teacher" in stages or not needs_teacher(recipe.method):
        return stages
    if any(teacher.weights is None for teacher in recipe.teacher_list):
        raise UsageError(
            "the distilled stage alone needs a trained teacher: give its run or model folder with "
            "--teacher, or train all stages with `potstill run`"
        )
    return ("teacher", *stages)


@dataclass
class _Experiment:
    folder: RunFolder
    recipe: Recipe
    data: DataSplits
    compute: Compute
    observer: Observer
    resume: bool
    view_plan: ViewPlan  # of the teacher cache
    threads: ThreadSelector
    precisions: PrecisionSelector
    stopping: SignalHandler | None
    planned: tuple[PlannedStage, ...]
    extended: dict[str, list[int]]  # finished stages that get more epochs -> numbers of epochs so far
    reused: RunFolder | None  # the run whose baseline is reused
    warnings: list[str] = field(default_factory=list)
    models: dict[str, Classifier] = field(default_factory=dict)
    fold_heads: dict[str, FoldHeads | None] = field(default_factory=dict)  # of teachers, for the training images
    teacher_below_baseline: list[dict[str, Any]] = field(default_factory=list)  # on val
    class_orders: dict[str, str] = field(default_factory=dict)  # teachers of another class order -> what to write
    not_distilled: str = ""  # why the run ends before its distilled student; "": it does not

    def __post_init__(self) -> None:
        self.predicted = self.data  # without labels: with the teacher's predictions in their place
        self.domains = Domains(self.recipe, self.data, self.compute, self.observer, self.warn)

    @property
    def evaluated_models(self) -> dict[str, Classifier]:
        """Return the models of the run in the planned order, but for teachers without classes, which predict none."""
        names = (stage.name for stage in self.planned if not _has_no_classes(self.recipe, stage.name))
        return {name: self.models[name] for name in names if name in self.models}

    def warn_about_start(self, first: Sequence[str]) -> None:
        """Warn of what is known of data and settings before anything is trained; ``first``: other warnings."""
        if self.data.teacher_labels:
            self.warn(describe_missing_labels(self.data))
        for text in first:
            self.warn(text)
        self.warnings += warn_about_data(self.data, self.observer, self.recipe.data.resize_mode)
        self.warnings += warn_about_settings(self.recipe, self.planned, self.data, self.observer, self.compute)
        if self._has_unlabeled and any(stage.role == "distilled" for stage in self.planned):
            unlabeled = describe_unlabeled(self.recipe, self.data)
            self.observer.note(unlabeled["sentence"])
            if unlabeled["passes"] < 1:
                self.warn(
                    f"the distilled student sees {unlabeled['passes']:.0%} of the unlabeled images: train for more "
                    "epochs (an epoch is one pass over the labeled images), or raise data.unlabeled_share"
                )

    def train(self) -> None:
        """Train the planned stages, or those until the teacher turns out to do harm."""
        # Pretrained teachers first, so that their accuracy is reported before anything is trained.
        for stage in sorted(
            self.planned,
            key=lambda stage: not (stage.role == "teacher" and self.recipe.network(stage.name).weights is not None),
        ):
            if self.not_distilled and stage.name not in ("teacher", "baseline"):
                continue
            if stage.role != "teacher":
                self.label_by_teachers()
            self.run_stage(stage)
        self.label_by_teachers()

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the trained models on test; return the facts of the run with their metrics."""
        facts: dict[str, Any] = {"teacher_below_baseline": self.teacher_below_baseline}
        if classless := [name for name in self.models if _has_no_classes(self.recipe, name)]:
            facts["teachers_without_classes"] = {name: _describe_classless(self.models[name]) for name in classless}
        if self._has_unlabeled and self.data.unlabeled is not None:
            facts["unlabeled_images"] = len(self.data.unlabeled)
        if self.not_distilled:
            facts["not_distilled"] = self.not_distilled
        if self.compute.processes.first:
            planned = tuple(stage for stage in self.planned if stage.name in self.evaluated_models)
            record_test_evaluation(self.folder, self.recipe, planned)
            looks = recorded_test_evaluations(self.folder)
            facts["looks"] = describe_test_evaluations(looks, self.recipe, planned)
        if (fold := self.recipe.data.fold) is not None:
            facts["fold"] = "all" if fold == "all" else f"fold {fold} of {self.recipe.data.folds}"
        facts["views_differ"] = _view_differences(self.evaluated_models)
        for sentence in facts["views_differ"]:
            self.warn(sentence)
        if not self.data.has_classes:
            return evaluate_embeddings(self.folder, self.models, self.recipe, self.data, self.compute, facts)
        return evaluate_stages(
            self.folder, self.evaluated_models, self.recipe, self.predicted, self.compute, self.observer, facts
        )

    @property
    def _has_unlabeled(self) -> bool:
        """Whether there are images without labels that are not the target domain's."""
        return self.data.unlabeled is not None and self.data.target is None

    def run_stage(self, stage: PlannedStage) -> Classifier:
        started = time.monotonic()
        if self._done(stage):
            self.observer.note(f"{stage.name}: already trained")
            model = load_model(self.folder.stage(stage.name))
            if self.compute.processes.first:
                restore_metrics_file(self.folder.stage(stage.name))
                self.folder.check_epochs(stage.name, model.facts.get("lines"))
            self.compute.place(model.module, stage.name)
        elif self.reused is not None and stage.role == "baseline" and self.reused.trained(stage.name):
            model = self._reuse(stage, self.reused)
        else:
            model = self._train(stage)
        self.models[stage.name] = model
        if stage.role == "teacher":
            self._check_teacher(stage.name)
            if stage.name not in self.fold_heads:
                self.fold_heads[stage.name] = load_fold_heads(self.folder.stage(stage.name), model.facts, self.data)
            self.domains.adapt(model, stage.name, self.folder.stage(stage.name))
        elif stage.name == "baseline" and not self.recipe.data.target_labels:  # otherwise their val images differ
            self._compare_with_baseline()
        elif stage.role == "distilled" and not self.recipe.data.target_labels:
            self._compare_distilled(stage)
        self.observer.stage_end(stage.name, time.monotonic() - started)
        return_freed_memory()
        return model

    def label_by_teachers(self) -> None:
        """Use the teachers' predictions as labels of the splits that have none, and for all metrics."""
        if self.predicted is not self.data or not (self.data.has_classes and self.data.teacher_labels):
            return
        teachers = {name: model for name, model in self.models.items() if stage_role(name) == "teacher"}
        found: dict[str, Any] = {}
        for split in self.data.teacher_labels:
            loader = partial(self._split_loader, split=split)
            predicted = predict_together(teachers, loader, self.recipe.teachers, self.compute, split)
            labels: Any = None
            if predicted is not None:
                labels = predicted.argmax(axis=1).astype(np.int64)
                if split == "val":
                    self._describe_predictions(predicted)
            found[split] = RelabeledSet(self.data.split(split), self.compute.processes.share(labels))
        self.predicted = replace(self.data, **found)
        self.data = replace(self.data, **{split: each for split, each in found.items() if split != "train"})
        self.domains.data = self.data

    def _describe_predictions(self, probabilities: Any) -> None:
        """Report which classes the teachers name, and warn if it is only one."""
        names, predicted = self.data.class_names, probabilities.argmax(axis=1)
        counts = sorted(zip(np.bincount(predicted, minlength=len(names)).tolist(), names, strict=True), reverse=True)
        listed = ", ".join(f"{name} {count:,}" for count, name in counts[:_MAX_CLASSES] if count)
        unnamed = sum(not count for count, _ in counts)
        more = f"; {unnamed:,} of {len(names):,} classes are not among them" if unnamed else ""
        self.observer.note(
            f"no labels: the teacher names the classes. On {len(predicted):,} val images: {listed}{more}; mean "
            f"confidence {float(probabilities.max(axis=1).mean()):.1%}"
        )
        if counts[0][0] == len(predicted):
            self.warn(
                f"the teacher predicts {counts[0][1]!r} for every val image, so there is nothing to learn: these "
                "images may be of other classes than the teacher's, or prepared in another way (data.mean, data.std)"
            )

    def _done(self, stage: PlannedStage) -> bool:
        return self.resume and self.folder.trained(stage.name) and stage.name not in self.extended

    def _reuse(self, stage: PlannedStage, other: RunFolder) -> Classifier:
        model = load_model(other.stage(stage.name))
        self.observer.stage(stage.name, f"{model.architecture}, reused from {other.path}")
        model.facts["reused_from"] = str(other.path)
        if self.compute.processes.first:
            other.check_epochs(stage.name, model.facts.get("lines"))
            folder = self.folder.stage(stage.name)
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / "metrics.jsonl", read_bytes(other.stage(stage.name) / "metrics.jsonl"))
            self.folder.check_epochs(stage.name, model.facts.get("lines"))
            save_model(model, folder)
        self.compute.place(model.module, stage.name)
        return model

    def _train(self, stage: PlannedStage) -> Classifier:
        recipe, classes, folder = stage_recipe(self.recipe, stage), self.data.class_names, self.folder.stage(stage.name)
        torch.manual_seed(derive_seed(recipe.seed, stage.seed))  # baseline and distilled start from the same weights
        start = self._start(recipe.network(stage.name))
        facts, changed, groups = dict(start.facts), start.remodelled, start.output_groups
        model = Classifier(start.module, start.architecture, classes, start.input, facts, changed, groups, start.pruned)
        if recipe.network(stage.name).weights is None:
            self._warn_about_scale(stage, count_parameters(start.module))
        if stage.role == "previous":
            self._check_previous_data(start)
        elif stage.role == "teacher" and start.facts.get("weights"):
            self._check_teacher_data(str(start.facts["weights"]))
        if stage.role in ("teacher", "previous") and start.ready:
            self.observer.stage(stage.name, f"{start.architecture}, not trained: {start.facts['weights']}")
            if (table := find_table(model.module)) is not None:
                self.observer.note(f"{stage.name}: {_unused_rows(table, self.data)}")
            self.compute.place(model.module, stage.name)
            weights = recipe.network(stage.name).weights
            if "fold_heads" in model.facts.get("head", {}) and weights is not None:  # a probe of another run
                source = find_model(model_path(weights))
                self.fold_heads[stage.name] = load_fold_heads(source, model.facts, self.data)
                if self.compute.processes.first:
                    copy_fold_heads(source, folder)
            if self.compute.processes.first:
                save_model(model, folder)
            return model
        probed = self._probe(stage, model, start)
        if probed is not None and recipe.network(stage.name).head != "finetune":
            if self.compute.processes.first:
                save_model(model, folder)
            return model
        method = create_stage_method(recipe) if stage.distils else create_method("supervised")
        data = self.domains.stage_data(stage, self.models)
        if stage.distils and data is not self.data:
            model.facts["domain"] = self.domains.facts()
        settings = recipe.stage_training(stage.name)
        compute = create_compute(settings, self.compute.processes)
        data = apply_curriculum(data, stage, self.models, recipe, compute, self.observer, self.fold_heads)
        train = train_loader(
            stage, method.needs, model.input, recipe=recipe, data=data, compute=compute, observer=self.observer
        )
        self.threads.select(
            model.module, model.input.size, settings, compute, workers=train.processes, observer=self.observer
        )
        compute = self.precisions.select(
            model.module,
            model.architecture,
            model.input.size,
            settings,
            compute,
            images=train.count,
            observer=self.observer,
        )
        self.observer.stage(stage.name, self._detail(stage, model, settings.epochs, compute))
        if lengths := self.extended.get(stage.name):
            checkpoints = folder / "checkpoints"
            if (checkpoints / LAST).exists() and not (checkpoints / FIGURES).exists():
                self.observer.note(
                    f"{stage.name}: extended from {lengths[-1]} to {settings.epochs} epochs; it continues from its "
                    f"last checkpoint with the schedule of {settings.epochs} epochs"
                )
            else:
                self.observer.note(
                    f"{stage.name}: extended from {lengths[-1]} to {settings.epochs} epochs, trained again from the "
                    "start: its last checkpoint was deleted when it was finished (training.keep_checkpoint=true keeps "
                    "it)"
                )
        train_stage(
            stage,
            model,
            method,
            [self.models[name] for name in stage.teachers],
            train,
            recipe=recipe,
            data=data,
            compute=compute,
            folder=folder,
            observer=self.observer,
            resume=self.resume,
            stopping=self.stopping,
            teacher_folders=[self.folder.stage(name) for name in stage.teachers] if self.view_plan.record else None,
            fold_heads=[self.fold_heads.get(name) for name in stage.teachers] if self.data.target is None else (),
            probed=probed,
            use_cache=self.view_plan.use_cache,
            extended_from=self.extended.get(stage.name, ()),
        )
        return model

    def _check_previous_data(self, start: InitialNetwork) -> None:
        """Warn if the previous model was not trained on this split of the data."""
        facts = load_model(find_model(model_path(start.facts["weights"]))).facts.get("data") or {}
        if facts.get("fingerprint") != self.data.fingerprint:
            self.warn(
                f"{start.facts['weights']} was not trained on these images in this split: images that it was trained "
                "on may be in test here, where it would look better, and have more negative flips counted, than on new "
                "images"
            )

    def _check_teacher_data(self, weights: str) -> None:
        """Warn if a teacher was trained by a run on images that are test here."""
        run = next((each for each in (Path(weights), Path(weights).parent) if (each / "splits.csv").is_file()), None)
        if run is None or self.data.target is not None:
            return
        same = False
        with suppress(PotstillError):  # a recipe that was edited, or of another version, is no reason to end this run
            recipe = load_recipe(run / "recipe.yaml", data_needed=False, recorded=True)
            same = Path(recipe.data.source).resolve() == Path(self.data.source).resolve()
        if seen := images_used_before(run, self.data.test, same_data=same):
            self.warn(
                f"{weights} was trained on {len(seen):,} of the {len(self.data.test):,} test images, such as "
                f"{seen[0]}, in another split of these images: its accuracy on test and its lead are too high. Train "
                "the teacher on this split"
            )

    def _probe(self, stage: PlannedStage, model: Classifier, start: InitialNetwork) -> ProbedTeacher | None:
        network, settings = self.recipe.network(stage.name), self.recipe.stage_training(stage.name)
        key, by_default = network_key(self.recipe, network), probes_by_default(network, start, stage.role)
        if not (by_default or fits_head(network)):
            return None
        data = self.domains.stage_data(stage, self.models)
        try:
            layer = check_probe(network, start, data, key)
        except UsageError as error:
            if not by_default:
                raise
            self.warn(
                f"the {stage.name} gets a new, random head and is trained with all layers, since no probe can be "
                f"fitted: {error}"
            )
            return None
        if by_default:
            unused = f"; {key}.training has no effect then" if network.training else ""
            self.observer.note(
                f"{key}.head is not set, and {network.weights} was trained on other classes: the default is probe, a "
                f"linear head on frozen embeddings{unused}. {key}.head=finetune trains all layers after that, "
                f"{key}.head=random from a random head"
            )
        self.observer.stage(stage.name, f"{model.architecture}, a linear probe of {start.facts['weights']}")
        probed = probe_teacher(
            stage,
            model,
            layer,
            recipe=self.recipe,
            data=data,
            compute=create_compute(settings, self.compute.processes),
            folder=self.folder.stage(stage.name),
            observer=self.observer,
        )
        if network.head != "finetune":
            self.fold_heads[stage.name] = probed.heads
            model.facts["head"]["default"] = by_default
        return probed

    def _detail(self, stage: PlannedStage, model: Classifier, epochs: int, compute: Compute) -> str:
        teachers = ", ".join(
            each.architecture
            + ("" if stage_role(name) == "teacher" else f" ({name})")
            + ("" if each.input.size == model.input.size else f" at {each.input.size} px")
            for name, each in ((name, self.models[name]) for name in stage.teachers)
        )
        learns = f"{model.architecture} learns from {teachers}" if teachers else model.architecture
        seed = f", seed {stage_recipe(self.recipe, stage).seed}" if stage.repeat else ""
        return f"{learns}{seed}, {epochs} epoch{'' if epochs == 1 else 's'}, {compute}"

    def _start(self, network: StageSettings) -> InitialNetwork:
        start = build_network(self.recipe, network, self.data.class_names, self.data.range)
        for note in start.notes:
            self.observer.note(note)
        for warning in start.warnings:
            self.warn(warning)
        return start

    def _warn_about_scale(self, stage: PlannedStage, weights: int) -> None:
        images, device = len(self.data.train), self.compute.device.type
        if weights > MANY_WEIGHTS and (images < MANY_IMAGES or device == "cpu") and not stage.repeat:
            self.warn(
                f"{stage.name}: {weights / 1e6:,.0f} million weights from scratch want many thousands of images and a "
                f"GPU; here are {images:,} images, and the device is {device}. For photographs, `potstill run photos` "
                "starts from pretrained weights"
            )

    def _check_teacher(self, name: str) -> None:
        if _has_no_classes(self.recipe, name):
            self.observer.note(f"{name}: no classes, so no accuracy: its embeddings teach")
            return
        if self.data.teacher_labels:
            return  # its accuracy is unknown
        labels = np.asarray(self.data.val.labels)
        chance = np.bincount(labels).max() / len(labels)
        if "training" not in self.models[name].facts and "val" not in self.models[name].facts:
            self.observer.note(f"{name}: top-1 {self._val_top1(name):.1%} on {len(labels):,} val images")
        if self._val_top1(name) <= chance and name not in self.class_orders:
            self.warn(
                f"the {name} is no better than chance: top-1 {self._val_top1(name):.1%} on val, "
                f"where always predicting the largest class gives {chance:.1%}. Train it longer or with another "
                "learning rate, or give a better teacher with --teacher"
            )

    def _compare_with_baseline(self) -> None:
        baseline, images = self._val_top1("baseline"), len(self.data.val)
        stopping = self.recipe.teacher_below_baseline == "stop"
        known = [
            each for each in self.models if stage_role(each) == "teacher" and not _has_no_classes(self.recipe, each)
        ]
        teachers = {name: self._val_top1(name) for name in known}
        stops = bool(teachers) and stopping and all(self._is_clearly_below(name, "baseline") for name in teachers)
        for name, top1 in teachers.items():
            if top1 < baseline:
                found = {"teacher": name, "teacher_val_top1": top1, "baseline_val_top1": baseline, "val_images": images}
                if name in self.class_orders:
                    found["other_class_order"] = True
                self.teacher_below_baseline.append(found)
                figures = f"top-1 {top1:.1%} against {baseline:.1%} on {images:,} val images"
                text = f"the {name} is below the baseline: {figures}"
                advice = self._advise_on_teacher(name)
                if not stops:
                    self.warn(f"{text}. Distilling from it may hurt. {advice}")
                    continue
                if name in self.class_orders:
                    advice += "\n"
                else:
                    advice = f"Use the baseline, or distil from a better teacher. {advice}. "
                self.not_distilled = (
                    f"No distilled student was trained, because it would probably be worse than the baseline: {text}, "
                    f"{_BEYOND_CHANCE}. {advice}To distil all the same: "
                    "--resume --set teacher_below_baseline=warn"
                )
        if stops:
            self.warn(self.not_distilled)

    def _compare_distilled(self, stage: PlannedStage) -> None:
        baseline, images = stage_name("baseline", stage_number(stage.name)), len(self.data.val)
        if baseline not in self.models or "domain" in self.models[stage.name].facts:
            return
        ours, theirs = self._val_top1(stage.name), self._val_top1(baseline)
        if self._is_clearly_below(stage.name, baseline):
            self.warn(
                f"{stage.name} is below {baseline}: top-1 {ours:.1%} against {theirs:.1%} on {images:,} val images, "
                f"{_BEYOND_CHANCE}. Use {self.folder.stage(baseline)}, train longer (--epochs), or give the "
                "labels more weight (--alpha, for kd)"
            )

    def _is_clearly_below(self, stage: str, baseline: str) -> bool:
        """Return whether a model is below the baseline on val by more than chance explains."""
        if self._val_top1(stage) >= self._val_top1(baseline):
            return False
        pair = [self._predict_val(name) for name in (baseline, stage)]
        right = [found == np.asarray(self.data.val.labels) for found in pair if found is not None]
        return self.compute.processes.share(bool(right) and is_below(*right))

    def _advise_on_teacher(self, teacher: str) -> str:
        """Return what to do about a teacher that is worse than the baseline."""
        if teacher in self.class_orders:  # a better teacher would not help
            return self.class_orders[teacher]
        advice, network = "Give another teacher with --teacher", self.recipe.network(teacher)
        if "fold_heads" in self.models[teacher].facts.get("head", {}) and network.head in (None, "probe"):
            advice = f"Fine-tune it with --set {network_key(self.recipe, network)}.head=finetune, or give another"
        if "training" in self.models[teacher].facts:  # it was trained here
            key = "teacher" if len(self.recipe.teacher_list) == 1 else f"teacher.{stage_number(teacher) - 1}"
            epochs = self.recipe.stage_training(teacher).epochs
            advice = f"Train it longer, e.g. --set {key}.training.epochs={4 * epochs}, or give another with --teacher"
        method = self.recipe.method
        if method.get("name") == "kd":
            advice += "; or give the labels more weight: --set method.alpha=0.9 (at 1, the teacher has no effect)"
        return advice

    def _val_top1(self, stage: str) -> float:
        model = self.models[stage]
        if "val" not in model.facts:  # not trained here
            top1 = 0.0
            if (predicted := self._predict_val(stage)) is not None:
                labels = np.asarray(self.data.val.labels)
                top1 = float((predicted == labels).mean())
                self._check_class_order(stage, predicted, labels)
            model.facts["val"] = {"top1": self.compute.processes.share(top1)}
        return float(model.facts["val"]["top1"])

    def _predict_val(self, stage: str) -> "np.ndarray[Any, Any] | None":
        """Return the classes [N] that a model predicts on val; None but in the first process."""
        model = self.models[stage]
        loader = self._split_loader(model, "val", stage)
        cache = open_prediction_cache(
            model, loader, "val", stage=stage, recipe=self.recipe, data=self.data, folder=self.folder.stage(stage),
            compute=self.compute, warn=self.observer.warn,
        )  # fmt: skip
        found = predict_images(model, loader, self.compute, f"the {stage} on val", cache)
        return None if found is None else found.argmax(axis=1)

    def _split_loader(self, model: Classifier, split: str, stage: str = "teacher") -> Loader:
        settings = self.recipe.stage_training(stage)
        return split_loader(self.data, split, model.input, self.recipe, settings, self.compute, network=model.module)

    def _check_class_order(self, stage: str, predicted: Any, labels: Any) -> None:
        classes = self.data.class_names
        order = class_order(predicted, labels, len(classes))
        if order is None:
            return
        names = [classes[i] for i in order]
        key = "teacher" if len(self.recipe.teacher_list) == 1 else f"teacher.{stage_number(stage) - 1}"
        advice = (
            f"The {stage} seems to have the classes in another order: top-1 on val is "
            f"{float((order[predicted] == labels).mean()):.1%} with its outputs reordered, "
            f"{float((predicted == labels).mean()):.1%} without. Give the class of each output with\n"
            f"  --set {shlex.quote(f'{key}.classes={json.dumps(names, ensure_ascii=False)}')}"
        )
        if self.recipe.teacher_below_baseline == "stop" and all(
            stage_role(each.name) != "baseline" for each in self.planned
        ):  # which would show how bad it is
            raise UsageError(f"{advice}\nTo use it all the same: --set teacher_below_baseline=warn")
        self.class_orders[stage] = advice
        self.warn(advice[0].lower() + advice[1:])

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.observer.warn(message)


def _has_no_classes(recipe: Recipe, stage: str) -> bool:
    """Return whether a stage is a teacher of embeddings alone, which is not evaluated."""
    return stage_role(stage) == "teacher" and recipe.network(stage).head == "none"


def _describe_classless(model: Classifier) -> dict[str, Any]:
    sentence = (
        f"The teacher {model.architecture} ({model.facts['weights']}) has no classes: it taught by what it computes of "
        "the images, and has no accuracy."
    )
    facts = {"architecture": model.architecture, "weights": model.facts["weights"], "size": model.input.size}
    return facts | {"sentence": sentence}


def _unused_rows(table: TableNetwork, data: DataSplits) -> str:
    """Return how many rows of a table belong to images of the data."""
    used = {name for split in SPLITS for name in data.split(split).names}
    if data.unlabeled is not None:
        folder = folder_name(data.unlabeled)
        used |= {each for name in data.unlabeled.names for each in (name, f"{folder}/{name}")}
    unused = [path for path in table.paths if path not in used]
    rows = len(table.paths)
    return f"{rows - len(unused):,} of {rows:,} rows belong to images of this data" + (
        f"; not used: {len(unused):,}, such as {unused[0]!r}" if unused else ""
    )


def is_below(baseline: np.ndarray, other: np.ndarray) -> bool:
    """Return whether a model has fewer images right ([N] bool) than the baseline, by a one-sided sign test at 5 %.

    Example:
        >>> baseline = np.ones(20, dtype=bool)
        >>> is_below(baseline, np.arange(20) >= 5), is_below(baseline, np.arange(20) >= 4)  # p = 1/32 and 1/16
        (True, False)
    """
    return bool(other.sum() < baseline.sum()) and mcnemar(baseline, other)["p"] < 2 * SIGN_TEST_LEVEL


def _view_differences(models: Mapping[str, Classifier]) -> list[str]:
    """Return a sentence for each seed whose baseline and distilled student were not trained on the same views."""
    found = []
    for name in (name for name in models if stage_role(name) == "distilled"):
        other = stage_name("baseline", stage_number(name))
        if other in models and "domain" not in models[name].facts:  # there the images differ on purpose
            ours, theirs = models[name].facts.get("views"), models[other].facts.get("views")
            if sentence := describe_view_difference(other, theirs, name, ours):
                found.append(sentence)
    return found
