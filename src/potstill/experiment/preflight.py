"""Checks before the first training step: settings, data, devices, and a dry run of each stage on random images."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from potstill.config import stage_name, stage_role
from potstill.config.overrides import WITHOUT_FILE
from potstill.config.recipe import Recipe, StageSettings
from potstill.config.validation import TARGET_MISSING
from potstill.console import silence_native_stderr
from potstill.data.datasets import load_data
from potstill.data.decoded_cache import DecodeRequest, Square, StagedSquares, choose_cache
from potstill.data.entries import FINDING_KINDS, SkippedFile
from potstill.data.image_sets import SemiSupervisedSet, decoding_set, image_sizes
from potstill.data.preprocessing import crop_notes, decoded_square
from potstill.data.settings import AugmentSettings, DataSettings
from potstill.data.splits import SPLITS, DataSplits
from potstill.data.validation.validate import quick_findings, summary_messages
from potstill.distillation.distiller import Distiller
from potstill.distributed.group import SINGLE_PROCESS, ProcessGroup
from potstill.errors import DataError, PotstillError, UsageError
from potstill.experiment.builders import (
    build_distiller,
    build_network,
    describe_layers,
    folder_name,
    network_key,
    network_spec,
    take_deployed_network,
)
from potstill.experiment.plan import PlannedStage, plan_stages, trains_network
from potstill.experiment.probe import check_probe, fits_head
from potstill.experiment.teacher_cache import is_cacheable, record_kind
from potstill.input_spec import InputSpec
from potstill.loggers import check_loggers_installed
from potstill.methods import (
    create_method,
    describe_method,
    list_classless_methods,
    list_logit_methods,
    recipe_scaling,
)
from potstill.methods.base import Method
from potstill.methods.wrappers import ScheduledMethod
from potstill.models.families.opaque_models import (
    OpaqueNetwork,
    TableNetwork,
    example_answers,
    find_opaque,
    find_table,
)
from potstill.models.model_file import Classifier
from potstill.models.registry import check_model
from potstill.training.averaging import check_batch_norm
from potstill.training.callbacks import Observer
from potstill.training.devices import Compute, check_distributed_support, create_compute
from potstill.training.optim import get_optimizer_class, layer_lr_scales
from potstill.training.settings import TrainingSettings
from potstill.training.trainer import LabelLoss
from potstill.types import UNLABELED, Batch

MAX_ADAPTER_ROWS = 12  # in the output; layers.txt in the run folder lists all adapters
DRY_RUN_IMAGES = 4  # in a batch: enough for methods that compare images


def dry_run(recipe: Recipe, planned: Sequence[PlannedStage], data: DataSplits) -> dict[str, str]:
    """Run one step of each stage on random images, so that methods reject unfit networks, class counts and batch sizes.

    The networks are built for this only, and torch's random state is restored.  Return for each distilling stage the
    text on its feature pairs and adapters.
    """
    texts, networks = {}, dict[str, Classifier]()
    computes = [create_compute(recipe.stage_training(stage.name)) for stage in planned]
    devices = {compute.device for compute in computes if compute.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        for stage, compute in zip(planned, computes, strict=True):
            if stage.distils:
                texts[stage.name] = _dry_run_stage(stage, networks, recipe, data, compute)
    return texts


def create_stage_method(recipe: Recipe) -> Method:
    """Return a new instance of the recipe's method."""
    options = recipe.method | {"scaling": recipe_scaling(recipe.method)}
    return create_method(options.pop("name"), **options)


