"""Settings objects from plain values, with pydantic's errors as messages that give key, value and nearest name."""

import json
import os
import types
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from potstill.config.yaml import KeyPath
from potstill.errors import did_you_mean

Model = TypeVar("Model", bound=BaseModel)
SettingProblem = tuple[KeyPath, str]  # key and message

_EXPECTED_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
}
RENAMED_KEYS = {  # old: new
    "pick_by": "selection_metric",
    "view_seed": "augmentation_seed",
    "fit": "resize_mode",
    "accumulate": "gradient_accumulation_steps",
    "clip_norm": "max_grad_norm",
    "final_lr_share": "min_lr_ratio",
    "int8_share": "qat_fraction",
    "early_stopping": "early_stopping_patience",
    "memory_share": "cache_fraction",
    "store": "teacher_cache",
    "balance": "class_balance",
    "policy": "auto_augment",
    "layers": "feature_pairs",
    "generations": "born_again_generations",
}
_CHOICE_HINTS = {  # hints for wrong values
    ("selection_metric", "loss"): "; the weights of the training loss may differ between epochs or runs: use nll, "
    "the cross-entropy with the labels alone"
}
ONE, SEVERAL = "one network", "several networks"  # tags of a union of settings and a list of them
# Tags of the forms of a network's `classes`.
CLASS_LIST_NAME, CLASS_MAPPING, CLASS_SEQUENCE = "name of a class list", "mapping of classes", "list of classes"
PROMPT_MAPPING, PROMPT_SEQUENCE = "mapping of prompts", "list of prompts"  # tags of the forms of `prompts`
_TAGS = (ONE, SEVERAL, CLASS_LIST_NAME, CLASS_MAPPING, CLASS_SEQUENCE, PROMPT_MAPPING, PROMPT_SEQUENCE)
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def parse_settings(section: Any, model: type[Model]) -> tuple[Model | None, list[SettingProblem]]:
    """Return ``section`` as a settings object, or None and its problems."""
    try:
        # Strict: "30" is no number and 1 no bool.  JSON: a list is accepted for a tuple.
        return model.model_validate_json(json.dumps(section, default=str), strict=True), []
    except ValidationError as error:
        return None, _format_errors(error.errors(include_url=False), section, model)


def parse_valid_settings(section: dict[str, Any], model: type[Model]) -> tuple[Model, set[str]]:
    """Return the settings without the wrong keys, and these keys, so that the rest can be checked further."""
    wrong: set[str] = set()
    while True:
        settings, problems = parse_settings({key: item for key, item in section.items() if key not in wrong}, model)
        if settings is not None:
            return settings, wrong
        wrong |= {str(path[0]) for path, _ in problems}


def dotted_key(path: KeyPath) -> str:
    """Return a key path as text: ``training.milestones[1]``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def _format_errors(errors: list[ErrorDetails], section: Any, model: type[BaseModel]) -> list[SettingProblem]:
    """Return pydantic's errors as problems; those of a union's alternatives are joined into one."""
    expected: dict[KeyPath, list[str]] = {}
    problems: dict[KeyPath, str] = {}
    for error in errors:
        path = _real_path(error["loc"], section, missing=error["type"] == "missing")
        if error["type"] == "extra_forbidden":
            problems[path] = f"{dotted_key(path)}: unknown key{_nearest_key(path, model)}"
        elif error["type"] == "missing":
            problems[path] = f"{dotted_key(path)} is missing{_description(path, model)}"
        else:
            expected.setdefault(path, []).append(expected_value(error))
    for path, texts in expected.items():
        got = _value_at(section, path)
        hint = did_you_mean(got, _choices(path, model)) if isinstance(got, str) else ""
        if isinstance(got, str):
            hint = _CHOICE_HINTS.get((str(path[-1]) if path else "", got), hint)
        problems[path] = f"{dotted_key(path)} must be {' or '.join(texts)}, got {format_value(got)}{hint}"
    return list(problems.items())


def expected_value(error: ErrorDetails) -> str:
    """Return what would have been valid, as in "must be ...": "a whole number", "at least 1"."""
    context, kind = error.get("ctx", {}), error["type"]
    if kind in _EXPECTED_TYPES:
        return _EXPECTED_TYPES[kind]
    if kind in _LIMITS:
        word, key = _LIMITS[kind]
        return f"{word} {context[key]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return "made of 1 to 64 letters, digits, dots, dashes and underscores"
    text = error["msg"].removeprefix("Value error, ").removeprefix("must be ")
    return text[:1].lower() + text[1:]


def format_value(value: Any) -> str:
    """Return a value as YAML shows it, at most 80 characters, control characters escaped."""
    text = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."


def _real_path(loc: tuple[int | str, ...], section: Any, *, missing: bool) -> KeyPath:
    """Return the path of an error in the recipe, without the tags of unions that pydantic adds."""
    loc = tuple(key for key in loc if key not in _TAGS)
    for depth, key in enumerate(loc):
        inside = (isinstance(section, dict) and key in section) or (
            isinstance(section, (list, tuple)) and isinstance(key, int) and key < len(section)
        )
        if not inside:
            return loc if missing and depth == len(loc) - 1 else loc[:depth]
        section = section[key]
    return loc


def _value_at(section: Any, path: KeyPath) -> Any:
    for key in path:
        section = section[key]
    return os.fspath(section) if isinstance(section, os.PathLike) else section


def _settings_class(path: KeyPath, model: type[BaseModel]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for key in path:
        if isinstance(key, int):  # a position in a list of sections of one kind
            continue
        field = current.model_fields.get(key) if current else None
        kinds = () if field is None else _annotation_parts(field.annotation)
        current = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return current


def _annotation_parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _annotation_parts(part)


def _nearest_key(path: KeyPath, model: type[BaseModel]) -> str:
    key, siblings = str(path[-1]), _settings_class(path[:-1], model)
    if siblings and (new := RENAMED_KEYS.get(key)) in siblings.model_fields:
        return f"; it has been renamed to {new!r}"
    if near := did_you_mean(key, siblings.model_fields if siblings else ()):
        return near
    elsewhere = [
        f"{section}.{key}"
        for section in model.model_fields
        if (inner := _settings_class((section,), model)) and key in inner.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f". Keys here: {', '.join(siblings.model_fields)}" if siblings else ""


def _description(path: KeyPath, model: type[BaseModel]) -> str:
    enclosing = _settings_class(path[:-1], model)
    field = enclosing.model_fields.get(str(path[-1])) if enclosing else None
    return f" ({field.description})" if field and field.description else ""


def _choices(path: KeyPath, model: type[BaseModel]) -> list[str]:
    enclosing = _settings_class(path[:-1], model) if path else None
    field = enclosing.model_fields.get(str(path[-1])) if enclosing else None
    return _literals(field.annotation) if field else []


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _literals(part)]
    return []
