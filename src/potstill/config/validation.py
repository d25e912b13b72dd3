"""All problems of a recipe's plain values, found in one pass and without torch."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

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
from potstill.methods import check_method, describe_method, inner_methods, needs_teacher, normalize_method
from potstill.options import WEIGHT_SCHEMA, value_problems
from potstill.training.settings import TrainingSettings


def method_problems(method: Any) -> Iterator[SettingProblem]:
    """Yield the problems of ``method``; values that are neither mapping nor list are left to ``parse_settings``."""
    if isinstance(method, dict):
        yield from _one_method(method, ("method",))
    elif isinstance(method, list):
        if len(method) < 2:
            yield ("method",), f"method must be one method or a list of two or more, got a list of {len(method)}"
        for position, each in enumerate(method):
            yield from _weighted_method(each, ("method", position))


def _weighted_method(settings: Any, path: KeyPath) -> Iterator[SettingProblem]:
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
    inner_keys = {inside[0] for inside, _ in inner}  # these methods are checked below
    for problem in check_method(settings["name"], given):
        if problem.option is None:
            yield (*path, "name"), f"{dotted_key(path)}.name: {problem.message}"
        elif problem.option not in inner_keys:
            # A missing option has no location of its own: that of the method's name.
            option_path = (*path, problem.option) if problem.option in given else (*path, "name", problem.option)
            has_key = problem.message.startswith((f"{problem.option} ", f"{problem.option}.", f"{problem.option}["))
            prefix = "" if has_key else f"{problem.option}: "
            yield option_path, f"{dotted_key(path)}.{prefix}{problem.message}"
    for inside, each in inner:
        yield from (_weighted_method if len(inside) > 1 else _one_method)(each, (*path, *inside))


def tracker_problems(value: Any) -> Iterator[SettingProblem]:
    """Yield the problems of ``tracker``: a server for a logger without one, a password, a logger given twice."""
    seen: list[str] = []
    for at, each in enumerate(as_logger_list(value)):
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            continue  # reported by parse_settings
        path, uri = ("tracker", at, "uri"), each.get("uri")
        if uri is not None and each["name"] != "mlflow":
            yield path, f"tracker[{at}].uri is for mlflow; {each['name']} reads its own environment variables"
        elif isinstance(uri, str) and _has_password(uri):
            yield (
                path,
                f"tracker[{at}].uri must contain no password, since recipes are kept and shared: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI",
            )
        if each["name"] in seen:
            yield ("tracker", at, "name"), f"tracker[{at}].name: {each['name']} is given twice; leave one out"
        seen.append(each["name"])


def _has_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False


def curriculum_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Yield the problems of ``curriculum``: no teacher to score images, or another setting that selects images."""
    if value.get("curriculum") is None:
        return
    found = value.get("data")
    data: dict[str, Any] = found if isinstance(found, dict) else {}
    if not needs_teacher(value.get("method")):
        yield (
            ("curriculum",),
            "curriculum: a teacher scores the images, and method "
            f"{describe_method(normalize_method(value.get('method')))} has none",
        )
    if data.get("class_balance") == "sampling":
        yield (
            ("data", "class_balance"),
            "data.class_balance: sampling and curriculum both decide which images are drawn; use class_balance: "
            "weights",
        )
    if data.get("target") is not None:
        yield (
            ("curriculum",),
            "curriculum orders images by class, which those of data.target do not have: leave one of them out",
        )


MAX_PARALLEL = 1024  # processes or threads: more is a typing error, and would end the process without a message
_TARGET_HINT = "name a folder of class folders, a manifest or a data set with --set data.target=DIR"
TARGET_MISSING = f"`domain` needs data.target, which is not given: {_TARGET_HINT}"


def lacks_target(value: dict[str, Any]) -> bool:
    """Return whether a recipe has ``domain`` without ``data.target``."""
    data = value.get("data", {})
    return value.get("domain") is not None and (not isinstance(data, dict) or data.get("target") is None)


