"""What is printed before training: the time of each stage, the size of the teacher cache, the seeds."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from potstill.config.recipe import Recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.errors import PotstillError, UsageError
from potstill.evaluation.predictions import evaluation_mode
from potstill.experiment.plan import PlannedStage, stage_recipe, trains_network
from potstill.formatting import format_count, format_many, format_percent, format_scaled
from potstill.models.families.opaque_models import find_opaque, find_table
from potstill.models.registry import build_model
from potstill.training.autotune import create_timed_step, has_depthwise, timed_batch_size
from potstill.training.devices import Compute
from potstill.training.optim import freeze_low_rates
from potstill.training.settings import TrainingSettings

_ROUNDS = 3  # timed steps, after one for warm-up
_ENOUGH_SECONDS = 0.2  # of timed steps, after which no further one is needed


def describe_cache(recorded: CachedTeacherOutputs, loader: Loader, epochs: int) -> str:
    """Return a sentence on the training images in the teacher cache: views, bytes, and what share is there."""
    caches = [*recorded.caches, *recorded.second]
    views = 1 if not loader.distinct_views else min(loader.views_in_turn or epochs, epochs)
    share = sum(sum(cache.coverage(views)) for cache in caches) / (views * loader.samples * len(caches))
    size = views * loader.samples * sum(cache.record.nbytes for cache in caches)
    filled = {0.0: "empty", 1.0: "complete"}.get(share, f"{format_percent(share, 0)} filled")
    return (
        f"teacher cache: {format_many(views, 'view')} of {format_many(loader.samples, 'image')}, "
        f"{format_scaled(size, 'B')}, {filled}"
    )


def describe_seeds(recipe: Recipe, planned: Sequence[PlannedStage]) -> str:
    """Return a sentence on the trainings of several seeds; "" if there is one seed."""
    if recipe.seeds == 1:
        return ""
    seeds = sorted({stage_recipe(recipe, stage).seed for stage in planned})
    shown = ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{seeds[0]} to {seeds[-1]}"
    trained = [stage.role for stage in planned if stage.role in ("baseline", "distilled")]
    subject = " and ".join(dict.fromkeys(trained)) + (" is" if len(set(trained)) == 1 else " are")
    teacher = ", all with the same teacher" if any(stage.teachers for stage in planned) else ""
    fixed = recipe.data.augmentation_seed
    views = "" if fixed is None else f"; data.augmentation_seed={fixed}: all seeds see the same views"
    return f"seeds {shown}: {subject} trained with each of them, {format_count(len(trained))} trainings{teacher}{views}"


class StageTime(float):
    """Seconds of a stage, of which ``first`` pass in the first ``share`` of the training, before outputs are cached."""

    first: float = 0.0
    share: float = 0.0

    def at(self, done: float) -> float:
        """Return the seconds that ``done``, a fraction of the training in [0, 1], takes."""
        if not 0 < self.share < 1:
            return self * done
        return self.first * min(done / self.share, 1) + (self - self.first) * max(0, done - self.share) / (
            1 - self.share
        )


def estimate_stages(
    recipe: Recipe, planned: Sequence[PlannedStage], data: DataSplits, compute: Compute
) -> dict[str, StageTime]:
    """Return the seconds of each stage, from small batches of its networks with random weights, without own code."""
    seconds, known = dict[str, StageTime](), dict[tuple[object, ...], tuple[float, float]]()
    train, val, views = len(data.train), len(data.val), recipe.teacher_cache.views
    unlabeled = 0 if data.unlabeled is None else len(data.unlabeled)
    share = recipe.data.unlabeled_share if unlabeled else 0.0
    further = train * share / (1 - share)  # unlabeled images in an epoch
    trained = {stage.name for stage in planned if trains_network(recipe, stage)}

    def cost(stage: str) -> tuple[float, float]:
        network, settings = recipe.network(stage), recipe.stage_training(stage)
        name, size = network.model, network.size or recipe.data.size
        key = (name, size, settings.layer_decay, settings.layer_decay_no_opt_scale, stage in trained)
        if key not in known:
            classes, trains = len(data.class_names), stage in trained
            known[key] = _seconds_of_step_and_forward(name, size, classes, settings, compute, trains)
        return known[key]

    for stage in planned:
        network, settings = recipe.network(stage.name), recipe.stage_training(stage.name)
        with contextlib.suppress(PotstillError):
            step, forward = cost(stage.name)
            fitted = network.head in ("probe", "finetune") or (network.head is None and stage.role == "teacher")
            images = train + further if stage.distils else train
            total = settings.epochs * (images * step + val * forward) if stage.name in trained else 0.0
            total += (train + val) * forward if fitted and network.weights is not None else 0.0
            answered = epochs = 0.0  # images that the teacher answers, and the epochs that this takes
            if stage.distils and not (stage.repeat and recipe.data.augmentation_seed is not None):
                each = settings.epochs if isinstance(views, str) else min(views, settings.epochs)
                answered, epochs = each * train + settings.epochs * further, each
                if further and not isinstance(views, str):
                    answered = each * train + min(settings.epochs * further, views * unlabeled)
                    epochs = max(each, min(settings.epochs, views * unlabeled / further))
            teacher = answered * sum(cost(teacher)[1] for teacher in stage.teachers) if answered else 0.0
            time = StageTime((total + teacher) / max(1, compute.processes.count))
            time.share = epochs / settings.epochs
            time.first = (teacher + time.share * total) / max(1, compute.processes.count)
            seconds[stage.name] = time
    return seconds


def _seconds_of_step_and_forward(
    name: str, size: int, classes: int, settings: TrainingSettings, compute: Compute, trains: bool
) -> tuple[float, float]:
    with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
        network = build_model(name, classes, size=size).to(compute.device)
    if find_table(network) is not None:
        return 0.0, 0.0
    if settings.precision == "auto" and has_depthwise(network):  # as is chosen, mostly by a measurement
        compute = replace(compute, bf16=False, fp16=False)
    with contextlib.suppress(UsageError):  # a network that is not from timm, and is not trained
        freeze_low_rates(network, settings)
    images = timed_batch_size(settings.batch_size, size)
    noise = torch.zeros(images, 3, size, size, device=compute.device).contiguous(memory_format=compute.memory_format)

    def forward() -> None:
        with evaluation_mode(network), torch.no_grad(), compute.autocast():
            network(noise)
        compute.synchronize()

    seconds = _seconds_of(forward)
    if not trains or find_opaque(network) is not None:
        return seconds / images, seconds / images
    return _seconds_of(create_timed_step(network, size, images, compute)) / images, seconds / images


def _seconds_of(call: Callable[[], None]) -> float:
    """Return the median seconds of a call, after one for warm-up; of a long one it takes fewer."""
    call()
    times = list[float]()
    while len(times) < _ROUNDS and sum(times) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