def _dry_run_stage(
    stage: PlannedStage, networks: dict[str, Classifier], recipe: Recipe, data: DataSplits, compute: Compute
) -> str:
    settings = recipe.stage_training(stage.name)
    for name in (*stage.teachers, stage.name):
        if name not in networks:
            network = recipe.network(name)
            start = build_network(recipe, network, data.class_names, data.range)
            if fits_head(network):
                check_probe(network, start, data, network_key(recipe, network))
            decay, is_trained = recipe.stage_training(name).layer_decay, network.head in ("finetune", "random")
            if decay is not None and (name == stage.name or is_trained):
                layer_lr_scales(start.module, decay)  # UsageError: its blocks are not known
            networks[name] = Classifier(start.module, start.architecture, data.class_names, start.input)
    if data.target is not None and recipe.domain_settings.adapt_batch_norm:
        for name in (name for name in stage.teachers if stage_role(name) == "teacher"):
            check_batch_norm(networks[name].module, f"{name} {networks[name].architecture}")
    student, method = networks[stage.name], create_stage_method(recipe)
    if method.needs.several and settings.batch_size < 2:
        raise UsageError(
            f"method {describe_method(recipe.method)} compares images with each other, and {stage.name} has a batch "
            "size of 1: set training.batch_size to 2 or more, or use kd"
        )
    for name in stage.teachers:
        if (table := find_table(networks[name].module)) is not None:
            _check_table(table, name, data)
        hidden = find_opaque(networks[name].module)
        if recipe.network(name).head == "none" and stage_role(name) == "teacher":
            _check_classless(method, hidden, recipe, name)
        elif hidden is not None and (method.needs.teacher_layers or method.teacher_taps):
            raise UsageError(
                f"method {describe_method(recipe.method)} reads more of the {name} than its logits, and {hidden.label} "
                f"gives nothing else; methods that work: {', '.join(list_logit_methods())}"
            )
    layout = compute.for_training(student.module)
    images = _RandomImages(data, student.input.size, settings, recipe.data.augment or data.augment, method, layout)
    distiller = build_distiller(
        stage,
        student,
        method,
        [networks[name] for name in stage.teachers],
        recipe=recipe,
        data=data,
        compute=compute,
        example=images.batch().images,
        label_loss=torch.nn.CrossEntropyLoss() if data.target is None and not data.teacher_labels else LabelLoss(),
    )
    try:
        with example_answers(networks[name].module for name in stage.teachers):
            _dry_run_step(distiller, images, settings, compute)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):  # the error of torch's BatchNorm
            raise UsageError(
                f"{stage.name} cannot be trained on batches of one image: its BatchNorm needs several; "
                "set training.batch_size to 2 or more"
            ) from error
        raise
    text = describe_layers(distiller, max_rows=MAX_ADAPTER_ROWS)
    take_deployed_network(student, distiller)
    return text


def _check_classless(method: Method, hidden: OpaqueNetwork | None, recipe: Recipe, name: str) -> None:
    """Check that a method can do without the classes of a teacher with ``head: none``."""
    what = f"method {describe_method(recipe.method)}"
    if method.needs.teacher_classes:
        reads = f"{what} reads the classes of the {name}, which has none (head: none)"
    elif hidden is not None and (method.needs.teacher_maps or method.teacher_taps):
        reads = f"{what} reads feature maps of the {name}, and {hidden.label} gives embeddings alone"
    else:
        return
    soft = "kd_weight" in method.OPTIONS and bool(getattr(method, "kd_weight", 0)) and not hasattr(method, "inner")
    advice = "; set method.kd_weight=0, or use one of" if soft else "; methods that work:"
    raise UsageError(f"{reads}{advice} {', '.join(list_classless_methods(embeddings_only=hidden is not None))}")


def _check_table(table: TableNetwork, name: str, data: DataSplits) -> None:
    if data.target is not None:
        raise UsageError(
            f"the {name} is a table of answers, and data.target needs a network: leave data.target out, or give the "
            "images of the target as data.source or data.unlabeled"
        )
    names = Counter(each for split in SPLITS for each in data.split(split).names)
    if doubled := [each for each, count in names.items() if count > 1]:
        raise DataError(
            f"a table of answers needs a name for each image, and {len(doubled):,} names are those of several, such as "
            f"{doubled[0]!r}"
        )
    table.answers(list(names))  # of all splits at once, so that the error counts all missing rows
    if (unlabeled := data.unlabeled) is not None:
        table.answers(unlabeled.names, folder_name(unlabeled))
    if unlabeled is not None and (both := names.keys() & set(unlabeled.names)):
        folder, paths = folder_name(unlabeled), set(table.paths)
        if wrong := sorted(each for each in both if f"{folder}/{each}" not in paths):
            raise DataError(
                f"{table.label}: {len(wrong):,} rows, such as {wrong[0]!r}, may be those of images of data.source or "
                f"of data.unlabeled: write {f'{folder}/{wrong[0]}'!r} for the unlabeled one"
            )