def domain_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Yield the problems of domain adaptation: settings that need a target, and a target that cannot be used."""
    section = value.get("data", {})
    if not isinstance(section, dict):
        return
    data, wrong = parse_valid_settings(section, DataSettings)
    if data.target is None and value.get("domain") is not None:
        return  # the target may come from Python; see lacks_target
    if data.target is None:
        for key in ("target_labels", "target_options"):
            if key not in wrong and getattr(data, key):
                yield ("data", key), f"data.{key} needs data.target, which is not given: {_TARGET_HINT}"
        return
    if data.augment is not None and data.augment.mixes:
        key = "mixup" if data.augment.mixup else "cutmix"
        message = "mixes labels, which target images do not have: switch it off, or leave data.target out"
        yield ("data", "augment", key), f"data.augment.{key} {message}"
    method = value.get("method")
    if not needs_teacher(method):
        why = f"method {describe_method(normalize_method(method))} learns from no teacher"
        yield ("data", "target"), f"data.target: its images have no labels and need a teacher, and {why}; use kd"


_NO_LABELS = "data.labeled: false (--no-labels)"
_NO_CLASSES = "the teacher has no classes (teacher.head: none)"
_NEXT = "A head follows from labeled images: `potstill run RECIPE --data LABELED --student RUN`"


def has_classless_teacher(value: dict[str, Any], *, every: bool = False) -> bool:
    """Return whether a teacher, or each of them, has no classes (``head: none``)."""
    teacher = value.get("teacher")
    found = [
        isinstance(each, dict) and each.get("head") == "none"
        for each in (teacher if isinstance(teacher, list) else [teacher])
    ]
    return all(found) and bool(found) if every else any(found)


def label_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Yield the problems of data without labels: a teacher that is not ready, and settings that need labels."""
    section = value.get("data", {})
    if not isinstance(section, dict):
        return
    data, _ = parse_valid_settings(section, DataSettings)
    if data.labeled:
        for key in ("classes", "labeled_test"):
            if getattr(data, key) is not None:
                why = "needs data.labeled: false (--no-labels): data with labels has classes and test images of its own"
                yield ("data", key), f"data.{key} {why}"
        return
    unfit = {
        "target": data.target is not None,
        "unlabeled": data.unlabeled is not None,
        "labels_per_class": data.labels_per_class is not None,
        "class_balance": data.class_balance != "none",
        "options": bool(data.options),
    }
    for key in (key for key, given in unfit.items() if given):
        yield ("data", key), f"data.{key} has no effect without labels: leave it out, or {_NO_LABELS}"
    if value.get("curriculum") is not None:
        yield ("curriculum",), f"curriculum orders the images of each class, and there are none with {_NO_LABELS}"
    if not needs_teacher(value.get("method")):
        why = f"method {describe_method(normalize_method(value.get('method')))} learns from labels alone"
        yield ("method",), f"{_NO_LABELS} needs a teacher, and {why}; use kd with alpha: 0"
    ready = True
    if has_classless_teacher(value, every=True):
        for key in ("classes", "labeled_test"):
            if section.get(key) is not None:
                yield ("data", key), f"data.{key}: {_NO_CLASSES}, so the student has none either: leave it out. {_NEXT}"
        ready = False
    for path, network in network_sections(value):
        key = dotted_key(path)
        if path[0] == "student" and network.get("head") == "finetune":
            why = "the probe that it starts from is fitted on labels"
            yield (*path, "head"), f"{key}.head: {why}, and there are none with {_NO_LABELS}: leave it out"
        if path[0] != "teacher":
            continue
        head = network.get("head")
        if network.get("weights") is None:
            ready = False
            yield (
                (*path, "weights"),
                f"{_NO_LABELS} needs a ready teacher, and {key} is not trained: give a run or model folder or "
                "ARCH@WEIGHTS with --teacher, or a recipe's teacher.weights",
            )
        elif head in ("probe", "finetune") or network.get("new_head"):
            ready = False
            setting = "new_head" if network.get("new_head") else "head"
            yield (
                (*path, setting),
                f"{key}.{setting} is fitted on labels, and there are none with {_NO_LABELS}: fit it on labeled images "
                "first, with `potstill train RECIPE --stage teacher`, and give that run with --teacher",
            )
    if ready and section.get("classes") is None:
        yield (
            ("data", "classes"),
            f"{_NO_LABELS} takes the class names from the teacher, and it has none: give those of its outputs with "
            "teacher.classes, a list or FILE or imagenet-1k; with head: zero_shot give data.classes",
        )


