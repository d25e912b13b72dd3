"""Federated learning: the algorithms, their baselines, and the recipes that they accept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.config.recipe import Recipe
from potstill.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm: clients train and send their weights, the server averages them."""

    summary: str
    distils: bool = False  # the server trains on the clients' averaged logits of public images
    guided: bool = False  # local training, by the server's teacher


ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": Algorithm("clients train on labels, the server averages their weights"),
    "feddf": Algorithm("fedavg, then distil the clients' averaged logits on public images", distils=True),
    "guided": Algorithm("fedavg, with local training guided by the server's teacher", guided=True),
}
BASELINES = {
    "alone": "each client trains by itself for as many rounds; the mean over clients",
    "central": "one client trains on all images for as many rounds: an upper bound for federation",
}


def parse_names(text: str, known: Mapping[str, Any], kind: str) -> list[str]:
    """Return the names in a comma-separated list; an empty list for an empty text.

    ``kind`` ("algorithm" or "baseline") is for messages.

    Example:
        >>> parse_names("fedavg, feddf", ALGORITHMS, "algorithm"), parse_names("", BASELINES, "baseline")
        (['fedavg', 'feddf'], [])
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"no {kind} {name!r}{did_you_mean(name, known)}\nKnown: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UsageError(f"--{kind}s: name each of {', '.join(known)} at most once; got {text!r}")
    return names


def check_recipe(recipe: Recipe, names: Sequence[str]) -> None:
    """Check that federated rounds can apply every setting of the recipe."""
    if not names:
        raise UsageError(f"--algorithms: name one or more of {', '.join(ALGORITHMS)}")
    training = recipe.stage_training("student")
    unsupported = {
        "training.ema_decay: set it to null: the server averages weights over clients": training.ema_decay is not None,
        "training.qat_fraction: set it to 0: train for int8 afterwards, with `potstill run`": training.qat_fraction > 0,
        "training.gradient_accumulation_steps: set it to 1, and training.batch_size to what a client can hold": (
            training.gradient_accumulation_steps > 1
        ),
        "data.class_balance: set it to none: the class frequencies over all clients are unknown": (
            recipe.data.class_balance != "none"
        ),
        "data.target: set it to null: there is one domain": recipe.data.target is not None,
        "student.weights: set it to null: all clients start from new weights": recipe.student.weights is not None,
        "assistants: set it to []": bool(recipe.assistants),
        "born_again_generations: set it to 1": recipe.born_again_generations > 1,
        "seeds: set it to 1, and repeat the command with another --seed": recipe.seeds > 1,
    }
    problems = [text for text, found in unsupported.items() if found]
    if any(ALGORITHMS[name].guided for name in names):
        teachers = recipe.teacher_list
        if len(teachers) != 1 or teachers[0].weights is None:
            given = ", ".join(f"{each.model}{' without weights' * (each.weights is None)}" for each in teachers)
            problems.append(
                f"guided: the server needs one trained teacher: --teacher RUN, an existing run; got {given}"
            )
    if problems:
        raise UsageError("\n".join(["federated rounds cannot train this recipe:", *(f"  {each}" for each in problems)]))
