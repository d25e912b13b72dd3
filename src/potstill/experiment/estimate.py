"""Estimates before training: the time of each stage, size and speed-up of the teacher cache, the time of more seeds."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from potstill.config.recipe import Recipe
from potstill.data.loader import Loader
from potstill.data.splits import DataSplits
from potstill.distillation.cached_outputs import CachedTeacherOutputs
from potstill.errors import PotstillError, UsageError
from potstill.evaluation.predictions import evaluation_mode
from potstill.experiment.plan import PlannedStage, stage_recipe, trains_network
from potstill.formatting import format_count, format_duration, format_percent, format_scaled
from potstill.models.families.opaque_models import find_opaque, find_table
from potstill.models.model_file import Classifier
from potstill.models.registry import build_model
from potstill.training.autotune import create_timed_step, has_depthwise, timed_batch_size
from potstill.training.devices import Compute
from potstill.training.optim import freeze_low_rates
from potstill.training.settings import TrainingSettings

_ROUNDS = 3  # timed steps, after one for warm-up
_ENOUGH_SECONDS = 0.2  # of timed steps, after which no further one is needed
_NEGLIGIBLE_SPEED_UP = 1.05


@dataclass(frozen=True)
class CacheEstimate:
    """The estimated effect of the teacher cache on one student's training."""

    views: int
    images: int
    size: int  # bytes of all views on disk
    recorded: float  # share of them that is cached already
    teacher: float  # seconds per image
    student: float  # seconds per image, forward and backward
    epochs: int

    @property
    def speed_up(self) -> float:
        """Times as fast as with a teacher that runs in every step."""
        passes = self.views * (1 - self.recorded)
        return self.epochs * (self.teacher + self.student) / (passes * self.teacher + self.epochs * self.student)

    @property
    def later(self) -> float:
        """Speed-up with a full cache, as in a run with another temperature, alpha, method or student."""
        return (self.teacher + self.student) / self.student

    def __str__(self) -> str:
        """Return the estimate as a sentence.

        Example:
            >>> print(CacheEstimate(8, 10_000, 640_000, 0.0, 3e-3, 1e-3, 24))
            teacher cache: 8 views of 10,000 images, 640 kB, empty. Expected: 2.0 times as fast as with the teacher \
running in every step, and 4.0 times in later runs
            >>> print(CacheEstimate(8, 10_000, 640_000, 1.0, 3e-3, 1e-3, 24))
            teacher cache: 8 views of 10,000 images, 640 kB, complete. Expected: 4.0 times as fast as with the teacher \
running in every step
        """
        views = f"{self.views} view{'' if self.views == 1 else 's'} of {format_count(self.images)} images"
        filled = "complete" if self.recorded == 1 else f"{format_percent(self.recorded, 0)} filled"
        if self.recorded == 0:
            filled = "empty"
        first = f"{self.speed_up:.1f} times as fast as with the teacher running in every step"
        if self.speed_up < _NEGLIGIBLE_SPEED_UP:
            first = "as fast as with the teacher running in every step"
        later = "" if self.recorded == 1 else f", and {self.later:.1f} times in later runs"
        return f"teacher cache: {views}, {format_scaled(self.size, 'B')}, {filled}. Expected: {first}{later}"


def estimate_cache(
    recorded: CachedTeacherOutputs,
    loader: Loader,
    student: Classifier,
    *,
    teacher: float,
    batch: int,
    epochs: int,
    compute: Compute,
) -> CacheEstimate:
    """Estimate the effect of the teacher cache by timing a training step of a copy of the student."""
    caches = [*recorded.caches, *recorded.second]
    views = 1 if not loader.distinct_views else min(loader.views_in_turn or epochs, epochs)
    there = sum(sum(cache.coverage(views)) for cache in caches) / (views * loader.samples * len(caches))
    return CacheEstimate(
        views=views,
        images=loader.samples,
        size=views * loader.samples * sum(cache.record.nbytes for cache in caches),
        recorded=there,
        teacher=teacher,
        student=seconds_per_image(student, batch, compute),
        epochs=epochs,
    )


def seconds_per_image(student: Classifier, batch: int, compute: Compute) -> float:
    """Return the seconds per image of a training step of a copy of the student, forward and backward."""
    size = student.input.size
    step, images = create_timed_step(student.module, size, batch, compute), timed_batch_size(batch, size)
    return _seconds_of(step) / images


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


def estimate_further_seeds(
    recipe: Recipe, planned: Sequence[PlannedStage], student: Classifier, images: int, compute: Compute
) -> str:
    """Estimate the time of further seeds from one training step of a copy of the student; "" if there are none."""
    further = [stage for stage in planned if stage.repeat]
    if not further:
        return ""
    settings = recipe.stage_training("student")
    each = settings.epochs * images * seconds_per_image(student, settings.batch_size, compute)
    total = each * len(further) / max(1, compute.processes.count)
    seeds = len({stage.repeat for stage in further})
    more = "the further seed takes" if seeds == 1 else f"the {format_count(seeds)} further seeds take"
    return (
        f"{more} about {format_duration(total)} ({format_count(len(further))} trainings of "
        f"{format_count(settings.epochs)} "
        f"epoch{'' if settings.epochs == 1 else 's'}; more if the teacher runs in every step)"
    )


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

    def cost(stage: str) -> tuple[float, float]:
        network, settings = recipe.network(stage), recipe.stage_training(stage)
        name, size = network.model, network.size or recipe.data.size
        key = (name, size, settings.layer_decay, settings.layer_decay_no_opt_scale)
        if key not in known:
            known[key] = _seconds_of_step_and_forward(name, size, len(data.class_names), settings, compute)
        return known[key]

    for stage in planned:
        network, settings = recipe.network(stage.name), recipe.stage_training(stage.name)
        with contextlib.suppress(PotstillError):
            step, forward = cost(stage.name)
            fitted = network.head in ("probe", "finetune") or (network.head is None and stage.role == "teacher")
            images = train + further if stage.distils else train
            total = settings.epochs * (images * step + val * forward) if trains_network(recipe, stage) else 0.0
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
    name: str, size: int, classes: int, settings: TrainingSettings, compute: Compute
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

    hidden = find_opaque(network) is not None
    step = forward if hidden else create_timed_step(network, size, images, compute)
    return _seconds_of(step) / images, _seconds_of(forward) / images


def _seconds_of(call: Callable[[], None]) -> float:
    """Return the median seconds of a call, after one for warm-up; of a long one it takes fewer."""
    call()
    times = list[float]()
    while len(times) < _ROUNDS and sum(times) < _ENOUGH_SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