def find_problems(value: dict[str, Any], recipe_class: type[BaseModel]) -> list[SettingProblem]:
    """Return all problems of a recipe's plain values; only the first about each key."""
    found: dict[KeyPath, str] = {}
    for path, message in _all_problems(value, recipe_class):
        found.setdefault(path, message)
    return list(found.items())


def _all_problems(value: dict[str, Any], recipe_class: type[BaseModel]) -> Iterator[SettingProblem]:
    yield from _nonfinite(value, ())
    yield from parse_settings(value, recipe_class)[1]
    yield from method_problems(value.get("method"))
    yield from _teacher_problems(value)
    yield from _previous_problems(value)
    yield from _head_problems(value)
    yield from _fallback_problems(value)
    yield from domain_problems(value)
    yield from label_problems(value)
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
        yield ("data", "val"), f"data.val and data.test must sum to less than 1, got {sum_of}"
    if isinstance(data.workers, int) and not 0 <= data.workers <= MAX_PARALLEL:
        yield ("data", "workers"), f"data.workers must be 0 to {MAX_PARALLEL:,} or 'auto', got {data.workers}"
    yield from _fold_problems(data, wrong)
    if data.std is not None and min(data.std) <= 0:
        yield ("data", "std"), f"data.std must be three numbers above 0, got {list(data.std)}"
    scale = data.augment.crop_scale if data.augment else None
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        path = ("data", "augment", "crop_scale")
        yield path, f"{dotted_key(path)} must be two shares, low and high, above 0 and at most 1, got {list(scale)}"


def _fold_problems(data: DataSettings, wrong: set[str]) -> Iterator[SettingProblem]:
    if wrong & {"folds", "fold"}:
        return
    if data.folds is None:
        if data.fold is not None:
            yield ("data", "fold"), f"data.fold: {data.fold} needs data.folds, the number of folds (--folds K)"
        return
    if isinstance(data.fold, int) and not 1 <= data.fold <= data.folds:
        yield ("data", "fold"), f"data.fold must be 1 to {data.folds} (data.folds) or 'all', got {data.fold}"
    if not data.labeled:
        why = "folds have the same share of each class, and images without labels have none"
        yield ("data", "folds"), f"data.folds (--folds): {why}: leave it out with {_NO_LABELS}"
    if data.target is not None:
        why = "the test images are those of data.target, which no fold divides"
        yield ("data", "folds"), f"data.folds (--folds): {why}: leave one of them out"


