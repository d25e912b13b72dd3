"""How many views a run draws in turn, and whether and how the teacher's answers to them are kept.

The views and the kind of record follow from recipe and data alone, so that no weight depends on the free disk: that
only decides whether the records are kept on disk, or made anew in every step from the live teacher's answers.
"""

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
from potstill.store.records import FEW_CLASSES, Kind, Record

FEWEST = 8  # views, where there are as many epochs
SHARE_OF_EPOCHS = 4  # one view for so many epochs, where there are many
LARGE = 10e9  # bytes of one seed's float16 records, from which the 16 largest logits are kept where they suffice
SHARE_OF_DISK = 0.25  # of what is free, that stores may take
_WIDE = 2048  # of embeddings, before the teacher is loaded

Views = int | Literal["all"]


@dataclass(frozen=True)
class Plan:
    """What a run does about views and their answers.

    Attributes:
        views: drawn in turn, by baseline and distilled alike.
        record: what is kept of a teacher's logits; None: the method trains on the live answers, not on records.
        keeps: whether the records are kept on disk.
        note: for people; empty where there is nothing to say.
    """

    views: Views
    record: Kind | None
    keeps: bool
    note: str = ""


def root_folder(recipe: Recipe) -> Path:
    """Where the recipe's stores stand."""
    return Path(recipe.store.folder).expanduser() if recipe.store.folder else cache_folder("teachers")


def can_store(method: Method) -> bool:
    """Whether all that the method asks of the teacher can be kept."""
    return method.needs.storable and not method.teacher_taps


def plan_views(recipe: Recipe, method: Method, data: DataSplits) -> Plan:
    """How many views are drawn in turn, and whether and how answers are kept.

    Raises:
        UsageError: a kind of record that does not suffice for the method.
    """
    views = views_in_turn(recipe)
    if recipe.store.mode == "off" or not can_store(method):
        return Plan(views, None, False)
    classes = len(data.class_names)
    kind = record_kind(recipe, method, classes)
    size = _bytes_of_seed(recipe, method, data, kind)
    if recipe.store.record == "auto" and size > LARGE and suffices(method, classes):
        kind = "top16"
        size = _bytes_of_seed(recipe, method, data, kind)
    needed, room = recipe.seeds * size, SHARE_OF_DISK * _free(root_folder(recipe))
    if needed <= room:
        return Plan(views, kind, True)
    seeds = f" of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    note = (
        f"teacher outputs are not stored: {_shown(recipe)} views{seeds} take {scaled(needed, 'B')}, more than a "
        f"quarter of the free disk of {root_folder(recipe)}; the teacher runs in every step, on the same views"
    )
    if kind != "top16" and suffices(method, classes):
        smaller = recipe.seeds * _bytes_of_seed(recipe, method, data, "top16")
        if smaller <= room:
            note += f" (--set store.record=top16 takes {scaled(smaller, 'B')})"
    return Plan(views, kind, False, note)


def views_in_turn(recipe: Recipe) -> Views:
    """How many views are drawn in turn; equal for all methods.

    ``auto``: one view for every four epochs of the student, but eight at least, and no more than epochs.

    Example:
        >>> [views_in_turn(load_recipe("quickstart", [f"training.epochs={epochs}"])) for epochs in (5, 12, 32, 240)]
        [5, 8, 8, 60]
    """
    wish, epochs = recipe.store.views, recipe.stage_training("student").epochs
    return min(epochs, max(FEWEST, math.ceil(epochs / SHARE_OF_EPOCHS))) if wish == "auto" else wish


def record_kind(recipe: Recipe, method: Method, classes: int) -> Kind:
    """What the recipe keeps of a teacher's logits; float16 where it leaves that open.

    Raises:
        UsageError: the 16 largest do not suffice for this method, or are all there are.
    """
    kind = recipe.store.record
    if kind != "top16":
        return "float16" if kind == "auto" else kind
    if classes <= FEW_CLASSES:
        raise UsageError(
            f"store.record top16 is for more than {FEW_CLASSES} classes, and there are {classes}: use float16"
        )
    if not suffices(method, classes):
        raise UsageError(
            f"store.record top16 keeps the 16 largest logits and the mass of the others, which suffices for kd; method "
            f"{describe(recipe.method)} reads all of them: use float16"
        )
    return kind


def suffices(method: Method, classes: int) -> bool:
    """Whether the 16 largest logits and the mass of the others are enough for a method."""
    return classes > FEW_CLASSES and method.soft_temperature is not None and not method.needs.embedding


def with_plan(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with what "auto" means here, so that its file in the run folder says what was done."""
    decided = {"views": plan.views} | ({"record": plan.record} if plan.record is not None else {})
    return recipe.model_copy(update={"store": recipe.store.model_copy(update=decided)})


def with_plan_of(path: Path, recipe: Recipe) -> Recipe:
    """For a run that goes on: "auto" means what it meant when the run began, whatever the number of epochs now.

    Args:
        path: recipe.yaml of the run folder.
        recipe: as it is given now.
    """
    before = load_recipe(path, data_needed=False).store
    kept = {
        key: getattr(before, key)
        for key in ("views", "record")
        if getattr(recipe.store, key) == "auto" and getattr(before, key) != "auto"
    }
    return recipe.model_copy(update={"store": recipe.store.model_copy(update=kept)}) if kept else recipe


def _shown(recipe: Recipe) -> int:
    """How many views are shown to a student in the end."""
    views, epochs = views_in_turn(recipe), recipe.stage_training("student").epochs
    return epochs if views == "all" else min(views, epochs)


def _bytes_of_seed(recipe: Recipe, method: Method, data: DataSplits, kind: Kind) -> int:
    """Of all records that the student of one seed trains on."""
    classes = len(data.class_names)
    distinct = method.needs.second != "none" or not (recipe.data.augment or data.augment).changes_nothing
    data = data.measured  # of a target more may be stored than the teacher will be sure of
    images = len(data.train) + (0 if data.unlabeled is None else len(data.unlabeled))
    record = Record(kind, classes, _WIDE if method.needs.embedding else 0)
    stores = max(1, len(recipe.each_teacher)) * (1 if method.needs.second == "none" else 2)
    return (_shown(recipe) if distinct else 1) * images * record.nbytes * stores


def _free(folder: Path) -> int:
    """Bytes free where the folder is or will be."""
    try:
        existing = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
        return shutil.disk_usage(existing).free
    except OSError:
        return 0
