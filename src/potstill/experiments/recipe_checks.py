"""Everything that can be wrong with a recipe's values, found in one pass and without torch."""

import ast
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from potstill.data.settings import DataSettings
from potstill.errors import nearest
from potstill.experiments.curriculum.checks import curriculum_problems
from potstill.experiments.domain.checks import domain_problems
from potstill.experiments.method_settings import as_mapping, describe, needs_teacher
from potstill.experiments.recipe_methods import method_problems
from potstill.experiments.recipe_yaml import KeyPath
from potstill.experiments.settings_errors import Finding, dotted, parse, parse_rest
from potstill.experiments.tracker_checks import tracker_problems
from potstill.training.settings import TrainingSettings


def find_problems(value: dict[str, Any], recipe_class: type[BaseModel]) -> list[Finding]:
    """All that is wrong with a recipe's plain values; the first sentence about a key wins."""
    found: dict[KeyPath, str] = {}
    for path, message in _all(value, recipe_class):
        found.setdefault(path, message)
    return list(found.items())


def _all(value: dict[str, Any], recipe_class: type[BaseModel]) -> Iterator[Finding]:
    yield from _not_finite(value, ())
    yield from parse(value, recipe_class)[1]
    yield from method_problems(value.get("method"))
    yield from _teachers(value)
    yield from domain_problems(value)
    yield from curriculum_problems(value)
    yield from tracker_problems(value.get("tracker"))
    if isinstance(value.get("data", {}), dict):
        yield from _data(value.get("data", {}))
    if isinstance(value.get("training", {}), dict):
        yield from _training(value.get("training", {}), value)


