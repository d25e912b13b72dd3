"""Every problem in a recipe's plain values, found in one pass and without torch: networks, training, methods,
trackers, curriculum and domain adaptation.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from potstill.config.method_settings import describe_method, inner_methods, needs_teacher, normalize_method
from potstill.config.settings_errors import (
    SettingProblem,
    dotted_key,
    format_value,
    parse_settings,
    parse_valid_settings,
)
from potstill.config.yaml import KeyPath
from potstill.data.settings import DataSettings
from potstill.errors import UsageError, did_you_mean
from potstill.loggers import as_logger_list
from potstill.methods import check_method
from potstill.options import WEIGHT_SCHEMA, value_problems
from potstill.training.settings import TrainingSettings


def method_problems(method: Any) -> Iterator[SettingProblem]:
    """Every problem with the key that it stands at; a value that is neither mapping nor list is the parser's matter."""
    if isinstance(method, dict):
        yield from _one_method(method, ("method",))
    elif isinstance(method, list):
        if len(method) < 2:
            yield ("method",), f"method must be one method or a list of two or more, got a list of {len(method)}"
        for position, each in enumerate(method):
            yield from _weighted_method(each, ("method", position))


def _weighted_method(settings: Any, path: KeyPath) -> Iterator[SettingProblem]:
    """A method in a list: besides its own options it has a factor."""
    if isinstance(settings, dict) and "factor" in settings:
        for problem in value_problems(dotted_key((*path, "factor")), WEIGHT_SCHEMA, settings["factor"]):
            yield (*path, "factor"), problem
        settings = {key: value for key, value in settings.items() if key != "factor"}
    yield from _one_method(settings, path)


def _one_method(settings: Any, path: KeyPath) -> Iterator[SettingProblem]:
    if not isinstance(settings, dict):
        yield path, f"{dotted_key(path)} must be a method, a mapping such as {{name: kd}}, got {format_value(settings)}"
        return
    if not isinstance(settings.get("name"), str):
        yield path, f"{dotted_key(path)}.name is missing, for example: name: kd"
        return
    inner = inner_methods(settings)
    given = {key: option for key, option in settings.items() if key != "name"}
    apart = {inside[0] for inside, _ in inner}  # each of these methods is checked below, where its own keys stand
    for problem in check_method(settings["name"], given):
        if problem.option is None:
            yield (*path, "name"), f"{dotted_key(path)}.name: {problem.message}"
        elif problem.option not in apart:
            # An option that is missing is a matter of the method that asks for it.
            place = (*path, problem.option) if problem.option in given else (*path, "name", problem.option)
            named = problem.message.startswith((f"{problem.option} ", f"{problem.option}.", f"{problem.option}["))
            lead = "" if named else f"{problem.option}: "
            yield place, f"{dotted_key(path)}.{lead}{problem.message}"
    for inside, each in inner:
        yield from (_weighted_method if len(inside) > 1 else _one_method)(each, (*path, *inside))


def tracker_problems(value: Any) -> Iterator[SettingProblem]:
    """Of what stands under ``tracker``: a server for one that has none, a password, the same twice."""
    named: list[str] = []
    for at, each in enumerate(as_logger_list(value)):
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            continue  # said elsewhere
        path, uri = ("tracker", at, "uri"), each.get("uri")
        if uri is not None and each["name"] != "mlflow":
            yield path, f"tracker[{at}].uri is for mlflow; {each['name']} is told by its own environment variables"
        elif isinstance(uri, str) and _has_password(uri):
            yield (
                path,
                f"tracker[{at}].uri must carry no password, since recipes are kept and shared: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI",
            )
        if each["name"] in named:
            yield ("tracker", at, "name"), f"tracker[{at}].name: {each['name']} is named twice; once is enough"
        named.append(each["name"])


def _has_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False


