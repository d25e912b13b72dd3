"""How many views a run draws in turn, and whether and how the teacher's answers to them are kept."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from potstill.amounts import scaled
from potstill.cache import cache_folder
from potstill.data.splits import DataSplits
from potstill.errors import UsageError
from potstill.experiments.method_settings import describe
from potstill.experiments.recipe import Recipe, load_recipe
from potstill.methods.base import Method
from potstill.store.records import Record

FEWEST = 8  # views, where there are as many epochs
SHARE_OF_EPOCHS = 4  # one view for so many epochs, where there are many
SHARE_OF_DISK = 0.1  # of what is free
_WIDE = 2048  # of embeddings, where nobody knows yet

Views = int | Literal["all"]


@dataclass(frozen=True)
class Plan:
    """What a run does about storing."""

    views: Views  # drawn in turn, by baseline and distilled alike
    stores: bool
    note: str = ""  # for people; empty where there is nothing to say


def root_folder(recipe: Recipe) -> Path:
    """Where the recipe's stores stand."""
    return Path(recipe.store.folder).expanduser() if recipe.store.folder else cache_folder("teachers")


def can_store(method: Method) -> bool:
    """Whether all that the method asks of the teacher can be kept."""
    return method.needs.storable and not method.teacher_taps


def record_kind(recipe: Recipe, method: Method, classes: int) -> Literal["float16", "float32", "top16"]:
    """What is kept of a teacher's logits.

    Raises:
        UsageError: the 16 largest do not suffice for this method, or are all there are.
    """
    kind = recipe.store.record
    if kind != "top16":
        return "float16" if kind == "auto" else kind
    if classes <= 64:
        raise UsageError(f"store.record top16 is for more than 64 classes, and there are {classes}: use float16")
    if method.soft_temperature is None or method.needs.embedding:
        raise UsageError(
            f"store.record top16 keeps the 16 largest logits and the mass of the others, which suffices for kd; method "
            f"{describe(recipe.method)} reads all of them: use float16"
        )
    return kind


def plan_views(recipe: Recipe, method: Method, data: DataSplits) -> Plan:
    """How many views are drawn in turn, and whether answers are kept.

    ``auto``: one view for every four epochs, but eight at least (and no more than epochs), and as many as fit into a
    tenth of the free disk.  One where views do not differ.  All where nothing is stored.  What the recipe asks for by
    number is shown in any case, but not stored where it would take more than half of the free disk.
    """
    wish, epochs = recipe.store.views, recipe.stage_training("student").epochs
    if recipe.store.mode == "off" or not can_store(method):
        return Plan("all" if wish == "auto" else wish, False)
    size, free = _bytes_per_view(recipe, method, data), _free(root_folder(recipe))
    if wish != "auto":
        wanted = epochs if wish == "all" else min(wish, epochs)
        if wanted * size <= free / 2:
            return Plan(wish, True)
        needed = f"{wanted} views take {scaled(wanted * size, 'B')}, more than half of the free disk"
        return Plan(wish, False, f"teacher outputs are not stored: {needed} of {root_folder(recipe)}")
    fitting = int(SHARE_OF_DISK * free / size)
    if fitting == 0:
        return Plan("all", False, f"teacher outputs are not stored: no room in {root_folder(recipe)}")
    if (recipe.data.augment or data.augment).changes_nothing:
        return Plan(1, True)
    wanted = min(epochs, max(FEWEST, math.ceil(epochs / SHARE_OF_EPOCHS)))
    less = f"store: only {fitting} of {wanted} views fit into a tenth of the free disk" if fitting < wanted else ""
    return Plan(min(wanted, fitting), True, less)


def with_views(recipe: Recipe, views: Views) -> Recipe:
    """The recipe with what "auto" means here, so that its file in the run folder says what was done."""
    return recipe.model_copy(update={"store": recipe.store.model_copy(update={"views": views})})


def with_views_of(path: Path, recipe: Recipe) -> Recipe:
    """For a run that goes on: "auto" means what it meant when the run began, whatever the disk says today.

    Args:
        path: recipe.yaml of the run folder.
        recipe: as it is asked for now.
    """
    if recipe.store.views != "auto":
        return recipe
    before = load_recipe(path, data_needed=False).store.views
    return with_views(recipe, "all" if before == "auto" else before)


def _bytes_per_view(recipe: Recipe, method: Method, data: DataSplits) -> int:
    classes = len(data.class_names)
    data = data.measured  # of a target more may be stored than the teacher will be sure of
    images = len(data.train) + (0 if data.unlabeled is None else len(data.unlabeled))
    record = Record(record_kind(recipe, method, classes), classes, _WIDE if method.needs.embedding else 0)
    stores = max(1, len(recipe.each_teacher)) * (1 if method.needs.second == "none" else 2)
    return images * record.nbytes * stores


def _free(folder: Path) -> int:
    """Bytes free where the folder is or will be."""
    try:
        existing = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
        return shutil.disk_usage(existing).free
    except OSError:
        return 0