def _dry_run_step(distiller: Distiller, images: "_RandomImages", settings: TrainingSettings, compute: Compute) -> None:
    """Run the forward pass in train and eval mode, without gradients; methods with two phases run both."""
    if distiller.method.needs.prepare:
        distiller.prepare(images.passes)
    batch, staged = images.batch(), distiller.method.staged
    with torch.no_grad(), compute.autocast():
        for epoch, training in ((0, True), *([(settings.epochs - 1, True)] if staged else []), (0, False)):
            distiller.start_epoch(epoch, settings.epochs)
            distiller.train(training)
            distiller(**vars(batch if training else replace(batch, second=None, soft_labels=None)))
            if not training or not staged:
                batch.labels = batch.labels.clamp(min=0)  # on val every image has a label
    distiller.method.refuse_idle_schedules()


class _RandomImages:
    """Random images with the labels and ids of training images."""

    def __init__(
        self,
        data: DataSplits,
        size: int,
        settings: TrainingSettings,
        augment: AugmentSettings,
        method: Method,
        compute: Compute,
    ) -> None:
        self.data, self.size, self.augment, self.needs, self.compute = data, size, augment, method.needs, compute
        self.count = min(settings.batch_size, DRY_RUN_IMAGES)

    def batch(self) -> Batch:
        device, classes = self.compute.device, len(self.data.class_names)
        labels = np.asarray(self.data.train.labels)
        index = np.linspace(0, len(labels) - 1, self.count).astype(np.int64)  # of several classes
        chosen = torch.as_tensor(labels[index], dtype=torch.int64, device=device)
        if self.data.target is not None:
            chosen[:] = UNLABELED
        elif self.data.unlabeled is not None and (self.needs.teacher or self.needs.peers):
            chosen[-1] = UNLABELED
        known = (chosen != UNLABELED)[:, None]
        shares = torch.nn.functional.one_hot(chosen.clamp(min=0), classes) * known.float()
        return Batch(
            self._noise(),
            chosen,
            index=torch.as_tensor(index, device=device),
            view=torch.zeros(self.count, dtype=torch.int64, device=device),
            second=self._noise() if self.needs.second != "none" else None,
            soft_labels=0.7 * shares + 0.3 * shares.roll(1, dims=0) if self.augment.mixes else None,
        )

    def passes(self) -> Iterator[Batch]:
        """Yield one batch in place of a pass over the training images, for ``Distiller.prepare``."""
        batch = self.batch()
        batch.labels = batch.labels.clamp(min=0)
        yield batch

    def _noise(self) -> torch.Tensor:
        images = torch.randn(self.count, 3, self.size, self.size)
        return images.to(self.compute.device).to(memory_format=self.compute.memory_format)


def check_data_requirements(
    method: Method,
    *,
    mixes: bool,
    unlabeled: bool,
    target: bool = False,
    labeled: bool = True,
    classes: bool = True,
) -> None:
    """Check that a method fits the training images: mixed, without labels or classes."""
    needs, name = method.needs, method.label
    instead = "--method kd --alpha 0" if classes else "--method cosine or srd"
    problems = []
    if mixes and needs.second != "none":
        problems.append(
            f"{name} needs a second view of each image, and mixed images have none: switch mixup and cutmix off"
        )
    if mixes and needs.index:
        problems.append(f"{name} has a memory by sample, and a mixed image is no sample: switch mixup and cutmix off")
    if not labeled and (reason := _why_not_unlabeled(method)):
        problems.append(f"{name} {reason}, and there are none (--no-labels): use {instead}")
    elif not labeled and (weight := method.label_weight) > 0:
        problems.append(
            f"{name} gives the labels the weight {weight:g}, and there are none (--no-labels): set it to 0, with "
            f"--alpha 0 for kd or method.ce_weight=0, or use {instead}"
        )
    if target and (reason := _why_not_unlabeled(method)):
        problems.append(f"{name} {reason}: leave data.target out, or use kd or dist")
    elif unlabeled and (reason := _why_not_unlabeled(method)):
        problems.append(f"{name} {reason}: leave data.unlabeled out, or use kd or dist")
    if problems:
        raise UsageError("\n".join(problems))