def network_sections(value: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Yield (key path, section) for the settings of each network and its fallbacks, but for those of a wrong type."""
    for key in ("teacher", "assistants", "previous", "student"):
        yield from _sections_in(value.get(key), (key,))


def _sections_in(section: Any, path: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    if isinstance(section, dict):
        yield path, section
        yield from _sections_in(section.get("fallback"), (*path, "fallback"))
    elif isinstance(section, list):
        for at, each in enumerate(section):
            yield from _sections_in(each, (*path, at))


def _fallback_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    for path, section in network_sections(value):
        key = dotted_key((*path, "fallback"))
        if not section.get("fallback"):
            continue
        if "fallback" in path:
            yield (*path, "fallback"), f"{key}: a fallback has none of its own: add to the list that it is in"
        elif section.get("weights") != "pretrained":
            yield (*path, "fallback"), f"{key} is used where pretrained weights are missing: set weights: pretrained"


def _previous_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    previous = value.get("previous")
    if not isinstance(previous, dict):
        return
    if wrong := [key for key in previous if key not in ("model", "weights", "precision") and previous[key]]:
        yield ("previous", wrong[0]), f"previous.{wrong[0]}: the model in use is taken as it is: leave it out"
    if previous.get("weights") in (None, "pretrained", "own"):
        yield ("previous", "weights"), "previous is a run or model folder: give it with --previous RUN"
    if value.get("assistants"):
        yield ("assistants",), "assistants learn before the student does: leave them or previous out"
    data = value.get("data")
    if isinstance(data, dict) and (data.get("labeled") is False or data.get("target") is not None):
        key = "labeled" if data.get("labeled") is False else "target"
        why = "which images the model in use has right is known only with labels"
        yield ("data", key), f"data.{key}: {why}: leave it or previous out"


def _teacher_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    teacher, method = value.get("teacher"), value.get("method")
    count = len(teacher) if isinstance(teacher, list) else int(teacher is not None)
    if needs_teacher(method):
        if count == 0:
            got = ", got an empty list" if isinstance(teacher, list) else ""
            example = "teacher: {model: resnet50}"
            yield ("teacher",), f"teacher is missing{got}; for example: {example}"
    else:
        why = f"{describe_method(normalize_method(method))} learns from no teacher"
        if value.get("assistants"):
            yield ("assistants",), f"assistants learn from a teacher, and method {why}"
        if value.get("born_again_generations", 1) != 1:
            yield (
                ("born_again_generations",),
                f"born_again_generations: each student learns from the one before, and method {why}",
            )
    combination = value.get("teachers")
    weights = combination.get("weights") if isinstance(combination, dict) else None
    if isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights):
        path = ("teachers", "weights")
        if len(weights) != count:
            yield path, f"teachers.weights must be one number for each of the {count} teachers, got {len(weights)}"
        elif min(weights) < 0 or sum(weights) == 0:
            yield path, f"teachers.weights must be at least 0, and not all 0, got {weights}"


def _is_unlabeled(value: dict[str, Any]) -> bool:
    data = value.get("data")
    return isinstance(data, dict) and data.get("labeled") is False


def _head_problems(value: dict[str, Any]) -> Iterator[SettingProblem]:
    for network_path, section in network_sections(value):
        head, network = section.get("head"), dotted_key(network_path)
        if section.get("prompts") is not None:
            yield from _prompt_problems(section, (*network_path, "prompts"))
        if head is None:
            continue
        key, path = f"{network}.head", (*network_path, "head")
        if network_path[0] == "assistants":
            yield path, f"{key} is for teachers and the student: leave it out"
        elif network_path[0] == "student" and head not in ("finetune", "random"):
            yield path, f"{key}: {head} leaves nothing to distil into: use finetune, or leave it out"
        elif section.get("weights") is None:
            if network_path[0] == "teacher" and _is_unlabeled(value):
                continue  # reported by label_problems, and to train it from scratch would be no way out
            yield (
                path,
                f"{key} needs a pretrained encoder, and {network}.weights is not given: set it "
                f"to pretrained or to a file, or set {key}=null to train from scratch",
            )
        elif head == "none":
            yield from _no_head_problems(section, value, network_path)
        elif head == "zero_shot":
            model = section.get("model")
            if isinstance(model, str) and model != "?" and not model.startswith("open_clip/"):
                yield (
                    path,
                    f"{key}: zero_shot needs a network with a text tower, and {model} has none: use open_clip/NAME "
                    '(`potstill models "open_clip/*"`), or head: probe',
                )
            if section.get("classes") is not None:
                yield (
                    (*network_path, "classes"),
                    f"{network}.classes has no effect with head: zero_shot, whose outputs are the classes of the data: "
                    f"leave it out; {network}.prompts: {{class: [text]}} rephrases them",
                )


def _no_head_problems(section: dict[str, Any], value: dict[str, Any], path: KeyPath) -> Iterator[SettingProblem]:
    network, data = dotted_key(path), value.get("data")
    given = data if isinstance(data, dict) else {}
    if section.get("classes") is not None:
        yield (*path, "classes"), f"{network}.classes has no effect with {network}.head: none: leave one of them out"
    if section.get("new_head"):
        yield (*path, "new_head"), f"{network}.new_head has no effect with {network}.head: none: leave one of them out"
    if _is_unlabeled(value) and not has_classless_teacher(value, every=True):
        yield (
            (*path, "head"),
            f"{network}.head: none: without labels (--no-labels) either every teacher names the classes, or none does: "
            "set it for all teachers, or for none",
        )
    if given.get("target") is not None:
        yield (*path, "head"), f"{network}.head: none: data.target needs a teacher that predicts its classes"
    if value.get("curriculum") is not None:
        yield (*path, "head"), f"{network}.head: none: curriculum orders images by the predictions of the teacher"
    if value.get("born_again_generations", 1) != 1 or value.get("assistants"):
        chain = "assistants" if value.get("assistants") else "born_again_generations"
        yield (chain,), f"{chain} cannot begin with a teacher without classes ({network}.head: none): leave one out"


def _prompt_problems(section: dict[str, Any], path: KeyPath) -> Iterator[SettingProblem]:
    prompts, key = section["prompts"], dotted_key(path)
    if section.get("head") != "zero_shot":
        yield path, f"{key} is for head: zero_shot only: set head: zero_shot, or leave it out"
    elif isinstance(prompts, list):
        for at, text in enumerate(prompts):
            if isinstance(text, str) and "{}" not in text:
                yield (
                    (*path, at),
                    f'{key}[{at}] must contain {{}} for the class name, as in "a photo of a {{}}.", got {text!r}; '
                    "texts for each class: {class: [texts]}",
                )


# Settings that have an effect only with certain others: the condition, and the message if it does not hold.
_HAS_EFFECT: dict[str, tuple[Callable[[TrainingSettings], bool], str]] = {
    "momentum": (
        lambda training: training.optimizer.lower() in ("sgd", "dot"),
        "has an effect with optimizer: sgd or dot only; for others, use optimizer_options",
    ),
    "dot_delta": (lambda training: training.optimizer.lower() == "dot", "has an effect with optimizer: dot only"),
    "gamma": (lambda training: training.schedule == "step", "has an effect with schedule: step only"),
    "min_lr_ratio": (lambda training: training.schedule == "cosine", "has an effect with schedule: cosine only"),
    "decay_all": (lambda training: training.weight_decay > 0, "has no effect with weight_decay: 0"),
    "layer_decay_no_opt_scale": (
        lambda training: "layer_decay" in training.model_fields_set,  # null may replace a recipe's
        "has an effect with layer_decay only",
    ),
}


def _training_problems(shared: dict[str, Any], value: dict[str, Any]) -> Iterator[SettingProblem]:
    """Yield the problems of training settings; those of several settings are checked on each network's merged ones."""
    data = value.get("data")
    weighted = isinstance(data, dict) and data.get("class_balance") == "weights"
    used_by: dict[str, list[bool]] = {}  # by shared setting: whether it has an effect on a network that inherits it
    for network_path, section in network_sections(value):
        own = section.get("training", {})
        if not isinstance(own, dict):
            continue
        _, problems = parse_settings(own, TrainingSettings)
        for path, message in problems:
            yield (*network_path, "training", *path), f"{dotted_key(network_path)}.training.{message}"
        ignored = set() if network_path[0] == "student" else {"qat_fraction"}  # as in Recipe.stage_training
        common = {key: item for key, item in shared.items() if key not in ignored}
        merged, wrong = parse_valid_settings({**common, **own}, TrainingSettings)
        for key, (has_effect, message) in _HAS_EFFECT.items():
            default = TrainingSettings.model_fields[key].default
            if key in own and own[key] != default and not (wrong or has_effect(merged)):
                yield (*network_path, "training", key), f"{dotted_key(network_path)}.training.{key} {message}"
            elif key not in own:
                used_by.setdefault(key, []).append(bool(wrong) or has_effect(merged))
        if weighted and merged.batch_size == 1 and "batch_size" not in wrong:
            section_path = (*network_path, "training") if "batch_size" in own else ("training",)
            message = "data.class_balance: weights has no effect in a batch of one image"
            yield (*section_path, "batch_size"), f"{dotted_key(section_path)}.batch_size must be at least 2: {message}"
        for key in ("freeze", "freeze_batch_norm", "layer_decay"):
            used = getattr(merged, key) not in (0, False, None, "auto")
            if used and key not in wrong and section.get("weights") is None:
                section_path = (*network_path, "training") if key in own else ("training",)
                advice = f"set it for a network with weights only, for example teacher.training.{key}"
                yield (
                    (*section_path, key),
                    f"{dotted_key((*section_path, key))} needs initial weights, and {dotted_key(network_path)}.weights "
                    f"is not given: {'give them, or leave it out' if key in own else advice}",
                )
        for keys, message in _schedule_problems(merged):
            if wrong.intersection(keys):
                continue
            own_key = next((key for key in keys if key in own), None)
            if own_key is not None:
                yield (*network_path, "training", own_key), f"{dotted_key(network_path)}.training.{message}"
            else:
                yield ("training", next((key for key in keys if key in shared), keys[0])), f"training.{message}"
    for key, effects in used_by.items():
        if key in shared and shared[key] != TrainingSettings.model_fields[key].default and not any(effects):
            yield ("training", key), f"training.{key} {_HAS_EFFECT[key][1]}"


def _schedule_problems(training: TrainingSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (keys, message): settings that contradict each other, and a message that begins with one of them."""
    milestones = training.milestones
    if milestones and training.schedule != "step":
        yield ("milestones", "schedule"), f"milestones need schedule: step, got schedule: {training.schedule}"
    elif training.schedule == "step" and not milestones:
        yield ("schedule", "milestones"), "schedule step needs milestones, for example: milestones: [60, 80]"
    elif milestones and (
        milestones != sorted(set(milestones)) or milestones[0] < 1 or milestones[-1] >= training.epochs
    ):
        yield (
            ("milestones", "epochs"),
            f"milestones must rise from 1 to below epochs {training.epochs}, got {milestones}",
        )
    if milestones and training.schedule == "step" and milestones[0] <= training.warmup_epochs:
        yield (
            ("milestones", "warmup_epochs"),
            f"milestones must come after warmup_epochs, {training.warmup_epochs:g}, got {milestones}",
        )
    ratios = {"cosine": ("min_lr_ratio", training.min_lr_ratio), "step": ("gamma", training.gamma)}
    key, ratio = ratios.get(training.schedule, ("", 0.0))
    if ratio == 1:
        yield (key, "schedule"), f"{key} 1 makes schedule: {training.schedule} constant; set schedule: constant"
    for key in sorted({"params", *_own_settings(training.optimizer)} & training.optimizer_options.keys()):
        own = f"training.{'dot_delta' if key == 'delta' else key}" if key != "params" else "the student's weights"
        yield (
            ("optimizer_options",),
            f"optimizer_options.{key} contradicts {own}: leave it out",
        )
    if training.warmup_epochs > training.epochs:
        yield (
            ("warmup_epochs", "epochs"),
            f"warmup_epochs must be at most epochs, {training.epochs}, got {training.warmup_epochs:g}",
        )
    if training.freeze >= training.epochs:
        yield (
            ("freeze", "epochs"),
            f"freeze must be below epochs, {training.epochs}, got {training.freeze}: otherwise no epoch trains the "
            "encoder",
        )
    if training.early_stopping_patience and 0 < training.qat_fraction < 1:
        yield (
            ("early_stopping_patience", "qat_fraction"),
            "early_stopping_patience may end the training before quantization-aware training begins; leave one "
            "of them out, or set qat_fraction: 1",
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
    if isinstance(training.threads, int) and not 1 <= training.threads <= MAX_PARALLEL:
        yield ("threads",), f"threads must be 1 to {MAX_PARALLEL:,} or 'auto', got {training.threads}"


def _own_settings(optimizer: str) -> tuple[str, ...]:
    """Return the keyword arguments of an optimizer that are training settings."""
    momenta = {"sgd": ("momentum", "nesterov"), "dot": ("momentum", "delta")}
    return ("lr", "weight_decay", *momenta.get(optimizer.lower(), ()))


# Classes of torch.optim, to spare importing torch, which takes seconds; other names are looked up there.
_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
)  # fmt: skip


def _is_optimizer(name: str) -> bool:
    if name.lower() in {"dot", *(each.lower() for each in _OPTIMIZERS)}:
        return True
    from potstill.training.optim import get_optimizer_class

    try:
        get_optimizer_class(name)
    except UsageError:
        return False
    return True
