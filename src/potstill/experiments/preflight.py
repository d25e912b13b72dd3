"""Everything that can be found wrong before the first training step, found together."""

from collections.abc import Callable
from typing import Any

from potstill.data.datasets import load_data
from potstill.data.splits import DataSplits
from potstill.errors import PotstillError
from potstill.experiments.recipe import Recipe
from potstill.experiments.start import start_network
from potstill.methods import create_method
from potstill.models.names import check_model
from potstill.training.devices import Compute, choose
from potstill.training.optimizers import optimizer_class


def check_all(recipe: Recipe, data: DataSplits | None) -> tuple[DataSplits, Compute]:
    """Check method, models, optimizers, device and data; load the data.

    Raises:
        PotstillError: all problems in one message, with the kind (and so the exit code) of the first.
    """
    options = dict(recipe.method)
    checks: list[Callable[[], Any]] = [
        lambda: create_method(options.pop("name"), **options),
        lambda: check_model(recipe.teacher.model),
        lambda: check_model(recipe.student.model),
        lambda: optimizer_class(recipe.stage_training("teacher").optimizer),
        lambda: optimizer_class(recipe.stage_training("student").optimizer),
        lambda: choose(recipe.stage_training("teacher")),
        lambda: choose(recipe.stage_training("student")),
        lambda: load_data(recipe.data, data),
    ]
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
    for network in (recipe.teacher, recipe.student):
        if network.weights is not None:  # loaded again later; better twice than to fail after the teacher's hours
            start_network(recipe, network, splits.class_names)
    return splits, compute
