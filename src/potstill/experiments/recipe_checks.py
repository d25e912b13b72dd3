"""Everything that can be wrong with a recipe's values, found in one pass and without torch."""

import ast
import importlib.util
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from potstill.data.settings import DataSettings
from potstill.errors import nearest
from potstill.experiments.recipe_yaml import KeyPath
from potstill.experiments.settings_errors import Finding, dotted, parse, parse_rest
from potstill.methods.catalog import check_method
from potstill.training.settings import TrainingSettings

STAGES = ("teacher", "student")


def find_problems(value: dict[str, Any], recipe_class: type[BaseModel]) -> list[Finding]:
    """All that is wrong with a recipe's plain values; the first sentence about a key wins."""
    found: dict[KeyPath, str] = {}
    for path, message in _all(value, recipe_class):
        found.setdefault(path, message)
    return list(found.items())


def _all(value: dict[str, Any], recipe_class: type[BaseModel]) -> Iterator[Finding]:
    yield from _not_finite(value, ())
    yield from parse(value, recipe_class)[1]
    yield from _method(value.get("method"))
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


def _method(method: Any) -> Iterator[Finding]:
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        if isinstance(method, dict):
            yield ("method",), "method.name is missing, for example: name: kd"
        return
    given = {key: option for key, option in method.items() if key != "name"}
    for problem in check_method(method["name"], given):
        if problem.option is None:
            yield ("method", "name"), f"method.name: {problem.message}"
        else:
            # An option that is missing is a matter of the method that asks for it.
            path = ("method", problem.option) if problem.option in given else ("method", "name", problem.option)
            named = problem.message.startswith(f"{problem.option} ")
            yield path, f"method.{problem.message}" if named else f"method.{problem.option}: {problem.message}"


def _data(section: dict[str, Any]) -> Iterator[Finding]:
    data, wrong = parse_rest(section, DataSettings)
    if data.val + data.test >= 1 and not wrong & {"val", "test"}:
        sum_of = f"{data.val:g} + {data.test:g}"
        yield ("data", "val"), f"data.val and data.test must leave something to train on, got shares {sum_of} of 1"
    if isinstance(data.workers, int) and data.workers < 0:
        yield ("data", "workers"), f"data.workers must be at least 0 or 'auto', got {data.workers}"
    scale = data.augment.crop_scale if data.augment else None
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        path = ("data", "augment", "crop_scale")
        yield path, f"{dotted(path)} must be two shares, low and high, above 0 and at most 1, got {list(scale)}"


def _training(shared: dict[str, Any], value: dict[str, Any]) -> Iterator[Finding]:
    """Checks that need several settings at once are made on what each stage really gets."""
    for stage in STAGES:
        section = value.get(stage)
        own = section.get("training", {}) if isinstance(section, dict) else {}
        if not isinstance(own, dict):
            continue
        _, problems = parse(own, TrainingSettings)
        for path, message in problems:
            yield (stage, "training", *path), f"{stage}.training.{message}"
        merged, wrong = parse_rest({**shared, **own}, TrainingSettings)
        for keys, message in _schedule(merged):
            if wrong.intersection(keys):
                continue
            here = next((key for key in keys if key in own), None)
            if here is not None:
                yield (stage, "training", here), f"{stage}.training.{message}"
            else:
                yield ("training", next((key for key in keys if key in shared), keys[0])), f"training.{message}"


def _schedule(training: TrainingSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """(The settings that take part, a sentence that begins with one of them)."""
    marks = training.milestones
    if marks and training.schedule != "step":
        yield ("milestones", "schedule"), f"milestones need schedule: step, got schedule: {training.schedule}"
    elif training.schedule == "step" and not marks:
        yield ("schedule", "milestones"), "schedule step needs milestones, for example: milestones: [60, 80]"
    elif marks and (marks != sorted(set(marks)) or marks[0] < 1 or marks[-1] >= training.epochs):
        yield ("milestones", "epochs"), f"milestones must rise from 1 to below epochs {training.epochs}, got {marks}"
    if training.warmup_epochs > training.epochs:
        yield (
            ("warmup_epochs", "epochs"),
            f"warmup_epochs must be at most epochs, {training.epochs}, got {training.warmup_epochs:g}",
        )
    if training.nesterov and (training.optimizer.lower() != "sgd" or training.momentum == 0):
        yield ("nesterov", "optimizer", "momentum"), "nesterov needs optimizer: sgd and momentum above 0"
    if training.optimizer.lower() not in {name.lower() for name in _optimizers()}:
        known = ["sgd", "adamw", *_optimizers()]
        yield (
            ("optimizer",),
            f"optimizer: no class {training.optimizer!r} in torch.optim{nearest(training.optimizer, known)}",
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", training.device):
        yield ("device",), f"device must be auto, cpu, cuda, cuda:<number> or mps, got {training.device!r}"
    if isinstance(training.threads, int) and training.threads < 1:
        yield ("threads",), f"threads must be at least 1 or 'auto', got {training.threads}"


@cache
def _optimizers() -> list[str]:
    """Names of the classes in torch.optim, from its source, since importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "optim" / "__init__.py").read_text(encoding="utf-8"))
    imported = (alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)
    return sorted({name for name in imported if name[0].isupper() and name not in ("Optimizer", "LBFGS", "SparseAdam")})
