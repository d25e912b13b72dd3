"""Recipes that say more than rounds can follow are refused, all problems at once."""

from collections.abc import Sequence

from potstill.errors import UsageError
from potstill.experiments.recipe import Recipe
from potstill.federated.algorithms import ALGORITHMS


def refuse_unfit(recipe: Recipe, names: Sequence[str]) -> None:
    """Settings that a client's few steps have no place for.

    Raises:
        UsageError: names each, and what to set it to.
    """
    training, problems = recipe.stage_training("student"), []
    asked = [
        (training.ema_decay is not None, "training.ema_decay", "null: weights are averaged among clients"),
        (training.int8_share > 0, "training.int8_share", "0: train for int8 afterwards, with `potstill run`"),
        (training.accumulate > 1, "training.accumulate", "1, and training.batch_size to what a client can hold"),
        (recipe.data.balance != "none", "data.balance", "none: nobody knows the classes' shares among all clients"),
        (recipe.data.target is not None, "data.target", "null: there is one domain"),
        (recipe.student.weights is not None, "student.weights", "null: all clients begin with new weights"),
        (bool(recipe.assistants), "assistants", "[]"),
        (recipe.generations > 1, "generations", "1"),
        (recipe.seeds > 1, "seeds", "1: give --seed, and repeat the command with others"),
    ]
    for wrong, key, value in asked:
        if wrong:
            problems.append(f"{key}: set it to {value}")
    if any(ALGORITHMS[name].guide == "teacher" for name in names):
        teachers = recipe.each_teacher
        if len(teachers) != 1 or teachers[0].weights is None:
            given = ", ".join(f"{each.model}{' without weights' * (each.weights is None)}" for each in teachers)
            problems.append(
                "guided: the server needs one teacher that is trained already: --teacher RUN, a folder that is there; "
                f"got {given}"
            )
    if problems:
        raise UsageError("\n".join(["this recipe cannot be trained by rounds:", *(f"  {each}" for each in problems)]))
