"""Everything that can be found wrong before the first training step, found together."""

from collections.abc import Callable, Sequence
from typing import Any

from potstill.data.datasets import load_data
from potstill.data.doctor.quick import findings_of, sentences
from potstill.data.native_noise import silenced
from potstill.data.splits import DataSplits
from potstill.errors import PotstillError, UsageError
from potstill.experiments.data_needs import check_data_needs
from potstill.experiments.domain.checks import NO_TARGET
from potstill.experiments.plan import Planned, plan
from potstill.experiments.recipe import Recipe
from potstill.experiments.rehearsal import create_stage_method, rehearse
from potstill.experiments.start import start_network
from potstill.experiments.view_plan import can_store, record_kind
from potstill.models.names import check_model
from potstill.processes.group import ALONE, Processes
from potstill.tracking.settings import refuse_missing
from potstill.training.devices import Compute, choose
from potstill.training.observer import Observer
from potstill.training.optimizers import optimizer_class
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


def _load(recipe: Recipe, data: DataSplits | None, observer: Observer | None) -> DataSplits:
    with silenced():  # every file is read
        return load_data(recipe.data, data, progress=observer)


def doubt_data(data: DataSplits, observer: Observer) -> list[str]:
    """Tell what is wrong with data that can be trained on: repeated images, and what `potstill check` has found in it.

    Returns:
        What spoils the figures, for the report; the rest is only noted.
    """
    warnings, notes = sentences(findings_of(data), data.source)
    if data.target is not None:
        more, also = sentences(findings_of(data.target), data.target.source)
        warnings, notes = warnings + more, notes + also
    for warning in warnings:
        observer.warn(warning)
    for note in notes:
        observer.note(note)
    return warnings