def curriculum_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Of a recipe with ``curriculum``: nobody whose word decides, or another rule on what is drawn."""
    if value.get("curriculum") is None:
        return
    found = value.get("data")
    data: dict[str, Any] = found if isinstance(found, dict) else {}
    if not needs_teacher(value.get("method")):
        yield (
            ("curriculum",),
            "curriculum: the teacher says what is easy, and "
            f"{describe_method(normalize_method(value.get('method')))} has none",
        )
    if data.get("class_balance") == "sampling":
        yield (
            ("data", "class_balance"),
            "data.class_balance: sampling and curriculum both say which images are drawn; use class_balance: weights",
        )
    if data.get("target") is not None:
        yield (
            ("curriculum",),
            "curriculum orders images by class, which those of data.target do not have: leave one of them out",
        )


_TARGET_HINT = "name a folder of class folders, a manifest or a data set with --set data.target=DIR"
TARGET_MISSING = f"data.target is not given, and `domain` says how to get there: {_TARGET_HINT}"


def lacks_target(value: dict[str, Any]) -> bool:
    """Whether a recipe says how to get to a target, and names none."""
    data = value.get("data", {})
    return value.get("domain") is not None and (not isinstance(data, dict) or data.get("target") is None)


def domain_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Settings that need a target without one, and a target that nobody can use."""
    section = value.get("data", {})
    if not isinstance(section, dict):
        return
    data, wrong = parse_valid_settings(section, DataSettings)
    if data.target is None and value.get("domain") is not None:
        return  # perhaps it comes from Python; else see ``lacks_target``
    if data.target is None:
        for key in ("target_labels", "target_options"):
            if key not in wrong and getattr(data, key):
                yield ("data", key), f"data.{key} is of data.target, which is not given: {_TARGET_HINT}"
        return
    if data.augment is not None and data.augment.mixes:
        key = "mixup" if data.augment.mixup else "cutmix"
        message = "mixes labels, which target images do not have: switch it off, or leave data.target out"
        yield ("data", "augment", key), f"data.augment.{key} {message}"
    method = value.get("method")
    if not needs_teacher(method):
        why = f"method {describe_method(normalize_method(method))} learns from no teacher"
        yield ("data", "target"), f"data.target: only a teacher can say something of its images, and {why}; use kd"


def find_problems(value: dict[str, Any], recipe_class: type[BaseModel]) -> list[SettingProblem]:
    """All that is wrong with a recipe's plain values; the first sentence about a key wins."""
    found: dict[KeyPath, str] = {}
    for path, message in _all_problems(value, recipe_class):
        found.setdefault(path, message)
    return list(found.items())


def _all_problems(value: dict[str, Any], recipe_class: type[BaseModel]) -> Iterator[SettingProblem]:
    yield from _nonfinite(value, ())
    yield from parse_settings(value, recipe_class)[1]
    yield from method_problems(value.get("method"))
    yield from _teacher_problems(value)
    yield from _head_problems(value)
    yield from domain_problems(value)
    yield from curriculum_problems(value)
    yield from tracker_problems(value.get("tracker"))
    if isinstance(value.get("data", {}), dict):
        yield from _data_problems(value.get("data", {}))
    if isinstance(value.get("training", {}), dict):
        yield from _training_problems(value.get("training", {}), value)


