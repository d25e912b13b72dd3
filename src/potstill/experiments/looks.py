"""How often a run has looked at its test split, and what was trained after a look; for the verdict and the report."""

from collections.abc import Sequence
from typing import Any

from potstill.experiments.plan import Planned, of_stage
from potstill.experiments.recipe import Recipe
from potstill.experiments.run_folder import RunFolder

KEY = "looks"  # in environment.json


def add_look(folder: RunFolder, recipe: Recipe, planned: Sequence[Planned]) -> None:
    """Record in environment.json that the test split is about to be evaluated.

    The record is written before the first test image is read, so that a run that was killed meanwhile counts too.
    Evaluating the same stages of the same lengths again (after an interruption) is no further look.
    """
    look = {
        "seeds": recipe.seeds,
        "epochs": recipe.stage_training("student").epochs,
        "stages": [stage.name for stage in planned],
    }
    before = looks_so_far(folder)
    if not before or before[-1] != look:
        folder.add_to_environment({KEY: [*before, look]})


def looks_so_far(folder: RunFolder) -> list[dict[str, Any]]:
    """The looks recorded in environment.json, the first one first."""
    return list(folder.read_environment().get(KEY) or []) if folder.environment.exists() else []


def describe_looks(looks: Sequence[dict[str, Any]], recipe: Recipe, planned: Sequence[Planned]) -> dict[str, Any]:
    """``looks`` of results.json.

    Args:
        looks: as recorded, the present one last.
        recipe: of the run.
        planned: its stages.

    Returns:
        ``test_evaluations``: how often different sets of trained stages were evaluated on test; ``seeds``, and of them
        ``seeds_at_first_look`` and ``seeds_added_after_look``; ``epochs_added_after_look``; ``test_every_epoch``:
        whether test curves were drawn while training; ``augmentation_seeds``: how many different ones the seeds have
        (1: no seed varies the views).
    """
    first, last = looks[0], looks[-1]
    seeds = {of_stage(recipe, stage).augmentation_seed for stage in planned if stage.role in ("baseline", "distilled")}
    return {
        "test_evaluations": len(looks),
        "seeds": last["seeds"],
        "seeds_at_first_look": first["seeds"],
        "seeds_added_after_look": max(0, last["seeds"] - first["seeds"]),
        "epochs_added_after_look": max(0, last["epochs"] - first["epochs"]),
        "test_every_epoch": any(recipe.stage_training(stage.name).evaluate_test_every_epoch for stage in planned),
        "augmentation_seeds": max(1, len(seeds)),
    }


def different_views(first: str, views: Any, second: str, others: Any) -> str:
    """A sentence on two trainings that were not on the same views of the training images; "" where they were.

    Args:
        first: what the first training is called.
        views: of its stage, as ``loaders.views_seen`` gives them; None where they were not recorded.
        second: what the second training is called.
        others: its views.

    Example:
        >>> few = {"count": 8, "augmentation_seed": 0, "sha256": "a"}
        >>> different_views("a", few, "b", few)
        ''
        >>> print(different_views("a", few, "b", {"count": 12, "augmentation_seed": 3, "sha256": "b"}))
        a and b were not trained on the same views of the images (8 views and 12 views; augmentation seeds 0 and \
3), so their difference is not that of the method alone
        >>> print(different_views("a", few, "b", None))
        whether a and b were trained on the same views of the images is not recorded
    """
    if not isinstance(views, dict) or not isinstance(others, dict):
        return f"whether {first} and {second} were trained on the same views of the images is not recorded"
    if views.get("sha256") == others.get("sha256"):
        return ""
    differ = []
    if views.get("count") != others.get("count"):
        differ.append(f"{views.get('count')} views and {others.get('count')} views")
    if views.get("augmentation_seed") != others.get("augmentation_seed"):
        differ.append(f"augmentation seeds {views.get('augmentation_seed')} and {others.get('augmentation_seed')}")
    how = "; ".join(differ) or "other images, another input size or another augmentation"
    return (
        f"{first} and {second} were not trained on the same views of the images ({how}), so their difference is not "
        "that of the method alone"
    )
