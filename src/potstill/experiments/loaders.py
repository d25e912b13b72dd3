"""The batches of a stage as its recipe says."""

import json
from typing import Any

from potstill.artifacts import digest
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.experiments.plan import Planned
from potstill.experiments.recipe import Recipe
from potstill.experiments.seeds import derive
from potstill.inputs import InputSpec
from potstill.methods.needs import Needs
from potstill.training.devices import Compute
from potstill.training.observer import Observer, Silent
from potstill.training.settings import TrainingSettings


def train_loader(
    planned: Planned,
    needs: Needs,
    spec: InputSpec,
    *,
    recipe: Recipe,
    data: DataSplits,
    compute: Compute,
    observer: Observer | None = None,
) -> Loader:
    """Augmented training images in a new order each epoch.

    Baseline and distilled draw the same order and the same views from the seeds, so that only the method differs (one
    that needs batches of a fixed size leaves out the last, smaller one; unlabeled images are for who has a teacher).
    """
    views = recipe.store.views
    balances = recipe.data.balance == "sampling" if data.draws is None else data.draws.groups is not None
    return Loader(
        data.train,
        spec,
        batch_size=recipe.stage_training(planned.name).batch_size,
        augment=recipe.data.augment or data.augment,
        order="balanced" if balances else "shuffled",
        seed=derive(recipe.seed, f"{planned.seed}/order"),
        workers=recipe.data.workers,
        device=compute.device,
        memory_share=recipe.data.memory_share,
        local_processes=compute.processes.local_count,
        second=needs.second,
        classes=len(data.class_names),
        unlabeled=data.unlabeled if needs.teacher or needs.peers else None,
        unlabeled_share=recipe.data.unlabeled_share,
        whole_batches=needs.batch_size,
        views=None if planned.role == "teacher" or isinstance(views, str) else views,
        view_seed=derive(recipe.augmentation_seed, f"{planned.seed}/views"),
        identity=f"{data.fingerprint}/train",
        progress=observer,
        draws=data.draws,
        share=(compute.processes.rank, compute.processes.count),
    )


def views_seen(loader: Loader, recipe: Recipe, data: DataSplits, epochs: int) -> dict[str, Any]:
    """What identifies the views that a student is trained on, whatever its method.

    Args:
        loader: of its training images.
        recipe: with the stage's own seed.
        data: what the loader shows.
        epochs: that are planned.

    Returns:
        ``count`` of different views of an image, ``augmentation_seed``, and ``sha256`` over all that decides them:
        equal digests, equal views.  Unlabeled images beside the labeled ones are left out.
    """
    described = loader.describe_views()
    described["samples"] = described["samples"][0]
    count = min(loader.views_in_turn or epochs, epochs) if described["augment"] is not None else 1
    content = json.dumps([data.fingerprint, count, described], sort_keys=True, default=str)
    return {"count": count, "augmentation_seed": recipe.augmentation_seed, "sha256": digest(content.encode())}


def split_loader(
    data: DataSplits,
    split: str,
    spec: InputSpec,
    recipe: Recipe,
    settings: TrainingSettings,
    compute: Compute,
    *,
    shared: bool = True,
) -> Loader:
    """Every image of a split once, in its listed order, without augmentation.

    ``shared``: among several processes, each of which has its own batches; else each has all of them.
    """
    processes = compute.processes
    return Loader(
        data.split(split),
        spec,
        batch_size=settings.batch_size,
        workers=recipe.data.workers,
        device=compute.device,
        memory_share=recipe.data.memory_share,
        local_processes=processes.local_count,
        identity=f"{data.fingerprint}/{split}",
        progress=Silent(),  # what there is to say has been said of the training images
        share=(processes.rank, processes.count) if shared else (0, 1),
    )