def _why_not_unlabeled(method: Method) -> str | None:
    needs = method.needs
    reasons = {
        "needs the label of every image": needs.labels,
        "has a memory of the labeled samples": needs.index,
        "compares images of the same class": needs.second == "same class",
        "has layers for the labeled images of a batch alone": needs.batch_size,
        "has no teacher or peer to learn from on unlabeled images": not (needs.teacher or needs.peers),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_all(
    recipe: Recipe,
    data: DataSplits | None,
    planned: Sequence[PlannedStage] | None = None,
    observer: Observer | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Recipe, DataSplits, Compute, dict[str, str]]:
    """Check method, models, optimizers, device and data.

    Return the recipe, with method ``auto`` chosen for the number of classes, data, device and the texts of ``dry_run``.
    """
    planned = plan_stages(recipe) if planned is None else planned
    settings = {stage.name: recipe.stage_training(stage.name) for stage in planned}
    checks: list[Callable[[], Any]] = [
        lambda: create_stage_method(recipe),
        lambda: check_loggers_installed(recipe.tracker),
    ]
    for stage in planned:
        checks += [
            lambda name=stage.name: check_model(recipe.network(name).model),  # type: ignore[misc]
            lambda name=stage.name: get_optimizer_class(settings[name].optimizer),  # type: ignore[misc]
            lambda name=stage.name: create_compute(settings[name]),  # type: ignore[misc]
            lambda name=stage.name: check_distributed_support(  # type: ignore[misc]
                create_stage_method(recipe), settings[name].optimizer, processes
            ),
        ]
    checks += [lambda: create_compute(recipe.stage_training("student"), processes)]
    checks += [lambda: load_and_stage(recipe, planned, data, observer)]
    results: list[Any] = []
    problems: list[PotstillError] = []
    for check in checks:
        try:
            results.append(check())
        except PotstillError as error:
            if str(error) not in map(str, problems):
                problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    *_, compute, splits = results
    if splits.has_classes:
        recipe = recipe.with_chosen_method(len(splits.class_names))
    method = create_stage_method(recipe)
    if recipe.domain is not None and splits.target is None:
        raise UsageError(TARGET_MISSING)
    for stage in planned:
        if splits.has_classes:
            _check_metric(settings[stage.name], len(splits.class_names))
        elif stage.distils:
            _check_without_classes(method, settings[stage.name], splits)
    if not any(stage.distils for stage in planned):
        for stage in planned:
            network = recipe.network(stage.name)
            if network.weights is not None:  # loaded twice, so that errors come before training
                start = build_network(recipe, network, splits.class_names, splits.range)
                if fits_head(network):
                    check_probe(network, start, splits, network_key(recipe, network))
        return recipe, splits, compute, {}
    augment = recipe.data.augment or splits.augment
    check_data_requirements(
        method,
        mixes=augment.mixes,
        unlabeled=splits.unlabeled is not None,
        target=splits.target is not None,
        labeled=recipe.data.labeled,
        classes=splits.has_classes,
    )
    if recipe.teacher_cache.mode == "auto" and is_cacheable(method):
        record_kind(recipe, method, len(splits.class_names))
    return recipe, splits, compute, dry_run(recipe, planned, splits)


def _check_without_classes(method: Method, training: TrainingSettings, data: DataSplits) -> None:
    """Check that a training without labels and classes can be done and measured, and its best epoch be chosen."""
    if min(len(data.train), len(data.test)) < 2:
        raise DataError(
            f"{data.source}: embeddings are compared on two test images or more, and there are {len(data.train)} in "
            f"train, {len(data.test)} in test: give a folder with more"
        )
    if method.needs.training_only:
        raise UsageError(
            f"{method.label} measures nothing on val but labels, and there are none (--no-labels), so no "
            "epoch could be selected: use another method, such as cosine or srd"
        )
    if training.freeze:
        raise UsageError(
            f"training.freeze: {training.freeze} trains the head alone at first, and without labels and classes there "
            "is none: set it to 0"
        )


def _check_metric(training: TrainingSettings, classes: int) -> None:
    if training.selection_metric == "top3" and classes <= 3:
        raise UsageError(
            f"training.selection_metric: top3 is always 1 with {classes} classes, so the first epoch would be "
            "selected; use top1 or nll"
        )


def load_and_stage(
    recipe: Recipe,
    planned: Sequence[PlannedStage],
    data: DataSplits | None = None,
    observer: Observer | None = None,
    settings: DataSettings | None = None,
) -> DataSplits:
    """Load and check the data; keep the squares of new files until the loaders of these stages take them.

    Which squares they need is known but for networks whose weights are files; those decode what is missing.
    """
    train, others = training_squares(recipe, planned, recipe.data.augment), set[Square]()
    for name, network, spec in _known_specs(recipe, planned):
        others.add(decoded_square(spec))
        if network.weights is not None and (fits_head(network) or stage_role(name) == "teacher"):
            train.add(decoded_square(spec))  # a head is fitted to images as they are
    if recipe.data.folds is not None:  # each image is in every split of some fold
        train = others = train | others
    staged = StagedSquares({"train": train, "val": others, "test": others}, recipe.data.cache_fraction)
    with silence_native_stderr():  # every file is read
        return load_data(recipe.data if settings is None else settings, data, progress=observer, staged=staged)


def training_squares(recipe: Recipe, planned: Sequence[PlannedStage], augment: AugmentSettings | None) -> set[Square]:
    """Return the squares that the training images of these stages are decoded to, as far as networks are known."""
    random_crops = augment is not None and augment.crop_scale is not None
    trained = [stage for stage in planned if trains_network(recipe, stage)]
    return {decoded_square(spec, random_crops=random_crops) for _, _, spec in _known_specs(recipe, trained)}


def _known_specs(recipe: Recipe, planned: Sequence[PlannedStage]) -> Iterator[tuple[str, StageSettings, InputSpec]]:
    """Yield name, settings and preprocessing of the networks of these stages but those whose weights are a file."""
    for name in dict.fromkeys(name for stage in planned for name in (stage.name, *stage.teachers)):
        network = recipe.network(name)
        if network.weights in (None, *WITHOUT_FILE):
            with contextlib.suppress(UsageError):  # an unknown network, which another check reports
                yield name, network, network_spec(recipe, network)


def choose_training_cache(
    recipe: Recipe, planned: Sequence[PlannedStage], data: DataSplits, compute: Compute
) -> tuple[Recipe, str]:
    """Return the recipe of a new run with what ``data.cache: auto`` means, and a sentence unless raw pixels fit."""
    if recipe.data.cache != "auto":
        return recipe, ""
    images, _, identity = decoding_set(
        data.train if data.unlabeled is None else SemiSupervisedSet(data.train, data.unlabeled),
        f"{data.fingerprint}/train",
    )
    squares = sorted(training_squares(recipe, planned, recipe.data.augment or data.augment))
    cache, note = choose_cache(
        [DecodeRequest(images, side, mode, identity or "") for side, mode in squares],
        device=compute.device,
        cache_fraction=recipe.data.cache_fraction,
        processes=compute.processes.local_count,
    )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": cache})}), note


MIN_IMAGES_PER_GPU = 32  # in a batch


def small_batch_warning(batch_size: int, processes: int, device: torch.device) -> str:
    """Return a warning if each of several GPUs gets few images of a batch; else "".

    Example:
        >>> small_batch_warning(64, 4, torch.device("cuda"))
        'training.batch_size 64 is the batch of all processes: each of 4 GPUs gets 16 images, ...
        >>> small_batch_warning(128, 4, torch.device("cuda")), small_batch_warning(8, 1, torch.device("cuda"))
        ('', '')
    """
    own = batch_size // processes
    if processes == 1 or device.type != "cuda" or own >= MIN_IMAGES_PER_GPU:
        return ""
    return (
        f"training.batch_size {batch_size} is the batch of all processes: each of {processes} GPUs gets {own} images, "
        f"too few to keep it busy, and BatchNorm normalises by so many. {processes * MIN_IMAGES_PER_GPU} or more, with "
        "a learning rate to match, use them well (training.sync_batch_norm=true normalises by the whole batch)"
    )


def warn_about_settings(
    recipe: Recipe,
    planned: Sequence[PlannedStage],
    data: DataSplits,
    observer: Observer,
    compute: Compute | None = None,
) -> list[str]:
    """Return warnings about settings without effect for so many epochs and images, and about small batches."""
    texts: dict[str, None] = {}  # in order, without repetitions
    images, method = len(data.train), create_stage_method(recipe)
    for stage in (each for each in planned if trains_network(recipe, each)):
        settings = recipe.stage_training(stage.name)
        label = stage.role if stage.repeat else stage.name  # once for all seeds, and for each of several teachers
        for text in _without_effect(settings, images):
            texts[f"{label}: {text}"] = None
        if compute is not None and (
            text := small_batch_warning(settings.batch_size, compute.processes.count, compute.device)
        ):
            texts[f"{label}: {text}"] = None
        if stage.distils:
            if 1 < settings.epochs < (length := method.warmup_length(settings.epochs)):
                share = settings.epochs / length
                texts[
                    f"{label}: method {describe_method(recipe.method)} reaches its full weight after "
                    f"{length:g} epochs, and training ends at {share:.0%} of it with training.epochs "
                    f"{settings.epochs}; lower the method's warm-up, or train longer"
                ] = None
            if method.label_weight == 0 and recipe.data.labeled:
                for text in _of_labels_alone(recipe, settings):
                    texts[f"{label}: {text}"] = None
            if settings.epochs == 1 and any(isinstance(each, ScheduledMethod) for each in method.modules()):
                texts[f"{label}: the method's schedule stays at its start value in one epoch"] = None
    if any(stage.distils for stage in planned):
        for position, weight in enumerate(recipe.teachers.weights or (), start=1):
            if weight == 0:
                name = stage_name("teacher", position)
                texts[f"{name} has the weight 0 in teachers.weights, so it costs time and teaches nothing"] = None
    augment = recipe.data.augment or data.augment
    tables = any(teacher.model == "table" for teacher in recipe.teacher_list)
    if tables and any(stage.distils for stage in planned) and not augment.changes_nothing:
        mixed = "; mixed images are taught the mixed answers" if augment.mixes else ""
        texts[
            "the teacher is a table with one answer for each image: every view of an image is taught the answer for "
            f"the whole image, also a crop that shows something else{mixed}. Baseline and distilled student see the "
            "same views, so their comparison is fair"
        ] = None
    for warning in texts:
        observer.warn(warning)
    return list(texts)


def _without_effect(training: TrainingSettings, images: int) -> Iterator[str]:
    batches = -(-images // training.batch_size)
    if training.batch_size > images:
        yield (
            f"training.batch_size {training.batch_size} is more than the {images} training images: each epoch is one "
            "step"
        )
    if training.gradient_accumulation_steps > batches:
        yield (
            f"training.gradient_accumulation_steps {training.gradient_accumulation_steps} is more than the "
            f"{batches} batches of an epoch: a step averages {batches}"
        )
    if training.early_stopping_patience is not None and training.early_stopping_patience >= training.epochs:
        yield (
            f"training.early_stopping_patience {training.early_stopping_patience} has no effect with "
            f"training.epochs {training.epochs}"
        )
    if 1 < training.epochs <= training.warmup_epochs:
        consequence = "" if training.schedule == "constant" else ", and its schedule has no effect"
        yield (
            f"training.warmup_epochs {training.warmup_epochs:g} is the whole training, so the learning rate reaches "
            f"training.lr in the last step only{consequence}"
        )


def _of_labels_alone(recipe: Recipe, training: TrainingSettings) -> Iterator[str]:
    """Yield what changes the label term alone, for a method without one."""
    key = "method.alpha" if recipe.method["name"] == "kd" else "method.ce_weight"
    found = [f"training.label_smoothing {training.label_smoothing:g}"] if training.label_smoothing else []
    if recipe.data.class_balance == "weights":
        found.append("data.class_balance: weights")
    for setting in found:
        yield (
            f"{setting} has no effect, as the method {describe_method(recipe.method)} has no label term: the baseline "
            f"is trained with it, this student without. {key} gives the labels a weight"
        )


def warn_about_data(data: DataSplits, observer: Observer, resize_mode: str = "crop") -> list[str]:
    """Report findings of the quick data check, files left out, and cropped parts of images; return the warnings."""
    warnings, notes = list[str](), list[str]()
    for each in (data, data.target):
        if each is not None:
            new_warnings, new_notes = summary_messages(quick_findings(each), each.source)
            warnings += new_warnings
            notes += [*new_notes, *(f"{each.source}: {note}" for note in each.notes)]
            notes += [f"{each.source}: {note}" for note in crop_notes(*image_sizes(each.train), resize_mode)]
    if skipped := data.all_skipped:
        warnings.append(describe_skipped(skipped))
    for warning in warnings:
        observer.warn(warning)
    for note in notes:
        observer.note(note)
    return warnings


def describe_skipped(skipped: Sequence[SkippedFile]) -> str:
    """Return a sentence on the files and classes that ``data.skip_bad`` left out, by kind."""
    counts = Counter(FINDING_KINDS[each.kind].what for each in skipped)
    kinds = ", ".join(f"{count:,} x {what}" for what, count in counts.most_common())
    return f"left out by data.skip_bad: {kinds}; skipped.csv lists them, such as {skipped[0].path}: {skipped[0].reason}"
