"""What the command line changes in a recipe: the few flags that people type daily, then every ``--set key=value``."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from potstill.errors import UsageError
from potstill.experiments.recipe_yaml import Document, KeyPath, read
from potstill.methods.catalog import options

FLAGS = ("--data", "--teacher", "--student", "--seed")
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".json")


def apply_changes(document: Document, flags: Mapping[str, Any], sets: Iterable[str]) -> None:
    """Change ``document.value`` in place; flags come first, so that ``--set`` has the last word."""
    for flag in FLAGS:
        if flags.get(flag) is not None:
            _apply_flag(document, flag, flags[flag])
    changes = [change for text in sets if (change := _parse(document, text)) is not None]
    for path, value, _ in changes:
        if path == ("method", "name"):
            _drop_foreign_options(document.value.get("method"), value)
    for path, value, text in changes:
        _put(document, path, value, f"--set {text}")


def split_model(text: str) -> tuple[str | None, str | None]:
    """What ``--teacher`` and ``--student`` take, as (architecture, weights); either may be None.

    Example:
        >>> split_model("resnet18")
        ('resnet18', None)
        >>> split_model("resnet18@pretrained")
        ('resnet18', 'pretrained')
        >>> split_model("./weights/mine.safetensors")
        (None, './weights/mine.safetensors')
    """
    if _is_path(text):
        return None, text
    architecture, _, weights = text.partition("@")
    return architecture, weights or None


def _is_path(text: str) -> bool:
    if text.startswith((".", "/", "~")) or ("@" not in text and text.endswith(WEIGHT_FILES)):
        return True
    # A folder that happens to be called resnet18 does not hide the architecture of that name.
    path = Path(text)
    return path.is_file() or any((path / name).is_file() for name in ("model.json", "recipe.yaml", "results.json"))


def _apply_flag(document: Document, flag: str, value: Any) -> None:
    place = f"{flag} {value}"
    if flag == "--data":
        data = document.value.get("data")
        if isinstance(data, dict) and data.get("source") != value:
            data.pop("options", None)  # they belong to the data set that the recipe had before
        _put(document, ("data", "source"), os.fspath(value), place)
    elif flag == "--seed":
        _put(document, ("seed",), value, place)
    else:
        architecture, weights = split_model(os.fspath(value))
        stage = flag.removeprefix("--")
        _put(document, (stage, "model"), architecture, place)
        _put(document, (stage, "weights"), weights, place)


def _parse(document: Document, text: str) -> tuple[KeyPath, Any, str] | None:
    key, equals, yaml_value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        document.problems.append(f"--set {text}: write it as key=value, for example --set training.epochs=5")
        return None
    try:
        parsed = read(yaml_value, f"--set {text}")
    except UsageError as error:
        document.problems.append(str(error))
        return None
    document.problems += parsed.problems
    return tuple(parts), parsed.value, text


def _put(document: Document, path: KeyPath, value: Any, place: str) -> None:
    section = document.value
    for depth, key in enumerate(path[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
            document.places.replace(path[:depth], place)
        section = section[key]
        if not isinstance(section, dict):
            enclosing = ".".join(map(str, path[:depth]))
            document.problems.append(f"{place}: {enclosing} is a single value and has no keys in it")
            return
    section[path[-1]] = value
    document.places.replace(path, place)


def _drop_foreign_options(method: Any, name: Any) -> None:
    """The former method's options that method ``name`` does not have would only be in the way."""
    if not isinstance(method, dict) or method.get("name") == name:
        return
    try:
        known = options(str(name))
    except UsageError:
        known = {}  # the unknown name is reported by the check; its options would be noise
    for key in [key for key in method if key != "name" and key not in known]:
        del method[key]
