"""Changes to a recipe's plain values before validation: daily flags, ``--set key=value``, and the architectures that
pretrained weights of ours determine.
"""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from potstill.code_references import is_code_reference, is_from_caller, permit_code
from potstill.config.settings_errors import dotted_key
from potstill.config.validation import has_classless_teacher, network_sections
from potstill.config.yaml import Document, KeyPath, parse_yaml
from potstill.errors import ArtifactError, PotstillError, UsageError
from potstill.hub import HUB_PREFIX, is_hub_model, model_path, pinned_name
from potstill.io import read_bytes, read_checksummed_json
from potstill.methods import METHOD_SETTINGS, list_own_methods, method_info, normalize_method
from potstill.models.class_names import CLASS_LISTS, class_list
from potstill.models.exported_files import (
    EXECUTABLE,
    LABELS,
    METADATA_KEY,
    SUFFIXES,
    check_permission,
    identify_file,
    parse_metadata,
    read_properties,
)

# Flags that change one setting each.
SETTING_FLAGS: Mapping[str, KeyPath] = {
    "--epochs": ("training", "epochs"),
    "--lr": ("training", "lr"),
    "--batch-size": ("training", "batch_size"),
    "--image-size": ("data", "size"),
    "--unlabeled": ("data", "unlabeled"),
    "--labeled-test": ("data", "labeled_test"),
    "--device": ("training", "device"),
    "--method": ("method", "name"),
    "--temperature": ("method", "temperature"),
    "--alpha": ("method", "alpha"),
    "--seed": ("seed",),
    "--seeds": ("seeds",),
    "--folds": ("data", "folds"),
}
FLAGS = ("--data", "--skip-bad", "--no-labels", "--teacher", "--student", "--previous", *SETTING_FLAGS)
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".th", ".ckpt", ".bin", ".pth.tar", ".json", ".ts", *SUFFIXES)
WITHOUT_FILE = ("pretrained", "own")  # weights that are no path: published ones, and those of the user's own code
# A folder with one of these files is a run, a model, or a network of the Hugging Face hub.
MODEL_FOLDER_FILES = ("model.json", "recipe.yaml", "results.json", "config.json")