def _nonfinite(value: Any, path: KeyPath) -> Iterator[SettingProblem]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _nonfinite(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _nonfinite(item, (*path, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{dotted_key(path)} must be a finite number, got {value}"


def _data_problems(section: dict[str, Any]) -> Iterator[SettingProblem]:
    data, wrong = parse_valid_settings(section, DataSettings)
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
        yield path, f"{dotted_key(path)} must be two shares, low and high, above 0 and at most 1, got {list(scale)}"


def network_sections(value: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Where the settings of each network stand; sections of a wrong kind are left out."""
    for key in ("teacher", "assistants", "student"):
        section = value.get(key)
        if isinstance(section, dict):
            yield (key,), section
        elif isinstance(section, list):
            yield from (((key, at), each) for at, each in enumerate(section) if isinstance(each, dict))


def _teacher_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Who learns from whom: checks that need the method or the number of teachers."""
    teacher, method = value.get("teacher"), value.get("method")
    count = len(teacher) if isinstance(teacher, list) else int(teacher is not None)
    if needs_teacher(method):
        if count == 0:
            got = ", got an empty list" if isinstance(teacher, list) else ""
            example = "teacher: {model: resnet50}"
            yield ("teacher",), f"teacher is missing{got}: a network to learn from, for example: {example}"
    else:
        why = f"{describe_method(normalize_method(method))} learns from no teacher"
        if value.get("assistants"):
            yield ("assistants",), f"assistants stand between teacher and student, and method {why}"
        if value.get("born_again_generations", 1) != 1:
            yield (
                ("born_again_generations",),
                f"born_again_generations: each of several learns from the one before, and method {why}",
            )
    together = value.get("teachers")
    weights = together.get("weights") if isinstance(together, dict) else None
    if isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights):
        path = ("teachers", "weights")
        if len(weights) != count:
            yield path, f"teachers.weights must be one number for each of the {count} teachers, got {len(weights)}"
        elif min(weights) < 0 or sum(weights) == 0:
            yield path, f"teachers.weights must be at least 0, and not all 0, got {weights}"


def _head_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Of ``head``: another network than a teacher, or one without weights."""
    for place, section in network_sections(value):
        if section.get("head") is None:
            continue
        key = dotted_key((*place, "head"))
        if place[0] != "teacher":
            yield (*place, "head"), f"{key} is for teachers, whose encoder stays as it is: leave it out"
        elif section.get("weights") is None:
            yield (
                (*place, "head"),
                f"{key} is a head for weights that are there already, and {dotted_key(place)}.weights names none: set "
                "it to pretrained or to a file, or leave head out to train from scratch",
            )


# Settings that count with certain others only: what those are, and how a person says it.
_HAS_EFFECT: dict[str, tuple[Callable[[TrainingSettings], bool], str]] = {
    "momentum": (
        lambda training: training.optimizer.lower() in ("sgd", "dot"),
        "has no effect but with optimizer: sgd or dot; others take what they have in optimizer_options",
    ),
    "dot_delta": (lambda training: training.optimizer.lower() == "dot", "has no effect but with optimizer: dot"),
    "gamma": (lambda training: training.schedule == "step", "has no effect but with schedule: step"),
    "min_lr_ratio": (lambda training: training.schedule == "cosine", "has no effect but with schedule: cosine"),
    "decay_all": (lambda training: training.weight_decay > 0, "has no effect with weight_decay: 0"),
}


def _training_problems(shared: dict[str, Any], value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Checks that need several settings at once are made on what each network really gets."""
    data = value.get("data")
    weighted = isinstance(data, dict) and data.get("class_balance") == "weights"
    inherited: dict[str, list[bool]] = {}  # of each shared setting: whether it counts for a network that has it
    for place, section in network_sections(value):
        own = section.get("training", {})
        if not isinstance(own, dict):
            continue
        _, problems = parse_settings(own, TrainingSettings)
        for path, message in problems:
            yield (*place, "training", *path), f"{dotted_key(place)}.training.{message}"
        left_out = set() if place[0] == "student" else {"qat_fraction"}  # as Recipe.stage_training has it
        common = {key: item for key, item in shared.items() if key not in left_out}
        merged, wrong = parse_valid_settings({**common, **own}, TrainingSettings)
        for key, (counts, message) in _HAS_EFFECT.items():
            if key in own and own[key] != TrainingSettings.model_fields[key].default and not (wrong or counts(merged)):
                yield (*place, "training", key), f"{dotted_key(place)}.training.{key} {message}"
            elif key not in own:
                inherited.setdefault(key, []).append(bool(wrong) or counts(merged))
        if weighted and merged.batch_size == 1 and "batch_size" not in wrong:
            where = (*place, "training") if "batch_size" in own else ("training",)
            message = (
                "data.class_balance: weights weighs the images of a batch against each other, so it needs two or more"
            )
            yield (*where, "batch_size"), f"{dotted_key(where)}.batch_size is 1: {message}"
        for key in ("freeze", "freeze_batch_norm", "layer_decay"):
            used = getattr(merged, key) not in (0, False, None, "auto")
            if used and key not in wrong and section.get("weights") is None:
                where = (*place, "training") if key in own else ("training",)
                yield (
                    (*where, key),
                    f"{dotted_key((*where, key))} spares weights that are there already, and "
                    f"{dotted_key(place)}.weights names none: set it for a network with weights alone, such as "
                    f"teacher.training.{key}",
                )
        for keys, message in _schedule_problems(merged):
            if wrong.intersection(keys):
                continue
            here = next((key for key in keys if key in own), None)
            if here is not None:
                yield (*place, "training", here), f"{dotted_key(place)}.training.{message}"
            else:
                yield ("training", next((key for key in keys if key in shared), keys[0])), f"training.{message}"
    for key, counted in inherited.items():
        if key in shared and shared[key] != TrainingSettings.model_fields[key].default and not any(counted):
            yield ("training", key), f"training.{key} {_HAS_EFFECT[key][1]}"


def _schedule_problems(training: TrainingSettings) -> Iterator[tuple[tuple[str, ...], str]]:
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
    still = {"cosine": ("min_lr_ratio", training.min_lr_ratio), "step": ("gamma", training.gamma)}
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
    if training.freeze >= training.epochs:
        yield (
            ("freeze", "epochs"),
            f"freeze must be below epochs, {training.epochs}, got {training.freeze}: else no epoch trains the encoder",
        )
    if training.early_stopping_patience and 0 < training.qat_fraction < 1:
        yield (
            ("early_stopping_patience", "qat_fraction"),
            "early_stopping_patience may end the training before qat_fraction begins; leave one of them out, "
            "or set qat_fraction: 1",
        )
    if training.nesterov and (training.optimizer.lower() != "sgd" or training.momentum == 0):
        yield ("nesterov", "optimizer", "momentum"), "nesterov needs optimizer: sgd and momentum above 0"
    if not _is_optimizer(training.optimizer):
        known = ["sgd", "adamw", "dot", *_OPTIMIZERS]
        yield (
            ("optimizer",),
            f"optimizer: no class {training.optimizer!r} in torch.optim{did_you_mean(training.optimizer, known)}",
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


# Of torch.optim: importing torch to ask takes seconds.  A newer one's are asked for by name.
_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
)  # fmt: skip


def _is_optimizer(name: str) -> bool:
    """Whether a network can be trained by what has that name, whatever its case."""
    if name.lower() in {"dot", *(each.lower() for each in _OPTIMIZERS)}:
        return True
    from potstill.training.optim import get_optimizer_class

    try:
        get_optimizer_class(name)
    except UsageError:
        return False
    return True
