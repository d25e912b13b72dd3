"""What further seeds cost, said before the first of them is trained."""

from collections.abc import Sequence

from potstill.amounts import count, duration
from potstill.experiments.forecast import seconds_per_image
from potstill.experiments.plan import Planned, of_stage
from potstill.experiments.recipe import Recipe
from potstill.models.classifier import Classifier
from potstill.training.devices import Compute


def seeds_text(recipe: Recipe, planned: Sequence[Planned]) -> str:
    """How many trainings the seeds make; "" where there is but one seed.

    Example:
        >>> from potstill.experiments.plan import plan
        >>> from potstill.experiments.recipe import load_recipe
        >>> recipe = load_recipe("quickstart", ["seeds=3"])
        >>> print(seeds_text(recipe, plan(recipe)))
        seeds 0, 1, 2: baseline and distilled are trained with each of them, 6 trainings, all with the same teacher
    """
    if recipe.seeds == 1:
        return ""
    seeds = sorted({of_stage(recipe, stage).seed for stage in planned})
    shown = ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{seeds[0]} to {seeds[-1]}"
    trained = [stage.role for stage in planned if stage.role in ("baseline", "distilled")]
    who = " and ".join(dict.fromkeys(trained)) + (" is" if len(set(trained)) == 1 else " are")
    teacher = ", all with the same teacher" if any(stage.teachers for stage in planned) else ""
    fixed = recipe.data.augmentation_seed
    views = "" if fixed is None else f"; data.augmentation_seed={fixed}: no seed varies the views"
    return f"seeds {shown}: {who} trained with each of them, {count(len(trained))} trainings{teacher}{views}"


def seconds_text(recipe: Recipe, planned: Sequence[Planned], student: Classifier, images: int, compute: Compute) -> str:
    """What the further seeds take, from one timed training step of the student; "" where there are none to come.

    Args:
        recipe: says how many seeds and epochs.
        planned: the stages to come.
        student: before its training; a copy of it is timed.
        images: of the training split.
        compute: where.
    """
    further = [stage for stage in planned if stage.repeat]
    if not further:
        return ""
    settings = recipe.stage_training("student")
    each = settings.epochs * images * seconds_per_image(student, settings.batch_size, compute)
    total = each * len(further) / max(1, compute.processes.count)
    seeds = len({stage.repeat for stage in further})
    more = "the further seed takes" if seeds == 1 else f"the {count(seeds)} further seeds take"
    return (
        f"{more} about {duration(total)} ({count(len(further))} trainings of {count(settings.epochs)} "
        f"epoch{'' if settings.epochs == 1 else 's'}; more where the teacher is asked in every step)"
    )