def apply_overrides(document: Document, flags: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Change ``document.value`` in place: first by flags, then by ``overrides``, the texts after ``--set``."""
    for flag in FLAGS:
        if flags.get(flag) is not None and flag not in SETTING_FLAGS:
            _apply_flag(document, flag, flags[flag])
    changes = [
        (path, flags[flag], f"{flag} {flags[flag]}")
        for flag, path in SETTING_FLAGS.items()
        if flags.get(flag) is not None
    ]
    assignments = [
        (change[0], change[1], f"--set {text}")
        for text in overrides
        if (change := _parse_assignment(document, text)) is not None
    ]
    # With a previous model, flags are for the method inside pct, and --set for pct: method.base_method.alpha=0.5.
    inner, outer = (changes, assignments) if document.value.get("previous") is not None else ([], changes + assignments)
    for group in (inner, outer):
        given = {path: value for path, value, _ in group}
        _prepare_method(document, given, allow_code=bool(flags.get("--allow-code")))
        for path, value, location in group:
            _prepare_fallback(document.value, path)
            _set_value(document, path, value, location)
        wrap_method_for_previous(document.value)
    changes += assignments
    _drop_own_training(document, changes)
    if flags.get("--no-labels"):
        _drop_label_term(document, {path for path, *_ in changes})


def _drop_own_training(document: Document, changes: list[tuple[KeyPath, Any, str]]) -> None:
    """Remove from the student's section the settings that the caller gives for all networks, which would have no
    effect (a run folder's recipe has the student's epochs); the teacher's section stays.
    """

    def given(*section: str) -> set[Any]:
        keys = {path[len(section)] for path, *_ in changes if path[:-1] == section}
        whole = (value for path, value, _ in changes if path == section and isinstance(value, dict))
        return keys.union(*whole)

    student = document.value.get("student")
    if not isinstance(student, dict):
        return
    dropped = given("training") - given("student", "training")
    fallback = student.get("fallback")
    for section in [student, *(fallback if isinstance(fallback, list) else ())]:
        training = section.get("training") if isinstance(section, dict) else None
        if isinstance(training, dict):
            section["training"] = {key: value for key, value in training.items() if key not in dropped}


def split_model(text: str) -> tuple[str | None, str | None]:
    """Split a value of ``--teacher`` or ``--student`` into (architecture, weights); either may be None.

    Example:
        >>> split_model("resnet18")
        ('resnet18', None)
        >>> split_model("resnet18@pretrained")
        ('resnet18', 'pretrained')
        >>> split_model("./weights/mine.safetensors")
        (None, './weights/mine.safetensors')
        >>> split_model("hf-hub:user/name@main")
        (None, 'hf-hub:user/name@main')
        >>> split_model("./mine.py:Net@weights.pth")
        ('./mine.py:Net', 'weights.pth')
    """
    if is_hub_model(text):
        return None, text
    architecture, _, weights = text.partition("@")
    if is_code_reference(architecture):
        return architecture, weights or None
    if _is_path(text):
        return None, text
    return architecture, weights or None


def _is_path(text: str) -> bool:
    if text.startswith((".", "/", "~")) or ("@" not in text and text.endswith(WEIGHT_FILES)):
        return True
    # A folder that happens to be called resnet18 does not hide the architecture of that name.
    path = Path(text)
    return path.is_file() or any((path / name).is_file() for name in MODEL_FOLDER_FILES)


def _apply_flag(document: Document, flag: str, value: Any) -> None:
    location = f"{flag} {value}"
    if flag == "--data":
        data = document.value.get("data")
        if isinstance(data, dict) and data.get("source") != value:
            data.pop("options", None)  # they belong to the data set that the recipe had before
        _set_value(document, ("data", "source"), os.fspath(value), location)
    elif flag == "--no-labels":
        _set_value(document, ("data", "labeled"), not value, flag)
    elif flag == "--skip-bad":
        _set_value(document, ("data", "skip_bad"), bool(value), flag)
    elif flag == "--teacher":
        _set_teachers(document, [value] if isinstance(value, (str, os.PathLike)) else list(value))
    elif flag == "--previous":
        document.value["previous"] = None
        _set_value(document, ("previous", "weights"), os.fspath(value), location)
    else:
        architecture, weights = split_model(os.fspath(value))
        if isinstance(student := document.value.get("student"), dict):
            document.value["student"] = _settings_for(student, weights)
        _set_value(document, ("student", "model"), architecture, location)
        _set_value(document, ("student", "weights"), weights, location)


def _set_teachers(document: Document, named: list[Any]) -> None:
    """Replace the teachers; each keeps the other settings of the recipe's teacher at its position, else of the last."""
    former = document.value.get("teacher")
    sections = former if isinstance(former, list) else [former]
    if not all(section is None or isinstance(section, dict) for section in sections):
        sections = [None]  # the wrong value is replaced
    path: KeyPath
    if len(named) > 1 or isinstance(former, list):
        kept = [copy.deepcopy(sections[min(at, len(sections) - 1)] if sections else None) for at in range(len(named))]
        document.value["teacher"] = kept if len(named) > 1 else kept[0]
        document.locations.replace(("teacher",), " ".join(f"--teacher {each}" for each in named))
    for at, each in enumerate(named):
        architecture, weights = split_model(os.fspath(each))
        path = ("teacher", at) if len(named) > 1 else ("teacher",)
        if isinstance(section := sections[min(at, len(sections) - 1)] if sections else None, dict):
            if len(named) > 1:
                document.value["teacher"][at] = _settings_for(section, weights)
            else:
                document.value["teacher"] = _settings_for(section, weights)
        for key, text in (("model", architecture), ("weights", weights)):
            _set_value(document, (*path, key), text, f"--teacher {each}")


def _prepare_fallback(value: Any, path: KeyPath) -> None:
    """Remove the fallback of a network that the caller names, or the setting ``path`` from its entries, but for
    what they switch off (``head: null``).
    """
    for at, key in enumerate(path):
        fallback = value.get("fallback") if isinstance(value, dict) else None
        if isinstance(fallback, list) and key in ("model", "weights"):  # whoever names a network wants no other
            del value["fallback"]
        elif isinstance(fallback, list):
            for each in fallback:
                *sections, last = path[at:]
                for section in sections:
                    each = each.get(section) if isinstance(each, dict) else None
                if isinstance(each, dict) and each.get(last):
                    del each[last]
        if isinstance(value, list) and str(key).isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            value = value.get(key) if isinstance(value, dict) else None


def complete_fallbacks(section: dict[str, Any]) -> None:
    """Complete each of a network's fallbacks in place by the settings that it leaves as they are."""
    fallbacks = section.get("fallback")
    if not isinstance(fallbacks, list):
        return
    for at, each in enumerate(fallbacks):
        if isinstance(each, dict) and "fallback" not in each:
            completed = copy.deepcopy({key: item for key, item in section.items() if key != "fallback"}) | each
            former, own = section.get("training"), each.get("training")
            if isinstance(former, dict) and isinstance(own, dict):
                completed["training"] = former | own
            fallbacks[at] = completed


def _settings_for(section: dict[str, Any], weights: str | None) -> dict[str, Any]:
    """Return the settings that a network given by a flag keeps: of the first alternative with weights, or without."""
    section = copy.deepcopy(section)
    complete_fallbacks(section)
    fallbacks = section.pop("fallback", None)
    for each in [section, *(fallbacks if isinstance(fallbacks, list) else ())]:
        if isinstance(each, dict) and (each.get("weights") is None) == (weights is None):
            section = each
            break
    dropped = {"head"} if weights is None else set()
    if weights is not None and weights not in WITHOUT_FILE and find_model_json(Path(weights).expanduser()):
        dropped = {"head", "size"}
    return {key: item for key, item in section.items() if key not in dropped}


def _parse_assignment(document: Document, text: str) -> tuple[KeyPath, Any] | None:
    key, equals, yaml_value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        document.problems.append(f"--set {text}: write it as key=value, for example --set training.epochs=5")
        return None
    try:
        parsed = parse_yaml(yaml_value, f"--set {text}")
    except UsageError as error:
        document.problems.append(str(error))
        return None
    document.problems += parsed.problems
    return tuple(parts), parsed.value


def _set_value(document: Document, path: KeyPath, value: Any, location: str) -> None:
    """Set one key; ``teacher.1.size`` reaches into a list."""
    section, done = document.value, list[str | int]()
    for key in path[:-1]:
        inner = _resolve_key(document, section, key, done, location)
        if inner is None:
            return
        section, at = inner
        if section[at] is None:
            section[at] = {}
            document.locations.replace((*done, at), location)
        section = section[at]
        done.append(at)
    last = _resolve_key(document, section, path[-1], done, location)
    if last is not None:
        section, at = last
        section[at] = value
        document.locations.replace((*done, at), location)


def _resolve_key(
    document: Document, section: Any, key: str | int, done: list[str | int], location: str
) -> tuple[Any, str | int] | None:
    """Return (section, key in it), made if missing; None, and a problem recorded, if there can be none."""
    enclosing = dotted_key(tuple(done))
    if isinstance(section, dict):
        section.setdefault(key, None)
        return section, key
    if isinstance(section, list):
        if str(key).isdecimal() and int(key) < len(section):
            return section, int(key)
        known = f"{enclosing}.0" + (f" to {enclosing}.{len(section) - 1}" if len(section) > 1 else "")
        document.problems.append(f"{location}: {enclosing} is a list with the members {known}")
        return None
    document.problems.append(f"{location}: {enclosing} is a single value without keys")
    return None


def _prepare_method(document: Document, changes: dict[KeyPath, Any], *, allow_code: bool) -> None:
    """Drop options of the recipe's method that the coming changes replace."""
    ours = [path for path in changes if path[0] == "method" and len(path) > 1]
    if isinstance(document.value.get("method"), list) and any(not str(path[1]).isdecimal() for path in ours):
        document.value["method"] = normalize_method(document.value["method"])
        document.locations.move(("method",), ("method", "methods"))
    method = document.value.get("method")
    if not isinstance(method, dict):
        return
    if ("method", "name") in changes:
        _drop_options(method, changes["method", "name"])
    if ("method", "preset") in changes:
        name = str(changes.get(("method", "name"), method.get("name")))
        own = allow_code or ("method", "name") in changes or is_from_caller(("method", "name"), document.locations)
        if own or not is_code_reference(name):  # looking up the presets loads code, which a file alone may not do
            _drop_preset_options(method, name, changes["method", "preset"])


def _drop_options(method: dict[str, Any], name: Any) -> None:
    """Remove the options of another method: alpha of one paper is not alpha of the next."""
    if method.get("name") != name:
        for key in [key for key in method if key != "name"]:
            del method[key]


def _drop_label_term(document: Document, changed: set[KeyPath]) -> None:
    """Set the method's label weight to 0 and fit no head for the student, unless the caller has set these."""
    student = document.value.get("student")
    if isinstance(student, dict) and student.get("head") is not None and ("student", "head") not in changed:
        _set_value(document, ("student", "head"), None, "--no-labels")
    method = document.value.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if not isinstance(name, str) or is_code_reference(name) or name not in list_own_methods():
        return
    key = "alpha" if name == "kd" else "ce_weight"
    if key in method_info(name).options and ("method", key) not in changed:
        _set_value(document, ("method", key), 0.0, "--no-labels")


def choose_method(value: dict[str, Any], classes: int | None = None) -> bool:
    """Replace, in place, the method ``auto`` by one that suits the networks; return whether it was ``auto``.

    Call it after ``fill_architectures``.

    ``srd`` if a teacher has no classes (``head: none``), or if the student starts from scratch and its one teacher has
    embeddings that are worth learning, made from more images than the student's: weights that no run of potstill has
    trained from scratch; ``dist`` for other students from scratch, unless there are two ``classes`` (None: not known
    yet), which it does not tell apart; else ``kd``, also where an option is given that only ``kd`` has.  A pretrained
    student learns from the labels too, unless most of its images have none.
    """
    owner, key = value, "method"
    if isinstance(value.get("method"), dict) and value["method"].get("name") == "pct":
        owner, key = value["method"], "base_method"
    method, student, teacher, data = owner.get(key), value.get("student"), value.get("teacher"), value.get("data")
    if not isinstance(method, dict) or method.get("name") != "auto":
        return False
    teacher = teacher[0] if isinstance(teacher, list) and len(teacher) == 1 else teacher
    model = teacher.get("model") if isinstance(teacher, dict) else None
    weights = teacher.get("weights") if isinstance(teacher, dict) else None
    ready = weights is not None and not _trained_from_scratch(weights)
    embeds = ready and isinstance(model, str) and model not in LABELS and not is_code_reference(model)
    if embeds and str(model).startswith("python/"):  # of potstill.run(teacher=...), where torch is imported already
        from potstill.models.families.own_models import is_given_function

        embeds = not is_given_function(str(model))
    scratch = isinstance(student, dict) and student.get("weights") is None
    data = data if isinstance(data, dict) else {}
    unlabeled = data.get("labeled") is False
    few_labels = unlabeled or any(data.get(key) is not None for key in ("unlabeled", "labels_per_class", "target"))
    classless = has_classless_teacher(value)
    name = "srd" if classless or (embeds and scratch) else "dist" if scratch else "kd"
    given = {option: each for option, each in method.items() if option != "name"}
    options = given.keys() - set(METHOD_SETTINGS)
    unsuited = (name == "dist" and classes == 2) or not options <= method_info(name).options.keys()
    if not classless and unsuited and options <= method_info("kd").options.keys():
        name = "kd"
    defaults: dict[str, dict[str, Any]] = {
        "srd": {"temperature": 1.0} | ({"ce_weight": 0.0} if unlabeled else {}),
        "dist": {"ce_weight": 0.0},
        "kd": {"temperature": 1.0, "alpha": 0.0} if scratch or few_labels else {"temperature": 4.0, "alpha": 0.5},
    }
    owner[key] = {"name": name} | defaults[name] | given
    return True


def _trained_from_scratch(weights: Any) -> bool:
    """Whether ``weights`` is the model folder of a run that trained the network from noise, or took it from such."""
    seen = set[str]()
    while isinstance(weights, str) and weights not in seen:
        seen.add(weights)
        try:
            facts = read_checksummed_json(Path(weights) / "model.json").get("facts")
        except (PotstillError, OSError):
            return False  # other weights; what is wrong with them is reported elsewhere
        if not isinstance(facts, dict):
            return False
        if (weights := facts.get("weights")) is None:
            return "training" in facts
    return False


def drop_soft_targets(value: dict[str, Any]) -> None:
    """Set, in place, ``method.kd_weight`` to 0 if it is not given and a teacher has no classes (``head: none``)."""
    method = value.get("method")
    if not has_classless_teacher(value):
        return
    name = method.get("name") if isinstance(method, dict) else method
    if name in list_own_methods() and "kd_weight" in method_info(str(name)).options:
        value["method"] = {"kd_weight": 0.0} | (dict(method) if isinstance(method, dict) else {"name": name})


def wrap_method_for_previous(value: dict[str, Any]) -> None:
    """Put, in place, method ``pct`` around ``method`` if there is a ``previous`` model and it is not there yet."""
    method = normalize_method(value.get("method"))
    if value.get("previous") is not None and isinstance(method, dict) and method.get("name") != "pct":
        value["method"] = {"name": "pct", "base_method": method}


def _drop_preset_options(method: dict[str, Any], name: str, preset: Any) -> None:
    """Remove what a preset sets: given with ``--set``, it overrides the file; inside the file, options override it."""
    try:
        chosen = method_info(name).presets.get(str(preset), {})
    except UsageError:
        return  # reported by the check
    for key in chosen:
        method.pop(key, None)


_MAX_CLASS_FILE_BYTES = 10_000_000
# The stages of a run from which a teacher or a student starts, best first.
_STAGE_PREFERENCE = {"teacher": ("teacher", "distilled", "baseline"), "student": ("distilled", "baseline", "teacher")}


def fill_architectures(
    value: dict[str, Any], *, allow_code: bool = False, recorded: bool = False
) -> list[tuple[KeyPath, PotstillError]]:
    """Fill in, in place, ``model`` of each network from its ``weights``, and the model folder of a run; return the keys
    whose weights cannot be used, each with the error.
    """
    failures: list[tuple[KeyPath, PotstillError]] = []
    for path, section in network_sections(value):
        name = dotted_key(path)
        try:
            _fill_classes(section, f"{name}.classes")
        except PotstillError as error:
            failures.append(((*path, "classes"), error))
            section["classes"] = None
        model = section.get("model")
        if isinstance(model, str) and is_hub_model(model) and section.get("weights") in (None, "pretrained"):
            section["model"], section["weights"] = None, model  # a repository gives both
        elif section.get("weights") is None and isinstance(model, str):
            try:
                _fill_weights(section, path)
            except PotstillError as error:
                failures.append(((*path, "model"), error))
        section.update(_listed_prompts(section))
        if not isinstance(section.get("weights"), str):
            if section.get("classes") is not None:
                failures.append(
                    (
                        (*path, "classes"),
                        UsageError(f"{name}.classes is for a network with weights, and {name}.weights is not set"),
                    )
                )
            continue
        try:
            _fill_section(section, name, allow_code=allow_code, recorded=recorded)
        except PotstillError as error:
            failures.append(((*path, "weights"), type(error)(f"{name}.weights: {error}")))
            section.setdefault("model", None)
            section["model"] = section["model"] or "?"  # one message about these weights is enough
    return failures


def fill_class_names(value: dict[str, Any]) -> list[tuple[KeyPath, PotstillError]]:
    """Fill in, in place, ``data.classes`` of data without labels by the classes of the first teacher, if it has any;
    call it after ``fill_architectures``.  Return ``data.classes`` with an error, if its file cannot be read.
    """
    data = value.get("data")
    if not isinstance(data, dict) or data.get("labeled") is not False or has_classless_teacher(value, every=True):
        return []
    if isinstance(data.get("classes"), str):
        try:
            data["classes"] = read_class_file(data["classes"], "data.classes")
        except PotstillError as error:
            data["classes"] = None
            return [(("data", "classes"), error)]
    elif data.get("classes") is None:
        teacher = value.get("teacher")
        first = teacher[0] if isinstance(teacher, list) and teacher else teacher
        try:
            if isinstance(first, dict) and (names := _class_names(first)) is not None:
                data["classes"] = names
        except PotstillError as error:
            return [(("teacher", "weights"), error)]
    return []


def _class_names(teacher: dict[str, Any]) -> list[str] | None:
    """Return the class names that a teacher's section or its weights give; None if they give none."""
    classes, weights = teacher.get("classes"), teacher.get("weights")
    if isinstance(classes, str):
        return list(class_list(classes)) if classes in CLASS_LISTS else None
    if classes:
        return [str(name) for name in classes]
    if not isinstance(weights, str) or weights in WITHOUT_FILE:
        return None
    path = Path(weights).expanduser()
    card = find_model_json(path, "teacher")
    if card is not None:
        found = read_checksummed_json(card).get("class_names")
        return [str(name) for name in found] if isinstance(found, list) else None
    kind = identify_file(path)
    if kind == "table":
        from potstill.models.answer_tables import read_answers  # NumPy, which lists of recipes do without

        table = read_answers(path)
        return None if table.class_names is None else list(table.class_names)
    if kind == "onnx":
        text = read_properties(read_bytes(path), str(path)).get(METADATA_KEY)
        return None if text is None else list(parse_metadata(text, str(path)).class_names)
    if (path / "config.json").is_file() or path.parent.joinpath("config.json").is_file():
        from potstill.models.state_dict import read_class_names  # torch, which takes seconds

        names = read_class_names(path)
        return None if names is None else list(names)
    return None


def find_model_json(path: Path, stage: str = "student") -> Path | None:
    """Return the model.json of a model file, model folder or run folder (of its ``stage``); None: there is none."""
    if path.is_file():
        card = path if path.suffix == ".json" else path.with_suffix(".json")
        return card if card.is_file() and path.stem == "model" else None
    folders = [
        path,
        *(path / name for name in _STAGE_PREFERENCE["teacher" if stage.startswith("teacher") else "student"]),
    ]
    return next((folder / "model.json" for folder in folders if (folder / "model.json").is_file()), None)


def _fill_weights(section: dict[str, Any], path: KeyPath) -> None:
    """Fill in the weights of a teacher that its ``model`` already is: a file of another program, or a function."""
    model = section["model"]
    if model.endswith((".ts", *SUFFIXES)) and not is_code_reference(model):
        section["model"], section["weights"] = None, model
    elif path[0] == "teacher" and is_code_reference(model):
        from potstill.models.families.own_models import names_function

        if names_function(model):
            section["weights"] = "own"


def _fill_classes(section: dict[str, Any], key: str) -> None:
    """Replace the path of a class file by its names, and each value of a mapping by a list."""
    classes = section.get("classes")
    if isinstance(classes, str) and classes not in CLASS_LISTS:
        section["classes"] = read_class_file(classes, key)
    elif isinstance(classes, dict):
        section["classes"] = {
            str(mine): [theirs] if isinstance(theirs, (str, int)) else theirs for mine, theirs in classes.items()
        }


def _listed_prompts(section: dict[str, Any]) -> dict[str, Any]:
    """Return ``prompts`` with a list in place of each single text."""
    prompts = section.get("prompts")
    if isinstance(prompts, str):
        return {"prompts": [prompts]}
    if isinstance(prompts, dict):
        return {"prompts": {str(key): [text] if isinstance(text, str) else text for key, text in prompts.items()}}
    return {}


def read_class_file(file: str, key: str) -> list[str]:
    """Return the class names in a text file, one per line."""
    path = Path(file).expanduser()
    try:
        text = path.read_bytes()[:_MAX_CLASS_FILE_BYTES].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(
            f"{key}: {file} cannot be read as class names, one per line: {reason}\n"
            f"Lists by name: {', '.join(CLASS_LISTS)}"
        ) from error
    names = [line.strip() for line in text.splitlines()]
    return [name for name in names if name]


def _fill_section(section: dict[str, Any], stage: str, *, allow_code: bool, recorded: bool) -> None:
    """``stage`` is the section's key: "student", "teacher[1]"."""
    weights = section["weights"]
    if weights in WITHOUT_FILE or (recorded and section.get("model")):
        return  # a run's recipe has both; a teacher of it that was deleted or moved since is not needed
    section["weights"] = pinned_name(weights)
    path = model_path(weights)
    if not path.exists():
        raise UsageError(f"no such file or folder: {weights}")
    card = find_model_json(path, stage)
    if card is None:
        if path.is_dir() and not (path / "config.json").is_file():
            raise UsageError(
                f"{weights} is neither a run folder with a finished model, nor a model folder, nor a folder of the "
                "Hugging Face hub with config.json"
            )
        if not section.get("model"):
            section["model"] = identify_file(path)
        if not section["model"]:
            from potstill.models.foreign_checkpoints import identify_network  # torch, which takes seconds

            section["model"] = identify_network(path)
        if section["model"] in EXECUTABLE:
            if allow_code:
                permit_code([str(path.resolve())])
            check_permission(section["model"], weights, str(path.resolve()))
        return
    architecture = read_checksummed_json(card).get("architecture")
    if not isinstance(architecture, str):
        raise ArtifactError(f"{card} is damaged: it names no architecture")
    if section.get("model") not in (None, architecture):
        raise UsageError(f"{weights} is a {architecture}, but {stage}.model is {section['model']}")
    if is_code_reference(architecture) and section.get("model") is None and not allow_code:
        raise UsageError(
            f"{weights} is a network whose code would run on this machine: {architecture}\n"
            "Read that code; if you trust it, add --allow-code (from Python: allow_code=True)"
        )
    if allow_code:
        permit_code([architecture, str(card.parent.resolve())])
    section["model"] = architecture
    if not weights.startswith(HUB_PREFIX):
        section["weights"] = str(card.parent)