def _not_finite(value: Any, path: KeyPath) -> Iterator[Finding]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _not_finite(item, (*path, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{dotted(path)} must be a finite number, got {value}"


def _data(section: dict[str, Any]) -> Iterator[Finding]:
    data, wrong = parse_rest(section, DataSettings)
    if data.val + data.test >= 1 and not wrong & {"val", "test"}:
        sum_of = f"{data.val:g} + {data.test:g}"
        yield ("data", "val"), f"data.val and data.test must leave something to train on, got shares {sum_of} of 1"
    if isinstance(data.workers, int) and data.workers < 0:
        yield ("data", "workers"), f"data.workers must be at least 0 or 'auto', got {data.workers}"
    if data.unlabeled is not None and data.augment is not None and data.augment.mixes:
        key = "mixup" if data.augment.mixup else "cutmix"
        message = "mixes labels, which unlabeled images do not have: switch it off, or leave data.unlabeled out"
        yield ("data", "augment", key), f"data.augment.{key} {message}"
    if data.std is not None and min(data.std) <= 0:
        yield ("data", "std"), f"data.std must be three numbers above 0, got {list(data.std)}"
    scale = data.augment.crop_scale if data.augment else None
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        path = ("data", "augment", "crop_scale")
        yield path, f"{dotted(path)} must be two shares, low and high, above 0 and at most 1, got {list(scale)}"


def networks(value: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Where the settings of each network stand; sections of a wrong kind are left out."""
    for key in ("teacher", "assistants", "student"):
        section = value.get(key)
        if isinstance(section, dict):
            yield (key,), section
        elif isinstance(section, list):
            yield from (((key, at), each) for at, each in enumerate(section) if isinstance(each, dict))


def _teachers(value: dict[str, Any]) -> Iterator[Finding]:
    """Who learns from whom: checks that need the method or the number of teachers."""
    teacher, method = value.get("teacher"), value.get("method")
    count = len(teacher) if isinstance(teacher, list) else int(teacher is not None)
    if needs_teacher(method):
        if count == 0:
            got = ", got an empty list" if isinstance(teacher, list) else ""
            example = "teacher: {model: resnet50}"
            yield ("teacher",), f"teacher is missing{got}: a network to learn from, for example: {example}"
    else:
        why = f"{describe(as_mapping(method))} learns from no teacher"
        if value.get("assistants"):
            yield ("assistants",), f"assistants stand between teacher and student, and method {why}"
        if value.get("generations", 1) != 1:
            yield ("generations",), f"generations: each of several learns from the one before, and method {why}"
    together = value.get("teachers")
    weights = together.get("weights") if isinstance(together, dict) else None
    if isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights):
        path = ("teachers", "weights")
        if len(weights) != count:
            yield path, f"teachers.weights must be one number for each of the {count} teachers, got {len(weights)}"
        elif min(weights) < 0 or sum(weights) == 0:
            yield path, f"teachers.weights must be at least 0, and not all 0, got {weights}"


# Settings that count with certain others only: what those are, and how a person says it.
_COUNTS: dict[str, tuple[Callable[[TrainingSettings], bool], str]] = {
    "momentum": (
        lambda training: training.optimizer.lower() in ("sgd", "dot"),
        "has no effect but with optimizer: sgd or dot; others take what they have in optimizer_options",
    ),
    "dot_delta": (lambda training: training.optimizer.lower() == "dot", "has no effect but with optimizer: dot"),
    "gamma": (lambda training: training.schedule == "step", "has no effect but with schedule: step"),
    "final_lr_share": (lambda training: training.schedule == "cosine", "has no effect but with schedule: cosine"),
    "decay_all": (lambda training: training.weight_decay > 0, "has no effect with weight_decay: 0"),
}


def _training(shared: dict[str, Any], value: dict[str, Any]) -> Iterator[Finding]:
    """Checks that need several settings at once are made on what each network really gets."""
    data = value.get("data")
    weighted = isinstance(data, dict) and data.get("balance") == "weights"
    inherited: dict[str, list[bool]] = {}  # of each shared setting: whether it counts for a network that has it
    for place, section in networks(value):
        own = section.get("training", {})
        if not isinstance(own, dict):
            continue
        _, problems = parse(own, TrainingSettings)
        for path, message in problems:
            yield (*place, "training", *path), f"{dotted(place)}.training.{message}"
        left_out = set() if place[0] == "student" else {"int8_share"}  # as Recipe.stage_training has it
        common = {key: item for key, item in shared.items() if key not in left_out}
        merged, wrong = parse_rest({**common, **own}, TrainingSettings)
        for key, (counts, message) in _COUNTS.items():
            if key in own and own[key] != TrainingSettings.model_fields[key].default and not (wrong or counts(merged)):
                yield (*place, "training", key), f"{dotted(place)}.training.{key} {message}"
            elif key not in own:
                inherited.setdefault(key, []).append(bool(wrong) or counts(merged))
        if weighted and merged.batch_size == 1 and "batch_size" not in wrong:
            where = (*place, "training") if "batch_size" in own else ("training",)
            message = "data.balance: weights weighs the images of a batch against each other, so it needs two or more"
            yield (*where, "batch_size"), f"{dotted(where)}.batch_size is 1: {message}"
        for keys, message in _schedule(merged):
            if wrong.intersection(keys):
                continue
            here = next((key for key in keys if key in own), None)
            if here is not None:
                yield (*place, "training", here), f"{dotted(place)}.training.{message}"
            else:
                yield ("training", next((key for key in keys if key in shared), keys[0])), f"training.{message}"
    for key, counted in inherited.items():
        if key in shared and shared[key] != TrainingSettings.model_fields[key].default and not any(counted):
            yield ("training", key), f"training.{key} {_COUNTS[key][1]}"


def _schedule(training: TrainingSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """(The settings that take part, a sentence that begins with one of them)."""
    marks = training.milestones
    if marks and training.schedule != "step":
        yield ("milestones", "schedule"), f"milestones need schedule: step, got schedule: {training.schedule}"
    elif training.schedule == "step" and not marks:
        yield ("schedule", "milestones"), "schedule step needs milestones, for example: milestones: [60, 80]"
    elif marks and (marks != sorted(set(marks)) or marks[0] < 1 or marks[-1] >= training.epochs):
        yield ("milestones", "epochs"), f"milestones must rise from 1 to below epochs {training.epochs}, got {marks}"
    if marks and training.schedule == "step" and marks[0] <= training.warmup_epochs:
        yield (
            ("milestones", "warmup_epochs"),
            f"milestones must come after warmup_epochs, {training.warmup_epochs:g}, got {marks}",
        )
    still = {"cosine": ("final_lr_share", training.final_lr_share), "step": ("gamma", training.gamma)}
    key, end = still.get(training.schedule, ("", 0.0))
    if end == 1:
        yield (key, "schedule"), f"{key} 1 leaves nothing to schedule {training.schedule}; set schedule: constant"
    for key in sorted({"params", *_own_settings(training.optimizer)} & training.optimizer_options.keys()):
        own = f"training.{'dot_delta' if key == 'delta' else key}" if key != "params" else "the student's weights"
        yield (
            ("optimizer_options",),
            f"optimizer_options.{key} would contradict {own}: leave it out",
        )
    if training.warmup_epochs > training.epochs:
        yield (
            ("warmup_epochs", "epochs"),
            f"warmup_epochs must be at most epochs, {training.epochs}, got {training.warmup_epochs:g}",
        )
    if training.early_stopping and 0 < training.int8_share < 1:
        yield (
            ("early_stopping", "int8_share"),
            "early_stopping may end the training before int8_share begins; leave one of them out, or set int8_share: 1",
        )
    if training.nesterov and (training.optimizer.lower() != "sgd" or training.momentum == 0):
        yield ("nesterov", "optimizer", "momentum"), "nesterov needs optimizer: sgd and momentum above 0"
    if training.optimizer.lower() not in {name.lower() for name in _optimizers()}:
        known = ["sgd", "adamw", "dot", *_optimizers()]
        yield (
            ("optimizer",),
            f"optimizer: no class {training.optimizer!r} in torch.optim{nearest(training.optimizer, known)}",
        )
    if training.optimizer.lower() == "dot" and not training.dot_delta <= training.momentum < 1 - training.dot_delta:
        yield (
            ("dot_delta", "momentum", "optimizer"),
            f"dot_delta: momentum - dot_delta must be at least 0 and momentum + dot_delta below 1, got momentum "
            f"{training.momentum:g} and dot_delta {training.dot_delta:g}",
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", training.device):
        yield ("device",), f"device must be auto, cpu, cuda, cuda:<number> or mps, got {training.device!r}"
    if isinstance(training.threads, int) and training.threads < 1:
        yield ("threads",), f"threads must be at least 1 or 'auto', got {training.threads}"


def _own_settings(optimizer: str) -> tuple[str, ...]:
    """Keywords of an optimizer that are settings of the training themselves."""
    more = {"sgd": ("momentum", "nesterov"), "dot": ("momentum", "delta")}
    return ("lr", "weight_decay", *more.get(optimizer.lower(), ()))


@cache
def _optimizers() -> list[str]:
    """DOT, and the classes in torch.optim, from its source, since importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "optim" / "__init__.py").read_text(encoding="utf-8"))
    imported = (alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)
    unfit = ("Optimizer", "LBFGS", "SparseAdam")
    return ["DOT", *sorted({name for name in imported if name[0].isupper() and name not in unfit})]
