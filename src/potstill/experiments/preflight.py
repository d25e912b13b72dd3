"""Everything that can be found wrong before the first training step, found together."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from potstill.data.datasets import load_data
from potstill.data.doctor.findings import KINDS
from potstill.data.doctor.quick import findings_of, sentences
from potstill.data.image_files import sizes_of
from potstill.data.listing import Skipped
from potstill.data.native_noise import silenced
from potstill.data.splits import DataSplits
from potstill.data.square import unseen
from potstill.errors import PotstillError, UsageError
from potstill.experiments.data_needs import check_data_needs
from potstill.experiments.domain.checks import NO_TARGET
from potstill.experiments.method_settings import describe
from potstill.experiments.plan import Planned, plan
from potstill.experiments.recipe import Recipe
from potstill.experiments.rehearsal import create_stage_method, rehearse
from potstill.experiments.start import start_network
from potstill.experiments.view_plan import can_store, record_kind
from potstill.methods.wrapping.scheduled import Scheduled
from potstill.models.names import check_model
from potstill.processes.group import ALONE, Processes
from potstill.tracking.settings import refuse_missing
from potstill.training.devices import Compute, choose
from potstill.training.observer import Observer
from potstill.training.optimizers import optimizer_class
from potstill.training.settings import TrainingSettings
from potstill.training.sharing import refuse_alone


def check_all(
    recipe: Recipe,
    data: DataSplits | None,
    planned: Sequence[Planned] | None = None,
    observer: Observer | None = None,
    processes: Processes = ALONE,
) -> tuple[DataSplits, Compute, dict[str, str]]:
    """Check method, models, optimizers, device and data; load the data; rehearse what a method trains.

    ``planned``: the stages to come; all that the recipe wants where None.  ``observer``: is told how far the check of
    the files is.  ``processes``: that carry out the run together.

    Returns:
        Data, device, and for each stage that a method trains the table of its joined layers.

    Raises:
        PotstillError: all problems in one message, with the kind (and so the exit code) of the first.
    """
    planned = plan(recipe) if planned is None else planned
    settings = {stage.name: recipe.stage_training(stage.name) for stage in planned}
    checks: list[Callable[[], Any]] = [lambda: create_stage_method(recipe), lambda: refuse_missing(recipe.tracker)]
    for stage in planned:
        checks += [
            lambda name=stage.name: check_model(recipe.network(name).model),  # type: ignore[misc]
            lambda name=stage.name: optimizer_class(settings[name].optimizer),  # type: ignore[misc]
            lambda name=stage.name: choose(settings[name]),  # type: ignore[misc]
            lambda name=stage.name: refuse_alone(  # type: ignore[misc]
                create_stage_method(recipe), settings[name].optimizer, processes
            ),
        ]
    checks += [lambda: choose(recipe.stage_training("student"), processes)]
    checks += [lambda: _load(recipe, data, observer)]
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
    method, *_, compute, splits = results
    if recipe.domain is not None and splits.target is None:
        raise UsageError(NO_TARGET)
    for stage in planned:
        _refuse_metric(settings[stage.name], len(splits.class_names))
    if not any(stage.distils for stage in planned):
        for stage in planned:
            network = recipe.network(stage.name)
            if network.weights is not None:  # loaded again later; better twice than to fail after hours
                start_network(recipe, network, splits.class_names, splits.range)
        return splits, compute, {}
    augment = recipe.data.augment or splits.augment
    check_data_needs(
        method,
        mixes=augment.mixes,
        unlabeled=splits.unlabeled is not None,
        images=len(splits.train),
        batch_size=recipe.stage_training("student").batch_size,
        target=splits.target is not None,
    )
    if recipe.store.mode == "auto" and can_store(method):
        record_kind(recipe, method, len(splits.class_names))
    return splits, compute, rehearse(recipe, planned, splits)


def _refuse_metric(training: TrainingSettings, classes: int) -> None:
    if training.selection_metric == "top3" and classes <= 3:
        raise UsageError(
            f"training.selection_metric: top3 is 1 for any student of {classes} classes, so that it would always pick "
            "the first epoch; use top1 or nll"
        )


def _load(recipe: Recipe, data: DataSplits | None, observer: Observer | None) -> DataSplits:
    with silenced():  # every file is read
        return load_data(recipe.data, data, progress=observer)


def doubt_settings(recipe: Recipe, planned: Sequence[Planned], data: DataSplits, observer: Observer) -> list[str]:
    """Warn of settings without effect in trainings of this length, on this data.

    Returns:
        The warnings, for the report.
    """
    found: dict[str, None] = {}
    images, method = len(data.train), create_stage_method(recipe)
    for stage in planned:
        settings = recipe.stage_training(stage.name)
        for text in _without_effect(settings, images):
            found[f"{stage.role}: {text}"] = None
        if stage.distils:
            if 1 < settings.epochs < method.warmup_length:
                share = settings.epochs / method.warmup_length
                found[
                    f"{stage.role}: method {describe(recipe.method)} reaches its full weight after "
                    f"{method.warmup_length:g} epochs, and training ends at {share:.0%} of it with training.epochs "
                    f"{settings.epochs}; lower the method's warm-up, or train longer"
                ] = None
            if settings.epochs == 1 and any(isinstance(each, Scheduled) for each in method.modules()):
                found[f"{stage.role}: the method's schedule stays at its start in a training of one epoch"] = None
    for warning in found:
        observer.warn(warning)
    return list(found)


def _without_effect(training: TrainingSettings, images: int) -> Iterator[str]:
    batches = -(-images // training.batch_size)
    if training.batch_size > images:
        yield (
            f"training.batch_size {training.batch_size} is more than the {images} training images: each epoch is one "
            "step on all of them"
        )
    if training.accumulate > batches:
        yield (
            f"training.accumulate {training.accumulate} is more than the {batches} batches of an epoch: a step "
            f"averages {batches}"
        )
    if training.early_stopping is not None and training.early_stopping >= training.epochs:
        yield (f"training.early_stopping {training.early_stopping} cannot act within training.epochs {training.epochs}")
    if 1 < training.epochs <= training.warmup_epochs:
        also = "" if training.schedule == "constant" else ", and its schedule never acts"
        yield (
            f"training.warmup_epochs {training.warmup_epochs:g} is the whole training, so the learning rate reaches "
            f"training.lr in the last step only{also}"
        )


def doubt_data(data: DataSplits, observer: Observer, resize_mode: str = "crop") -> list[str]:
    """Tell what is wrong with data that can be trained on: repeated images, what `potstill check` has found in it, what
    is left out or not used, and what the network does not see of its images.

    Returns:
        What spoils the figures, for the report; the rest is only noted.
    """
    warnings, notes = list[str](), list[str]()
    for each in (data, data.target):
        if each is not None:
            more, also = sentences(findings_of(each), each.source)
            warnings += more
            notes += [*also, *(f"{each.source}: {note}" for note in each.notes)]
            notes += [f"{each.source}: {note}" for note in unseen(*sizes_of(each.train), resize_mode)]
    if skipped := data.all_skipped:
        warnings.append(skipped_text(skipped))
    for warning in warnings:
        observer.warn(warning)
    for note in notes:
        observer.note(note)
    return warnings


def skipped_text(skipped: Sequence[Skipped]) -> str:
    """How many files and classes ``data.skip_bad`` left out, by kind."""
    counts = Counter(KINDS[each.kind].what for each in skipped)
    kinds = ", ".join(f"{count:,} x {what}" for what, count in counts.most_common())
    return f"left out by data.skip_bad: {kinds}; skipped.csv lists them, such as {skipped[0].path}: {skipped[0].reason}"
